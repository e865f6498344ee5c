"""One observed step in numbers: for each layer, and for the network as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normwise.monitor.layers import Balance, Layer
from normwise.monitor.measure import Movement
from normwise.monitor.pulls import Group, LayerPull
from normwise.theory import effective_lr

__all__ = ["QUANTITIES", "Memory", "Observation", "Row", "along_of", "balance_of", "row_of", "scale_of"]

#: What is logged for each layer. Means are over the units that have a direction: norm positive and finite.
QUANTITIES = {
    "norm": "norm of a unit, after the step and all decay: mean",
    "norm_min": "the smallest",
    "norm_max": "the largest",
    "gradient_scale": "γ = ‖g‖·‖w‖ (SGD), or the update norm per learning rate u (Adam): running mean",
    "effective_lr": "lr/norm² (SGD) or lr/norm (Adam): mean",
    "rotation": "angle in radians by which a unit turned in the step: mean",
    "rotation_predicted": "lr·γ/(norm²·√(1−μ²)), the angle for independent gradients (SGD): mean",
    "equilibrium_norm": "the norm at which growth and decay balance",
    "equilibrium_rotation": "the rotation per step there",
    "update_along": "the part of the update along the weight, from 0 to 1",
    "dead": "units that are zero, or had no gradient in the last 5 observed steps",
    "decay_lost": "the part of the decay that the rounding of the weights swallows",
    "pull": "by how much of itself decay shrinks the weight in a step",
}
DEAD_AFTER = 5  # observed steps without any gradient
_KEPT = 0.8  # of the running mean of γ², from one observed step to the next


@dataclass
class Memory:
    """What is remembered of a layer from one observed step to the next.

    Attributes:
        square: Running mean of γ² (or u²) of each unit.
        weight: The weight that the running mean has gathered; 1 after many observations.
        idle: For how many observed steps in a row each unit had no gradient.
    """

    square: Tensor
    idle: Tensor
    weight: float = 0.0

    def add(self, squares: Tensor, idle: Tensor) -> None:
        """Take in an observed step."""
        self.square = _KEPT * self.square + (1 - _KEPT) * squares
        self.weight = _KEPT * self.weight + (1 - _KEPT)
        self.idle = torch.where(idle, self.idle + 1, torch.zeros_like(self.idle))

    @property
    def scale(self) -> Tensor:
        """The running root mean square of each unit."""
        return (self.square / max(self.weight, 1e-300)).sqrt()


@dataclass(frozen=True)
class Row:
    """One layer in one observed step.

    Attributes:
        layer: The layer.
        movement: What happened to each of its units (those of the mask).
        effective_lr: Of each unit; NaN where it has no direction.
        values: {quantity: number}; a quantity that does not apply is left out.
        lr: The learning rate of the layer's group.
        pulls: What decays the layer.
        group: How its group steps.
        dead: The number of units that are dead.
    """

    layer: Layer
    movement: Movement
    effective_lr: Tensor
    values: Mapping[str, float]
    lr: float
    pulls: Sequence[LayerPull]
    group: Group
    dead: int


@dataclass(frozen=True)
class Observation:
    """One observed step.

    Attributes:
        step: The number of steps taken, this one included.
        rows: One row for each layer that was stepped.
        network: {name: number} of the network as a whole: lr, balance, loss.
        along: For each joint group of the plan, |Σ e·⟨w, g⟩| over what it would be without invariance.
    """

    step: int
    rows: Sequence[Row]
    network: Mapping[str, float]
    along: Mapping[str, float] = field(default_factory=dict)

    def values(self, per_unit: Sequence[str] = ()) -> dict[str, float]:
        """Return {"normwise/quantity/layer": number}, as trackers get it.

        Args:
            per_unit: The names of layers whose units are also listed one by one, as
                "normwise/rotation/layer/3".
        """
        found = {f"normwise/{name}": value for name, value in self.network.items()}
        for row in self.rows:
            for quantity, value in row.values.items():
                found[f"normwise/{quantity}/{row.layer.name}"] = value
        for row in self.rows:
            if row.layer.name in per_unit:
                columns = {
                    "norm": row.movement.norm,
                    "rotation": row.movement.rotation,
                    "effective_lr": row.effective_lr,
                }
                for quantity, column in columns.items():
                    for k, value in enumerate(column.tolist()):
                        found[f"normwise/{quantity}/{row.layer.name}/{k}"] = value
        return found


def scale_of(moved: Movement, memory: Memory, group: Group, lr: float) -> float:
    """Take a step into the memory of a layer, and return its typical γ (or u).

    Args:
        moved: What happened to the layer's units.
        memory: What is remembered of it; it is changed.
        group: How its group steps.
        lr: The learning rate.
    """
    squares = (moved.gradient * moved.before).square()
    if group.degree == 1:
        across = moved.update.square() * (1 - moved.update_along.square()).clamp(min=0)
        squares = across / lr**2 if lr > 0 else torch.zeros_like(across)
    memory.add(squares.nan_to_num(0.0, 0.0, 0.0), moved.gradient == 0)
    alive = (moved.norm > 0) & moved.norm.isfinite()
    # the mean over units of √γ, squared: exact for the norms of L2, which grow with √γ
    return _mean(memory.scale[alive].sqrt()) ** 2


def row_of(
    layer: Layer,
    moved: Movement,
    memory: Memory,
    group: Group,
    lr: float,
    pulls: Sequence[LayerPull],
    scale: float,
    settled: tuple[float, float] | None,
) -> Row:
    """Return the row of a layer.

    Args:
        layer: The layer.
        moved: What happened to its units.
        memory: What is remembered of it.
        group: How its group steps.
        lr: The learning rate.
        pulls: What decays it.
        scale: Its typical γ (or u).
        settled: The norm and the rotation at equilibrium, where there is a formula.
    """
    alive = (moved.norm > 0) & moved.norm.isfinite()
    rates = torch.full_like(moved.norm, torch.nan)
    if lr >= 0 and math.isfinite(lr):
        rates[alive] = effective_lr(lr, moved.norm[alive], group.degree or 2)
    dead = int(((memory.idle >= DEAD_AFTER) | (moved.norm == 0)).sum())
    smallest, largest = _ends(moved.norm)
    values = {
        "norm": _mean(moved.norm[alive]),
        "norm_min": smallest,
        "norm_max": largest,
        "update_along": _mean(moved.update_along[alive].abs()),
        "pull": sum(_mean(pull.rates(moved.norm)[alive]) for pull in pulls),
    }
    if layer.kind in ("shrink", "weight"):
        values |= {
            "gradient_scale": scale,
            "effective_lr": _mean(rates[alive]),
            "rotation": _mean(moved.rotation[alive]),
            "dead": float(dead),
        }
        if group.degree == 2 and group.momentum < 1:
            turned = rates[alive] * memory.scale[alive] / math.sqrt(1 - group.momentum**2)
            values["rotation_predicted"] = _mean(turned)
        if settled is not None:
            values["equilibrium_norm"], values["equilibrium_rotation"] = settled
    lost = moved.decay_lost[alive & moved.decay_lost.isfinite()]
    if lost.numel():
        values["decay_lost"] = max(0.0, _mean(lost))
    known = {name: value for name in QUANTITIES if math.isfinite(value := values.get(name, math.nan))}
    return Row(layer, moved, rates, known, lr, pulls, group, dead)


def balance_of(balance: Balance, rows: Mapping[int, Row]) -> float | None:
    """Return Σ e·‖w‖² over a symmetry, which gradient flow conserves; None if a member was not stepped."""
    if not all(k in rows for k in balance.exponents):
        return None
    return sum(e * float(rows[k].movement.norm.square().sum()) for k, e in balance.exponents.items())


def along_of(balance: Balance, rows: Mapping[int, Row]) -> float | None:
    """Return |Σ e·⟨w, g⟩| of a joint group over the size that it has without invariance."""
    if not balance.joint or not all(k in rows for k in balance.exponents):
        return None
    total = sum(e * float(rows[k].movement.along.sum()) for k, e in balance.exponents.items())
    noise = sum(e**2 * float(rows[k].movement.noise.square().sum()) for k, e in balance.exponents.items())
    return abs(total) / math.sqrt(noise) if noise > 0 else None


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _ends(values: Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (math.nan, math.nan)
