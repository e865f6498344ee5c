"""What a step did to the units of a parameter, from sums over the elements that a rank holds.

Every number that a monitor shows follows from eight sums per unit. Ranks add up their sums in one reduction,
and then all of them know the same units. Sums are taken in float64 (float32 on MPS), piece by piece, so that
no copy of a parameter in a wider type is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.monitor.motion import angle_between
from normwise.norms import wide_dtype

__all__ = ["COLUMNS", "Movement", "gradient_sums", "movement", "step_sums"]

# The sums of each unit, before the step and after it: w is the weight, g its gradient, d the change of w.
COLUMNS = ("w²", "g²", "wg", "(wg)²", "g near overflow", "wd", "d²", "w′²", "decay", "decay kept")
_BEFORE = COLUMNS.index("wd")
_PIECE, _PIECE_ELSEWHERE = 2**15, 2**22  # elements that are widened at a time: they stay in a CPU's cache


@dataclass(frozen=True)
class Movement:
    """What one step did to each unit. All tensors have shape (units,).

    Attributes:
        before: Norm before the step.
        norm: Norm after the step, all decay included.
        gradient: Norm of the gradient that the optimizer saw.
        along: ⟨w, g⟩, which is 0 for a scale-invariant unit.
        noise: √Σ(wᵢgᵢ)², which ⟨w, g⟩ has the size of if nothing is invariant.
        near_overflow: The number of elements of a float16 gradient above a quarter of its largest number.
        update: Norm of the change of w in the step.
        update_along: The part of the update along w, from −1 to 1.
        rotation: Angle in radians by which the direction turned.
        decay_lost: The part of the decay that the rounding of the weights swallows; NaN where that was not
            asked.
    """

    before: Tensor
    norm: Tensor
    gradient: Tensor
    along: Tensor
    noise: Tensor
    near_overflow: Tensor
    update: Tensor
    update_along: Tensor
    rotation: Tensor
    decay_lost: Tensor


def _rows(tensor: Tensor, dim: int | None, *others: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield the units of tensors of one shape as rows, piece by piece: (which units, the pieces)."""
    count = 1 if dim is None else tensor.shape[dim]
    if not tensor.numel():
        return
    limit = _PIECE if tensor.device.type == "cpu" else _PIECE_ELSEWHERE
    step = max(1, limit * len(tensor) // tensor.numel())
    wide = wide_dtype(tensor.device)
    for start in range(0, len(tensor), step):
        pieces = (t[start : start + step] for t in (tensor, *others))
        rows = tuple(
            piece.reshape(1, -1) if dim is None else piece.movedim(dim, 0).reshape(piece.shape[dim], -1)
            for piece in pieces
        )
        which = slice(start, start + len(rows[0])) if dim == 0 else slice(0, count)
        yield which, tuple(row.to(wide) for row in rows)


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row, in one pass over memory."""
    squares: Tensor = torch.linalg.vector_norm(rows, dim=1).square_()
    return squares


def gradient_sums(weight: Tensor, gradient: Tensor, dim: int | None, scale: Tensor | None = None) -> Tensor:
    """Return the sums that must be taken before a step: shape (units, 5), the first columns of COLUMNS.

    Args:
        weight: This rank's part of the parameter.
        gradient: Its gradient.
        dim: The dimension that counts the units.
        scale: By what a GradScaler has multiplied the gradient, if there is one.
    """
    weight, gradient = _at_least_1d(weight), _at_least_1d(gradient)
    total = _Total(weight, dim, _BEFORE)
    half = gradient.dtype == torch.float16
    for which, (w, g) in _rows(weight, dim, gradient):
        near = (
            (g.abs() > torch.finfo(gradient.dtype).max / 4).sum(1).to(g.dtype)
            if half
            else g.new_zeros(len(g))
        )
        if scale is not None:
            g = g / scale
        product = w * g
        total.add(which, _squares(w), _squares(g), product.sum(1), _squares(product), near)
    return total.sums


def step_sums(before: Tensor, after: Tensor, dim: int | None, factors: Tensor | None) -> Tensor:
    """Return the sums that are taken after a step: shape (units, 5), the other columns of COLUMNS.

    Args:
        before: This rank's part of the parameter before the step.
        after: The same after the step.
        dim: The dimension that counts the units.
        factors: What decay multiplies each unit by, of shape (units,) and the widest type, if it is to be
            seen how much of that survives rounding; else None.
    """
    before, after = _at_least_1d(before), _at_least_1d(after)
    total = _Total(after, dim, len(COLUMNS) - _BEFORE)
    for which, (w, new) in _rows(before, dim, after):
        change, squares = new - w, _squares(new)
        decay = kept = new.new_zeros(len(new))
        if factors is not None:
            shrunk = (new * factors[which, None]).to(after.dtype).to(new.dtype)
            decay, kept = (1 - factors[which]) * squares, (new * (new - shrunk)).sum(1)
        total.add(which, (w * change).sum(1), _squares(change), squares, decay, kept)
    return total.sums


class _Total:
    """Adds up columns of sums over pieces of a parameter."""

    def __init__(self, tensor: Tensor, dim: int | None, columns: int) -> None:
        count = 1 if dim is None else tensor.shape[dim]
        self.sums = torch.zeros(count, columns, dtype=wide_dtype(tensor.device), device=tensor.device)

    def add(self, which: slice, *columns: Tensor) -> None:
        """Add the sums of a piece to those of its units."""
        self.sums[which] += torch.stack(columns, 1)


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()


def movement(sums: Tensor) -> Movement:
    """Return what a step did to units, from their sums of shape (units, columns)."""
    w, g, wg, squares, near, wd, d, new, decay, kept = sums.unbind(1)
    before, update = w.sqrt(), d.sqrt()
    product = before * update
    return Movement(
        before=before,
        norm=new.sqrt(),
        gradient=g.sqrt(),
        along=wg,
        noise=squares.sqrt(),
        near_overflow=near,
        update=update,
        update_along=torch.where(product > 0, wd / product.clamp(min=torch.finfo(w.dtype).tiny), 0.0),
        rotation=angle_between(w, wd, d),
        decay_lost=1 - kept / decay,
    )
