"""The formula of the weight-normalisation family, evaluated exactly at every scale.

For each unit ``v`` of ``d`` elements, every member of the family computes

    w = r · c / √(‖c‖² + d·ε),    c = v or v − mean(v),    r = gain · factor

Weight normalisation has ε = 0 and factor 1; weight standardisation has factor √d. Computed naively in the
weight's type, the formula fails where squares overflow or underflow, at units without a direction, and where
the mean is large. This module computes it in float64. Where that leaves no headroom (float64 weights, devices
without float64, float32 in compiled code), it first divides each unit by its largest entry. No branch depends
on data: nothing synchronises with an accelerator, and ``torch.compile``, ``torch.func`` and forward-mode AD
trace straight through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normwise.norms import wide_dtype

__all__ = ["Formula", "exact_backward", "exact_forward", "natural_gain", "unit_and_slope", "unit_size"]


class Formula(NamedTuple):
    """One member of the family: w = gain · factor · c / √(‖c‖² + d·eps).

    Attributes:
        dim: The dimension that counts the units, non-negative, or None: the whole tensor is one unit.
        center: Whether c = v − mean(v); otherwise c = v.
        factor: A constant that multiplies the unit vector: 1, or √d for a standard deviation of 1.
        eps: A constant added to the variance, for checkpoints trained with one. It breaks scale invariance.
    """

    dim: int | None
    center: bool
    factor: float
    eps: float = 0.0


class _Direction(NamedTuple):
    unit: Tensor  # c / √(‖c‖² + d·eps), zero where that is 0/0
    inverse: Tensor  # 1 / √(‖c‖² + d·eps) of the prescaled unit, zero where that is 1/0
    scale: Tensor | None  # the factor of the prescaling, if there was one


def unit_size(weight: Tensor, dim: int | None) -> int:
    """Return the number of elements of one unit of ``weight``."""
    size = 1
    for k, length in enumerate(weight.shape):
        if k != dim:
            size *= length
    return size


def exact_forward(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight, computed by differentiable operations.

    Args:
        weight: A real floating-point tensor of any shape, strides and device.
        gain: A tensor that broadcasts against the units (size 1 in every dimension but ``dim``), or None.
        formula: The member of the family.
    """
    unit = _direction(weight, formula).unit
    return (unit * _row_factor(unit, gain, formula)).to(weight.dtype)


def exact_backward(
    gradient: Tensor, weight: Tensor, gain: Tensor | None, formula: Formula
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of weight and gain, computed by differentiable operations.

    The weight's gradient is the incoming gradient without its component along the unit (and, if centered,
    without its mean), times r/√(‖c‖² + d·eps).

    Args:
        gradient: The gradient with respect to the output of `exact_forward`.
        weight: As for `exact_forward`.
        gain: As for `exact_forward`.
        formula: As for `exact_forward`.
    """
    unit, slope = unit_and_slope(weight, gain, formula)
    dims = _reduced(weight, formula)
    gradient = gradient.to(unit.dtype)
    along = (gradient * unit).sum(dims, keepdim=True)
    across = gradient - along * unit
    if formula.center:
        across = across - across.mean(dims, keepdim=True)
    to_weight = (across * slope).to(weight.dtype)
    if gain is None:
        return to_weight, None
    return to_weight, (along * formula.factor).reshape(gain.shape).to(gain.dtype)


def natural_gain(weight: Tensor, formula: Formula) -> Tensor:
    """Return the gain of each unit for which the formula reproduces c, the (centered) weight itself."""
    _, inverse, scale = _direction(weight.detach(), formula)
    norm = torch.where(inverse == 0, 0.0, inverse.reciprocal())
    norm = norm if scale is None else norm / scale
    gain = (norm / formula.factor).to(weight.dtype)
    return gain.reshape(()) if formula.dim is None else gain


def unit_and_slope(weight: Tensor, gain: Tensor | None, formula: Formula) -> tuple[Tensor, Tensor]:
    """Return c/√(‖c‖² + d·eps), and r/√(‖c‖² + d·eps) of each unit, the factor that scales gradients."""
    unit, inverse, scale = _direction(weight, formula)
    return unit, (inverse if scale is None else inverse * scale) * _row_factor(unit, gain, formula)


def _direction(weight: Tensor, formula: Formula) -> _Direction:
    wide, dims = _computed_in(weight), _reduced(weight, formula)
    v, scale = weight.to(wide), None
    eps = torch.as_tensor(formula.eps * unit_size(weight, formula.dim), dtype=wide, device=weight.device)
    if weight.dtype == wide or wide != torch.float64:
        # Squares have no headroom: scale the largest entry to 1. The result does not depend on the scale, so
        # autograd may take it as a constant. Below √eps the eps dominates, and must not overflow itself.
        bound = 1e300 if wide == torch.float64 else 1e30
        largest = v.detach().abs().amax(dims, keepdim=True)
        scale = largest.clamp(min=max(1 / bound, formula.eps**0.5), max=bound).reciprocal()
        v, eps = v * scale, eps * scale * scale
    if formula.center:
        # Subtract the first element first, so that a constant unit becomes exactly zero.
        first = v.detach()
        for k in dims:
            first = first.narrow(k, 0, 1)
        v = v - first
        v = v - v.mean(dims, keepdim=True)
    square = (v * v).sum(dims, keepdim=True) + eps
    undefined = square == 0
    inverse = torch.where(undefined, 0.0, torch.where(undefined, 1.0, square).rsqrt())
    return _Direction(v * inverse, inverse, scale)


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the type that the formula is evaluated in."""
    if torch.compiler.is_compiling() and weight.dtype != torch.float64:
        return torch.float32  # compiled float64 loops are several times slower than prescaled float32 ones
    return wide_dtype(weight.device)


def _reduced(weight: Tensor, formula: Formula) -> list[int]:
    return [k for k in range(weight.ndim) if k != formula.dim]


def _row_factor(unit: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | float:
    return formula.factor if gain is None else gain.to(unit.dtype) * formula.factor
