"""Where norms and rotations settle in training, and where the theory says that they do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.data.images import Images, batches
from normwise.lab.models.convnet import directions
from normwise.lab.runs.image_setup import build, optimizer_for
from normwise.lab.runs.settings import TrainSettings, rule_from
from normwise.norms import slice_norms

__all__ = ["EquilibriumSettings", "settle"]

EVERY = 10  # steps between two lines of the log


@dataclass(frozen=True, kw_only=True)
class EquilibriumSettings(TrainSettings):
    """Train by SGD at a constant learning rate, and measure every unit over the last steps.

    Attributes:
        length: Number of steps; ``epochs`` has no effect.
        measured: How many of them, at the end, are measured.
    """

    kind: ClassVar[str] = "equilibrium"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.equilibrium:settle"

    schedule: str = "constant"
    length: int = 450
    measured: int = 250

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.length


class _Sums:
    """What is added up over steps, for each unit of a layer."""

    def __init__(self, units: int) -> None:
        self.gradient, self.norm, self.turn = (torch.zeros(units, dtype=torch.float64) for _ in range(3))
        self.steps = 0

    def add(self, gradient_scale: Tensor, norm: Tensor, turn: Tensor) -> None:
        self.gradient += gradient_scale**2
        self.norm += norm
        self.turn += turn**2
        self.steps += 1

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Root mean square of gradient scales, mean of norms, root mean square of turns."""
        return (self.gradient / self.steps).sqrt(), self.norm / self.steps, (self.turn / self.steps).sqrt()


def settle(settings: EquilibriumSettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train, and compare norms and turns with the equilibrium that belongs to the gradients that were seen.

    For each unit γ is the root mean square of ‖gradient‖·‖w‖ over the measured steps, as n² grows by η²γ²/n²
    in a step; the norm is its mean, and the turn its root mean square.

    Args:
        settings: The run.
        log: Is called every 10 steps with mean loss, learning rate, and for each layer its mean norm,
            effective learning rate and turn (radians per step, root mean square).

    Returns:
        The summary: ``layers`` has for each layer the medians over its units of γ, of norm and turn, measured
        and predicted, of the ratios measured/predicted, and of the ratio of the norms in the second half of
        the measured steps to those in the first (``drift``, 1 where they have settled).
    """
    images = Images(settings, settings.validation_size)
    model = build(settings, images.classes)
    optimizer = optimizer_for(settings, model)
    weights = directions(model)
    halves = [{name: _Sums(len(w)) for name, w in weights.items()} for _ in range(2)]
    noted = {name: _Sums(len(w)) for name, w in weights.items()}
    losses: list[float] = []
    begin = settings.steps - settings.measured
    before = {name: _direction(weight) for name, weight in weights.items()}
    for step, (x, y) in enumerate(batches(settings, images)):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        norms = {name: slice_norms(weight).flatten() for name, weight in weights.items()}
        scales = {name: _gradient(weight) * norms[name] for name, weight in weights.items()}
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"status": "not finite", "step": step, "reason": f"the training loss was {losses[-1]}"}
        optimizer.step()
        for name, weight in weights.items():
            now = _direction(weight)
            turn = 2 * torch.asin(((now - before[name]).norm(dim=1) / 2).clamp(max=1)).double()
            before[name] = now
            noted[name].add(scales[name], norms[name], turn)
            if step >= begin:
                halves[2 * (step - begin) // settings.measured][name].add(scales[name], norms[name], turn)
        if (step + 1) % EVERY == 0:
            mean = sum(losses[-EVERY:]) / EVERY
            layers = {name: _line(settings.lr, sums) for name, sums in noted.items()}
            log({"step": step + 1, "train_loss": mean, "lr": settings.lr, "layers": layers})
            noted = {name: _Sums(len(w)) for name, w in weights.items()}
    return {
        "status": "finished",
        "step": settings.steps,
        "train_loss": sum(losses[begin:]) / settings.measured,
        "layers": {name: _compared(settings, halves[0][name], halves[1][name]) for name in weights},
    }


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return slice_norms(weight.grad).flatten()


def _direction(weight: Tensor) -> Tensor:
    return nw.functional.weight_norm(weight.detach().flatten(1))


def _line(lr: float, sums: _Sums) -> dict[str, float]:
    _, norms, turns = sums.means()
    rates = nw.theory.effective_lr(lr, norms)
    return {"norm": float(norms.mean()), "effective_lr": float(rates.mean()), "turn": float(turns.mean())}


def _compared(settings: EquilibriumSettings, first: _Sums, second: _Sums) -> dict[str, float]:
    drift = second.means()[1] / first.means()[1]
    both = _Sums(len(drift))
    both.gradient, both.norm, both.turn = (
        getattr(first, key) + getattr(second, key) for key in ("gradient", "norm", "turn")
    )
    both.steps = first.steps + second.steps
    scale, norm, turn = both.means()
    rule = rule_from(settings.rule)
    if rule is None:
        raise ValueError("rule=None: without decay norms grow for ever, and there is no equilibrium")
    predicted_norm = nw.theory.equilibrium_norm(rule, settings.lr, scale, settings.momentum, settings.mode)
    predicted_turn = nw.theory.equilibrium_rotation(
        rule, settings.lr, scale, settings.momentum, settings.mode
    )
    values = {
        "gradient_scale": scale,
        "norm": norm,
        "predicted_norm": predicted_norm,
        "norm_ratio": norm / predicted_norm,
        "turn": turn,
        "predicted_turn": predicted_turn,
        "turn_ratio": turn / predicted_turn,
        "drift": drift,
    }
    return {key: float(value.median()) for key, value in values.items()}
