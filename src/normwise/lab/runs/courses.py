"""The two kinds of run that a replay compares: with decay, and without it but with the equivalent steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.data.images import Images, batches
from normwise.lab.models.convnet import ConvNet, directions
from normwise.lab.runs.image_setup import build
from normwise.lab.runs.settings import ReplaySettings, rule_from
from normwise.norms import slice_norms
from normwise.theory import UndecayedSteps

__all__ = ["Course", "decayed_course", "undecayed_course"]

BETA2, EPS = 0.999, 1e-8  # of Adam


class Course(NamedTuple):
    """What a run went through."""

    model: ConvNet
    norms: dict[str, Tensor]  # by layer: (steps, units), as the rule saw them
    turns: dict[str, Tensor]  # by layer: (steps, units, elements), the directions after each step


def decayed_course(settings: ReplaySettings, images: Images, ulp: bool = False) -> Course:
    """Train in float64 as the settings say, by torch's optimizer and normwise's Decay.

    Args:
        settings: The run; without a rule nothing is decayed.
        images: Those of the settings.
        ulp: Whether one weight starts one unit in the last place further out.
    """
    model = build(settings, images.classes).double()
    if ulp:
        with torch.no_grad():
            first = next(iter(directions(model).values())).view(-1)[:1]
            first.copy_(torch.nextafter(first, 2 * first))
    weights = directions(model)
    norms = {name: torch.empty(settings.steps, len(w), dtype=w.dtype) for name, w in weights.items()}
    turns = _room(settings, weights)
    now = 0

    def note_norms(*_: Any) -> None:
        for name, weight in weights.items():
            norms[name][now] = slice_norms(weight).flatten()

    # Hooks run in the order in which they were made: before the rule's own, so these are the norms it sees.
    optimizer = _optimizer(settings, list(model.parameters()))
    if settings.mode == "flow":
        optimizer.register_step_post_hook(note_norms)
    else:
        optimizer.register_step_pre_hook(note_norms)
    rule = rule_from(settings.rule)
    if rule is not None:
        nw.Decay(optimizer, rule, weights.values(), mode=settings.mode)
    for now, (x, y) in enumerate(batches(settings, images, torch.float64)):
        optimizer.param_groups[0]["lr"] = settings.lr_at(now)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, weight in weights.items():
            turns[name][now] = _direction(weight)
    return Course(model, norms, turns)


def undecayed_course(settings: ReplaySettings, images: Images, norms: dict[str, Tensor]) -> Course:
    """Train without decay: torch's optimizer for all else, and the equivalent steps for the directions.

    Args:
        settings: The decayed run that this is a replay of.
        images: Those of the settings.
        norms: Those of the decayed run.

    Raises:
        ValueError: The settings have no rule.
    """
    rule = rule_from(settings.rule)
    if rule is None:
        raise ValueError("rule=None: a replay needs a decayed run to be a replay of")
    lrs = [settings.lr_at(step) for step in range(settings.steps)]
    degree = 1 if settings.optimizer == "adam" else 2
    model = build(settings, images.classes).double()
    weights = directions(model)
    replayed = {
        name: _Replayed(
            weight,
            nw.theory.without_decay(lrs, rule, norms[name], settings.momentum, settings.mode, degree),
            settings,
        )
        for name, weight in weights.items()
    }
    mine = {id(weight) for weight in weights.values()}
    optimizer = _optimizer(settings, [param for param in model.parameters() if id(param) not in mine])
    turns = _room(settings, weights)
    for step, (x, y) in enumerate(batches(settings, images, torch.float64)):
        optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, weight in weights.items():
            replayed[name].step(step)
            turns[name][step] = _direction(weight)
    return Course(model, {}, turns)


class _Replayed:
    """A weight that takes the undecayed steps, as `normwise.theory.without_decay` writes them."""

    def __init__(self, weight: torch.nn.Parameter, steps: UndecayedSteps, settings: ReplaySettings) -> None:
        self.weight = weight
        self.steps = steps
        self.adam = settings.optimizer == "adam"
        self.beta1 = settings.momentum
        self.first = torch.zeros_like(weight)
        self.second = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, t: int) -> None:
        gradient = self.weight.grad
        assert gradient is not None
        shape = (-1, *[1] * (self.weight.ndim - 1))
        momentum, lr, scale, ratio = (
            values[t].view(shape)
            for values in (self.steps.momentum, self.steps.lr, self.steps.scale, self.steps.ratio)
        )
        if not self.adam:
            self.first.mul_(momentum).add_(gradient)
            self.weight.sub_(lr * self.first)
            return
        self.first.mul_(momentum).add_((1 - self.beta1) * gradient)
        self.second.mul_(BETA2 * ratio**2).add_((1 - BETA2) * gradient**2)
        root = (self.second / (1 - BETA2 ** (t + 1))).sqrt()
        update = self.first / (1 - self.beta1 ** (t + 1)) / (root + EPS * scale)
        self.weight.sub_(lr * update)


def _optimizer(settings: ReplaySettings, params: list[torch.nn.Parameter]) -> Optimizer:
    """Return torch's optimizer, without any decay of its own."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(params, settings.lr, settings.momentum)
    if settings.optimizer == "adam":
        betas = (settings.momentum, BETA2)
        return torch.optim.AdamW(params, settings.lr, betas, eps=EPS, weight_decay=0.0)
    raise ValueError(f"optimizer={settings.optimizer!r} has no replay: choose from sgd, adam")


def _room(settings: ReplaySettings, weights: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Room for the directions of all steps; kept one by one they would scatter over the heap."""
    return {
        name: torch.empty(settings.steps, *w.detach().flatten(1).shape, dtype=w.dtype)
        for name, w in weights.items()
    }


def _direction(weight: Tensor) -> Tensor:
    return nw.functional.weight_norm(weight.detach().flatten(1))
