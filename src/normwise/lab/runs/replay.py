"""A decayed run, and an undecayed run that rotates every unit in the same way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.convnet import directions
from normwise.lab.runs.base import ImageRun, rule_from
from normwise.lab.runs.images import Images, batches
from normwise.monitor.motion import angles
from normwise.norms import slice_norms
from normwise.theory import UndecayedSteps

__all__ = ["ReplayRun"]

BETA2, EPS = 0.999, 1e-8  # of Adam


class Trajectory(NamedTuple):
    """A finished training run and the path of its units."""

    model: nn.Module
    norms: dict[str, Tensor]  # by layer, shape (steps, units): the norms that the rule saw
    directions: dict[str, Tensor]  # by layer, shape (steps, units, elements): after each step


@dataclass(frozen=True, kw_only=True)
class ReplayRun(ImageRun):
    """Train with decay in float64, then without decay with the equivalent steps, and compare the directions.

    The decayed run is compared with three others, unit by unit and step by step: the *replay*, without decay,
    with the steps of :func:`normwise.theory.without_decay`; the *naive* run, without decay, with the learning
    rates of the decayed run; and the *twin*, the decayed run again from a start in which one weight differs
    by one unit in the last place. The twin shows how far rounding alone drives runs apart.

    Attributes:
        length: Number of steps.
        optimizer: "sgd" or "adam" (β₂ = 0.999, ε = 1e-8).
    """

    length: int = 300
    optimizer: str = "sgd"

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.length

    @property
    def cost(self) -> float:
        """Rough number of seconds, for four trainings in float64."""
        return 8 * self.seconds(self.steps)

    def run(self, log: Log) -> Metrics:
        """Train four times and compare.

        Args:
            log: Called for each step with the largest angle (radians) between the units of the decayed run
                and those of each other run, the median norm of the decayed run, and its learning rate.

        Returns:
            The summary: for each other run the largest angle over all steps, the number of test images that
                the
            final model classifies differently, and the largest difference of a logit.
        """
        images = Images(self)
        decayed = self._decayed(images)
        others = {
            "replay": self._undecayed(images, decayed.norms),
            "naive": replace(self, rule=None)._decayed(images),
            "twin": self._decayed(images, ulp=True),
        }
        largest = {name: _largest_angles(decayed, other) for name, other in others.items()}
        for step in range(self.steps):
            norm = torch.cat([norms[step] for norms in decayed.norms.values()]).median()
            line = {name: float(angle[step]) for name, angle in largest.items()}
            log({"step": step + 1, "norm": float(norm), "lr": self.lr_at(step), **line})
        expected = _logits(decayed.model, images.test)
        summary: Metrics = {"status": "finished", "step": self.steps, "test_images": len(expected)}
        for name, other in others.items():
            logits = _logits(other.model, images.test)
            summary[name] = {
                "largest_angle": float(largest[name].max()),
                "predictions_that_differ": int((logits.argmax(1) != expected.argmax(1)).sum()),
                "largest_logit_difference": float((logits - expected).abs().max()),
            }
        first, last = (torch.cat([norms[k] for norms in decayed.norms.values()]) for k in (0, -1))
        summary["norm_change"] = float((last / first).median())
        return summary

    def _decayed(self, images: Images, ulp: bool = False) -> Trajectory:
        """Train with torch's optimizer and ``normwise.Decay``.

        Args:
            images: The images of this run.
            ulp: Whether to increase the magnitude of one initial weight by one unit in the last place.
        """
        model = self.build(images.classes).double()
        if ulp:
            with torch.no_grad():
                first = next(iter(directions(model).values())).view(-1)[:1]
                first.copy_(torch.nextafter(first, 2 * first))
        weights = directions(model)
        norms = {name: torch.empty(self.steps, len(w), dtype=w.dtype) for name, w in weights.items()}
        path = self._empty_path(weights)
        step = 0

        def record_norms(*_: Any) -> None:
            for name, weight in weights.items():
                norms[name][step] = slice_norms(weight).flatten()

        # Hooks run in the order of their registration. This one runs before the hook of Decay, so it sees the
        # norms that the rule sees.
        optimizer = self._make_optimizer(list(model.parameters()))
        if self.mode == "flow":
            optimizer.register_step_post_hook(record_norms)
        else:
            optimizer.register_step_pre_hook(record_norms)
        rule = rule_from(self.rule)
        if rule is not None:
            nw.Decay(optimizer, rule, weights.values(), mode=self.mode)
        for step, (x, y) in enumerate(batches(self, images, torch.float64)):
            optimizer.param_groups[0]["lr"] = self.lr_at(step)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            for name, weight in weights.items():
                path[name][step] = _direction(weight)
        return Trajectory(model, norms, path)

    def _undecayed(self, images: Images, norms: dict[str, Tensor]) -> Trajectory:
        """Train without decay: equivalent steps for the directions, torch's optimizer for everything else.

        Args:
            images: The images of this run.
            norms: The norms of the decayed run.

        Raises:
            ValueError: The run has no rule.
        """
        rule = rule_from(self.rule)
        if rule is None:
            raise ValueError("rule=None: a replay needs a decayed run to compare with: give a rule")
        lrs = [self.lr_at(step) for step in range(self.steps)]
        degree = 1 if self.optimizer == "adam" else 2
        model = self.build(images.classes).double()
        weights = directions(model)
        replayed = {}
        for name, weight in weights.items():
            steps = nw.theory.without_decay(lrs, rule, norms[name], self.momentum, self.mode, degree)
            replayed[name] = _EquivalentSteps(weight, steps, self.optimizer == "adam", self.momentum)
        excluded = {id(weight) for weight in weights.values()}
        optimizer = self._make_optimizer([param for param in model.parameters() if id(param) not in excluded])
        path = self._empty_path(weights)
        for step, (x, y) in enumerate(batches(self, images, torch.float64)):
            optimizer.param_groups[0]["lr"] = self.lr_at(step)
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            for name, weight in weights.items():
                replayed[name].step(step)
                path[name][step] = _direction(weight)
        return Trajectory(model, {}, path)

    def _make_optimizer(self, params: list[torch.nn.Parameter]) -> Optimizer:
        """Return torch's optimizer without weight decay."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, self.lr, self.momentum)
        if self.optimizer == "adam":
            betas = (self.momentum, BETA2)
            return torch.optim.AdamW(params, self.lr, betas, eps=EPS, weight_decay=0.0)
        raise ValueError(f"optimizer={self.optimizer!r} has no replay: choose from sgd, adam")

    def _empty_path(self, weights: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """Allocate the directions of all steps at once; small tensors would fragment the heap."""
        return {
            name: torch.empty(self.steps, *w.detach().flatten(1).shape, dtype=w.dtype)
            for name, w in weights.items()
        }


class _EquivalentSteps:
    """An optimizer for one weight that takes the undecayed steps of ``normwise.theory.without_decay``."""

    def __init__(self, weight: torch.nn.Parameter, steps: UndecayedSteps, adam: bool, beta1: float) -> None:
        self.weight, self.steps, self.adam, self.beta1 = weight, steps, adam, beta1
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


def _largest_angles(one: Trajectory, other: Trajectory) -> Tensor:
    """Return the largest angle between the units of two runs after each step."""
    layers = [angles(one.directions[name], other.directions[name]).amax(1) for name in one.directions]
    return torch.stack(layers).amax(0)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(x.double()) for x in images.split(1000)])


def _direction(weight: Tensor) -> Tensor:
    return nw.functional.weight_norm(weight.detach().flatten(1))
