"""A decayed run, and the undecayed run that turns every unit in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.images import Images, batches
from normwise.lab.models import ConvNet, directions
from normwise.lab.settings import ReplaySettings, rule_from
from normwise.lab.setup import build
from normwise.units import row_norms

__all__ = ["replay"]


class _Course(NamedTuple):
    """What a run went through."""

    model: ConvNet
    norms: dict[str, Tensor]  # by layer: (steps, units), as the rule saw them
    turns: dict[str, Tensor]  # by layer: (steps, units, elements), the directions after each step


def replay(settings: ReplaySettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compare a decayed run in float64 with three others, unit by unit and step by step.

    The others are the *replay*, without decay, with the steps of :func:`normwise.theory.without_decay`;
    the *naive* run, without decay, with the learning rates of the decayed run; and the *twin*, with decay,
    from a start in which one weight differs by one unit in the last place: it shows how far rounding alone
    would carry the runs apart.

    Args:
        settings: The decayed run.
        log: Is called for each step with the largest angle (radians) between the units of the decayed run
            and those of each other run.

    Returns:
        The summary: the largest angles over all steps, and how many test images the final models classify
        differently.
    """
    images = Images(settings)
    decayed = _course(settings, images)
    others = {
        "replay": _replayed(settings, images, decayed.norms),
        "naive": _course(replace(settings, rule=None), images),
        "twin": _course(settings, images, ulp=True),
    }
    angles = {name: _angles(decayed, other) for name, other in others.items()}
    for step in range(settings.steps):
        log({"step": step + 1, **{name: float(angle[step]) for name, angle in angles.items()}})
    expected = _logits(decayed.model, images.test)
    summary: dict[str, Any] = {"status": "finished", "step": settings.steps, "test_images": len(expected)}
    for name, other in others.items():
        logits = _logits(other.model, images.test)
        summary[name] = {
            "largest_angle": float(angles[name].max()),
            "predictions_that_differ": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "largest_logit_difference": float((logits - expected).abs().max()),
        }
    first, last = (torch.cat([norms[k] for norms in decayed.norms.values()]) for k in (0, -1))
    summary["norm_change"] = float((last / first).median())
    return summary


def _course(settings: ReplaySettings, images: Images, ulp: bool = False) -> _Course:
    """Train as the settings say, by torch's SGD and normwise's Decay."""
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
            norms[name][now] = row_norms(weight).flatten()

    # Hooks run in the order in which they were made: before the rule's own, so these are the norms it sees.
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum)
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
    return _Course(model, norms, turns)


def _replayed(settings: ReplaySettings, images: Images, norms: dict[str, Tensor]) -> _Course:
    """Train without decay: SGD for all else, and the equivalent steps for the directions."""
    rule = rule_from(settings.rule)
    if rule is None:
        raise ValueError("rule=None: a replay needs a decayed run to be a replay of")
    lrs = [settings.lr_at(step) for step in range(settings.steps)]
    plans = {
        name: nw.theory.without_decay(lrs, rule, seen, settings.momentum, settings.mode)
        for name, seen in norms.items()
    }
    model = build(settings, images.classes).double()
    weights = directions(model)
    mine = {id(weight) for weight in weights.values()}
    rest = [param for param in model.parameters() if id(param) not in mine]
    optimizer = torch.optim.SGD(rest, settings.lr, settings.momentum)
    buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    turns = _room(settings, weights)
    for step, (x, y) in enumerate(batches(settings, images, torch.float64)):
        optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                assert weight.grad is not None
                shape = (-1, *[1] * (weight.ndim - 1))
                momentum, lr = plans[name].momentum[step].view(shape), plans[name].lr[step].view(shape)
                buffers[name].mul_(momentum).add_(weight.grad)
                weight.sub_(lr * buffers[name])
                turns[name][step] = _direction(weight)
    return _Course(model, {}, turns)


def _room(settings: ReplaySettings, weights: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Room for the directions of all steps; kept one by one they would scatter over the heap."""
    return {
        name: torch.empty(settings.steps, *w.detach().flatten(1).shape, dtype=w.dtype)
        for name, w in weights.items()
    }


def _direction(weight: Tensor) -> Tensor:
    return nw.functional.weight_norm(weight.detach().flatten(1))


def _angles(one: _Course, other: _Course) -> Tensor:
    """The largest angle between the units of two runs after each step."""
    largest = []
    for name in one.turns:
        difference = one.turns[name] - other.turns[name]
        # half of the chord is the sine of half of the angle: exact for small angles, as a cosine is not
        largest.append(2 * torch.asin((difference.norm(dim=2) / 2).clamp(max=1)).amax(1))
    return torch.stack(largest).amax(0)


@torch.no_grad()
def _logits(model: ConvNet, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(x.double()) for x in images.split(1000)])
