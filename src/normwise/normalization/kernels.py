"""How a weight is normalised: one formula, its exact evaluation, and fast kernels where they are exact.

Every member of the family is, for each unit ``v`` of ``d`` elements,

    w = r · c / √(‖c‖² + d·ε),    c = v or v − mean(v),    r = gain · factor

Weight normalisation has ε = 0 and factor 1, weight standardisation factor √d. The plain formula in the
weight's own type fails where squares over- or underflow, at units without a direction, and where the mean
is large. Two evaluations cover everything:

- `exact_forward` computes in float64 (float64 weights and devices without float64: after division by the
  largest entry of the unit). No branch depends on data, so it is used under ``torch.compile``,
  ``torch.func``, forward-mode AD, on tensor subclasses and on accelerators, where a branch would have to
  wait for the device.
- On a CPU, torch's fused kernels run first. They return the statistics of each unit as a by-product; looking
  at those few numbers tells whether the result is exact. If not, `exact_forward` computes it anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normwise.units import wide_dtype

__all__ = ["Formula", "exact_forward", "natural_gain", "normalize", "unit_size"]

# Norms between which float32 squares, and the products of weights and gradients in the backward pass
# (gradients of 1e-28 to 1e28), neither overflow nor lose digits.
_LOW, _HIGH = 1e-8, 1e8
# |mean|/std up to which the fused layer norm, which expands (v − mean)/std, loses at most about two bits.
_MEAN_OVER_STD = 4.0
# The fused weight norm adds float32 squares in sequence: the error of longer rows exceeds a few ULP.
_LONGEST_ROW = 16384


class Formula(NamedTuple):
    """Which member of the family: w = gain · factor · c / √(‖c‖² + d·eps).

    Attributes:
        dim: The dimension that counts the units, non-negative, or None: the whole tensor is one unit.
        center: Whether c = v − mean(v) (or c = v).
        factor: What multiplies the unit vector: 1, or √d to have a standard deviation of 1.
        eps: What is added to the variance, for checkpoints that were trained so. Breaks scale invariance.
    """

    dim: int | None
    center: bool
    factor: float
    eps: float = 0.0


def unit_size(weight: Tensor, dim: int | None) -> int:
    """Return the number of elements that one unit of ``weight`` has."""
    if dim is None:
        return weight.numel()
    size = 1
    for k, length in enumerate(weight.shape):
        if k != dim:
            size *= length
    return size


def normalize(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight, by the fastest evaluation that is exact for it.

    Args:
        weight: A real floating-point tensor of any shape, strides and device.
        gain: A tensor that broadcasts against the units (size 1 in every dimension but ``dim``), or None.
        formula: The member of the family.
    """
    if _may_look_at_values(weight):
        fast = _fast(weight, gain, formula)
        if fast is not None:
            return fast
    elif torch.compiler.is_compiling() or _is_transformed():
        return exact_forward(weight, gain, formula)
    out: Tensor = _Exact.apply(weight, gain, formula)
    return out


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they differentiate the formula themselves."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _may_look_at_values(weight: Tensor) -> bool:
    """Whether Python may branch on the values of ``weight`` at no cost: on a CPU, nothing traced."""
    return (
        weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not _is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


# ----------------------------------------------------------------------------------------- fused kernels
def _fast(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | None:
    """Return what torch's fused kernels give, or None where they are not exact."""
    dim, shape, dtype = formula.dim, weight.shape, weight.dtype
    if formula.eps or not weight.numel():
        return None
    if dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
        gain = None if gain is None else gain.float()
    if dim is None:
        weight = weight.reshape(1, -1)
        gain = None if gain is None else gain.reshape(1, 1)
    elif dim:
        weight = weight.movedim(dim, 0)
        gain = None if gain is None else gain.movedim(dim, 0)
    out = _fast_centered(weight, gain, formula.factor) if formula.center else _fast_plain(weight, gain)
    if out is None:
        return None
    if dim is None:
        out = out.reshape(shape)
    elif dim:
        out = out.movedim(0, dim)
    return out if out.dtype == dtype else out.to(dtype)


def _fast_plain(weight: Tensor, gain: Tensor | None) -> Tensor | None:
    """Weight normalisation of rows by torch's own kernel, which returns the norms too."""
    if weight.numel() > _LONGEST_ROW * weight.shape[0]:
        return None
    if gain is None:
        gain = weight.new_ones((weight.shape[0],) + (1,) * (weight.ndim - 1))
    out: Tensor
    out, norms = torch._weight_norm_interface(weight.contiguous(), gain.contiguous(), 0)
    low, high = torch.aminmax(norms)
    return out if low.item() > _LOW and high.item() < _HIGH else None


def _fast_centered(weight: Tensor, gain: Tensor | None, factor: float) -> Tensor | None:
    """The centered members by the kernel of layer norm, which returns means and 1/std too."""
    out, mean, inverse_std = torch.native_layer_norm(weight, weight.shape[1:], None, None, 0.0)
    root = (weight.numel() / weight.shape[0]) ** 0.5
    with torch.no_grad():
        low, high = torch.aminmax(inverse_std)
        offset = torch.linalg.vector_norm(mean * inverse_std, float("inf"))
    if not (root / _HIGH < low.item() and high.item() < root / _LOW and offset.item() < _MEAN_OVER_STD):
        return None
    if gain is not None:
        return out * (gain * (factor / root))
    return out if factor == root else out * (factor / root)


# -------------------------------------------------------------------------------------- exact evaluation
class _Parts(NamedTuple):
    unit: Tensor  # c / √(‖c‖² + d·eps), zero where that is 0/0
    inverse: Tensor  # 1 / √(‖c‖² + d·eps) of the prescaled unit, zero where that is 1/0
    scale: Tensor | None  # what the unit was multiplied by before


def _parts(weight: Tensor, formula: Formula) -> _Parts:
    wide = wide_dtype(weight.device)
    dims = [k for k in range(weight.ndim) if k != formula.dim]
    variance_eps = formula.eps * unit_size(weight, formula.dim)
    v, scale, added = weight.to(wide), None, torch.as_tensor(variance_eps, dtype=wide, device=weight.device)
    if weight.dtype == wide or wide != torch.float64:
        # The type has no headroom for squares: bring the largest entry to 1. A constant to autograd,
        # rightly so: the result does not depend on it.
        bound = 1e300 if wide == torch.float64 else 1e30
        largest = v.detach().abs().amax(dims, keepdim=True)
        if variance_eps:  # below √eps the eps rules, and must not overflow
            largest = largest.clamp(min=formula.eps**0.5)
        scale = largest.clamp(1 / bound, bound).reciprocal()
        v, added = v * scale, added * scale * scale
    if formula.center:
        # Less the first element first: units that are exactly constant come out as exactly zero.
        v = v - _first(v.detach(), dims)
        v = v - v.mean(dims, keepdim=True)
    square = (v * v).sum(dims, keepdim=True) + added
    nothing = square == 0
    inverse = torch.where(nothing, 0.0, torch.where(nothing, 1.0, square).rsqrt())
    return _Parts(v * inverse, inverse, scale)


def _first(v: Tensor, dims: list[int]) -> Tensor:
    for k in dims:
        v = v.narrow(k, 0, 1)
    return v


def exact_forward(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight, exactly at every scale and without a branch on data.

    Made of differentiable operations: ``torch.compile``, ``torch.func`` and forward-mode AD go through it.
    Arguments as for `normalize`.
    """
    unit = _parts(weight, formula).unit
    return (unit * _row_factor(unit, gain, formula)).to(weight.dtype)


def natural_gain(weight: Tensor, formula: Formula) -> Tensor:
    """Return the gain of each unit with which the formula gives c, the (centered) weight itself."""
    _, inverse, scale = _parts(weight.detach(), formula)
    norm = torch.where(inverse == 0, 0.0, inverse.reciprocal())
    norm = norm if scale is None else norm / scale
    gain = (norm / formula.factor).to(weight.dtype)
    return gain.reshape(()) if formula.dim is None else gain


def _row_factor(like: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | float:
    return formula.factor if gain is None else gain.to(like.dtype) * formula.factor


class _Exact(torch.autograd.Function):
    """`exact_forward`, keeping only its arguments for the backward pass (and not their float64 copies)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
        ctx.save_for_backward(weight, gain)
        ctx.formula = formula
        return exact_forward(weight, gain, formula)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        # The gradient less its parts along the unit (and along the ones), times r/√(‖c‖² + d·eps). Made of
        # differentiable operations, for gradient penalties.
        weight, gain = ctx.saved_tensors
        formula = ctx.formula
        unit, inverse, scale = _parts(weight, formula)
        dims = [k for k in range(weight.ndim) if k != formula.dim]
        gradient = gradients[0].to(unit.dtype)
        along = (gradient * unit).sum(dims, keepdim=True)
        to_weight = to_gain = None
        if ctx.needs_input_grad[0]:
            across = gradient - along * unit
            if formula.center:
                across = across - across.mean(dims, keepdim=True)
            step = inverse if scale is None else inverse * scale
            to_weight = (across * (step * _row_factor(unit, gain, formula))).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            to_gain = (along * formula.factor).reshape(gain.shape).to(gain.dtype)
        return to_weight, to_gain, None
