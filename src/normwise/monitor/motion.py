"""How units move during training: norms, effective learning rates and rotations between two snapshots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.normalization.functional import weight_norm
from normwise.theory import effective_lr
from normwise.units import Unit

__all__ = ["Motion", "Snapshot", "angle_between", "angles", "motion", "snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """Norms and directions of the units of one :class:`~normwise.units.Unit` at one moment.

    Attributes:
        norms: Shape (units,), float64 (float32 on MPS).
        directions: Shape (units, elements of a unit), w/‖w‖ in the type of the weight. The direction of a
            zero unit is zero.
    """

    norms: Tensor
    directions: Tensor


@dataclass(frozen=True)
class Motion:
    """What happened to each unit between two snapshots. All tensors have shape (units,).

    Attributes:
        norm: Norm at the second snapshot.
        effective_lr: Effective learning rate at that norm; NaN where the norm is zero or not finite.
        rotation: Angle in radians between the two directions.
    """

    norm: Tensor
    effective_lr: Tensor
    rotation: Tensor

    def means(self) -> dict[str, float | None]:
        """Return the means over the units.

        Units whose norm is zero or not finite do not count in "norm" and "effective_lr". These are None if no
        unit is left.
        """
        alive = ~self.effective_lr.isnan()
        return {
            "norm": float(self.norm[alive].mean()) if alive.any() else None,
            "effective_lr": float(self.effective_lr[alive].mean()) if alive.any() else None,
            "turn": float(self.rotation.mean()),
        }


@torch.no_grad()
def snapshot(unit: Unit) -> Snapshot:
    """Return norms and directions of all units, or of those that the mask selects.

    Args:
        unit: The units: rows, columns or a whole tensor, of one tensor or of several taken jointly. A unit
            needs at least 2 elements, else it has no direction. Sharded parameters are not supported.

    Example:
        >>> snapshot(Unit(torch.tensor([[3.0, 4.0], [0.0, 2.0]])))
        Snapshot(norms=tensor([5., 2.], dtype=torch.float64), directions=tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]]))
    """
    rows = [
        param.detach().reshape(1, -1) if unit.dim is None else param.detach().movedim(unit.dim, 0).flatten(1)
        for param in unit.params
    ]
    directions = weight_norm(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
    norms = unit.norms()
    return (
        Snapshot(norms, directions)
        if unit.mask is None
        else Snapshot(norms[unit.mask], directions[unit.mask])
    )


def angles(directions: Tensor, others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the angles in radians between unit vectors.

    The angle follows from the chord ‖a − b‖ = 2·sin(angle/2), which is accurate for small angles. (The cosine
    of a small angle rounds to 1.)

    Args:
        directions: Unit vectors along the last dimension.
        others: Unit vectors of the same shape and type.
        dtype: Type in which to compute the angle from the chord. None: the type of the vectors.

    Returns:
        Angles from 0 to π, of the shape without the last dimension.

    Example:
        >>> angles(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.5708)
    """
    chord = (directions - others).norm(dim=-1)
    return 2 * torch.asin((chord.to(dtype or chord.dtype) / 2).clamp(max=1))


def angle_between(square: Tensor, along: Tensor, step_square: Tensor) -> Tensor:
    """Return the angles in radians by which vectors w turn when d is added to them, from their products.

    This is the angle of :func:`angles` where w and d lie on several ranks, of which each knows sums only. The
    part of d across w is √(d² − ⟨w, d⟩²/w²), so angles below 1e-8 of ‖d‖/‖w‖ are lost in rounding.

    Args:
        square: Σwᵢ², of any shape.
        along: Σwᵢdᵢ.
        step_square: Σdᵢ².

    Returns:
        Angles from 0 to π; 0 where w is zero.

    Example:
        >>> wide = torch.float64
        >>> one = torch.ones((), dtype=wide)
        >>> angle_between(one, -one, 2 * one)  # from (1, 0) to (0, 1)
        tensor(1.5708, dtype=torch.float64)
    """
    norm = square.sqrt()
    parallel = torch.where(square > 0, along / norm, torch.zeros_like(norm))
    across = (step_square - parallel * parallel).clamp(min=0).sqrt()
    return torch.where(square > 0, torch.atan2(across, norm + parallel), torch.zeros_like(norm))


@torch.no_grad()
def motion(
    before: Snapshot, now: Snapshot, lr: float, degree: int = 2, dtype: torch.dtype | None = None
) -> Motion:
    """Return norm, effective learning rate and rotation of each unit between two snapshots.

    Args:
        before: The earlier snapshot.
        now: The later snapshot of the same units.
        lr: Learning rate at the later snapshot.
        degree: 2 for SGD, where the effective learning rate is lr/norm²; 1 for Adam-like optimizers, where it
            is lr/norm (:func:`normwise.theory.effective_lr`).
        dtype: Type in which to compute angles (:func:`angles`).

    Example:
        >>> before = snapshot(Unit(torch.tensor([[1.0, 0.0]])))
        >>> motion(before, snapshot(Unit(torch.tensor([[0.0, 2.0]]))), lr=0.1)
        Motion(norm=tensor([2.], dtype=torch.float64), effective_lr=tensor([0.0250], dtype=torch.float64),
            rotation=tensor([1.5708]))
    """
    alive = (now.norms > 0) & now.norms.isfinite()
    rates = torch.full_like(now.norms, torch.nan)
    rates[alive] = effective_lr(lr, now.norms[alive], degree)
    return Motion(now.norms, rates, angles(now.directions, before.directions, dtype))
