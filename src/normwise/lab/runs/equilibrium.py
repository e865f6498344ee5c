"""Where norms and rotations settle in training, compared with the predictions of the theory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.convnet import directions
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.images import Images, batches
from normwise.lab.runs.train import TrainRun
from normwise.monitor.motion import angles, snapshot
from normwise.norms import slice_norms

__all__ = ["EVERY", "EquilibriumRun"]

EVERY = 10  # steps between two lines of metrics


@dataclass(frozen=True, kw_only=True)
class EquilibriumRun(TrainRun):
    """Train with SGD at a constant learning rate, and measure every unit over the last steps.

    Attributes:
        length: Number of steps; ``epochs`` has no effect.
        measured: Number of steps, at the end, that are measured.
    """

    schedule: str = "constant"
    length: int = 450
    measured: int = 250

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.length

    def run(self, log: Log) -> Metrics:
        """Train, and compare norms and rotations with the equilibrium that the measured gradients predict.

        The gradient scale γ of a unit is the root mean square of ‖gradient‖·‖w‖ over the measured steps, as a
        step adds η²γ²/n² to n². The norm is averaged by its mean, the rotation by its root mean square.

        Args:
            log: Called every 10 steps with the mean loss, the learning rate, and for each layer the mean
                norm, the effective learning rate and the rotation ("turn", radians per step, root mean
                square).

        Returns:
            The summary: ``layers`` has for each layer the medians over its units of γ, of norm and rotation,
            measured and predicted, of the ratios measured/predicted, and of the ratio of the norms in the
            second half of the measured steps to those in the first (``drift``, 1 once they have settled).
        """
        images = Images(self, self.validation_size)
        model = self.build(images.classes)
        optimizer = self.make_optimizer(model)
        weights = directions(model)
        halves = [{name: _Sums(len(w)) for name, w in weights.items()} for _ in range(2)]
        recent = {name: _Sums(len(w)) for name, w in weights.items()}
        losses: list[float] = []
        begin = self.steps - self.measured
        before = {name: snapshot(nw.Unit(weight)) for name, weight in weights.items()}
        for step, (x, y) in enumerate(batches(self, images)):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            gradients = {name: _gradient_norms(weight) for name, weight in weights.items()}
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                reason = f"the training loss was {losses[-1]}"
                return {"status": "not finite", "step": step, "reason": reason}
            optimizer.step()
            for name, weight in weights.items():
                now, norms = snapshot(nw.Unit(weight)), before[name].norms
                turn = angles(now.directions, before[name].directions).double()
                before[name] = now
                recent[name].add(gradients[name] * norms, norms, turn)
                if step >= begin:
                    half = halves[2 * (step - begin) // self.measured]
                    half[name].add(gradients[name] * norms, norms, turn)
            if (step + 1) % EVERY == 0:
                mean = sum(losses[-EVERY:]) / EVERY
                layers = {name: _line(self.lr, sums) for name, sums in recent.items()}
                log({"step": step + 1, "train_loss": mean, "lr": self.lr, "layers": layers})
                recent = {name: _Sums(len(w)) for name, w in weights.items()}
        return {
            "status": "finished",
            "step": self.steps,
            "train_loss": sum(losses[begin:]) / self.measured,
            "layers": {name: self._compared(halves[0][name], halves[1][name]) for name in weights},
        }

    def _compared(self, first: _Sums, second: _Sums) -> dict[str, float]:
        rule = rule_from(self.rule)
        if rule is None:
            raise ValueError("rule=None: without decay norms grow for ever and never settle: give a rule")
        drift = second.means()[1] / first.means()[1]
        scale, norm, turn = (first + second).means()
        settings = (rule, self.lr, scale, self.momentum, self.mode)
        predicted_norm = nw.theory.equilibrium_norm(*settings)
        predicted_turn = nw.theory.equilibrium_rotation(*settings)
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


class _Sums:
    """Sums over steps for each unit of a layer: of γ², of the norm and of the squared rotation."""

    def __init__(self, units: int) -> None:
        self.gradient, self.norm, self.turn = (torch.zeros(units, dtype=torch.float64) for _ in range(3))
        self.steps = 0

    def add(self, gradient_scale: Tensor, norm: Tensor, turn: Tensor) -> None:
        self.gradient += gradient_scale**2
        self.norm += norm
        self.turn += turn**2
        self.steps += 1

    def __add__(self, other: _Sums) -> _Sums:
        total = _Sums(len(self.norm))
        for key in ("gradient", "norm", "turn", "steps"):
            setattr(total, key, getattr(self, key) + getattr(other, key))
        return total

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the root mean square of γ, the mean norm and the root mean square of the rotation."""
        return (self.gradient / self.steps).sqrt(), self.norm / self.steps, (self.turn / self.steps).sqrt()


def _gradient_norms(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return slice_norms(weight.grad).flatten()


def _line(lr: float, sums: _Sums) -> dict[str, float]:
    _, norms, turns = sums.means()
    rates = nw.theory.effective_lr(lr, norms)
    return {"norm": float(norms.mean()), "effective_lr": float(rates.mean()), "turn": float(turns.mean())}
