"""The fastest evaluation of the family that is exact for the weight at hand.

On a CPU torch's fused kernels run first. They return the statistics of each unit as a by-product, and a look
at those few numbers tells whether the result is exact. If it is not, they run on units that were brought to
a largest entry of about 1; if that does not help either, `exact_forward` does. On an accelerator such a look
would wait for the device, and under ``torch.compile`` and ``torch.func`` it cannot be had: there
`exact_forward` runs always.
"""

from __future__ import annotations

import math
import sys
from ctypes import Array, c_char
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from normwise.normalization.double_backward import STATELESS, mend
from normwise.normalization.exact import Formula, exact_backward, exact_forward
from normwise.normalization.modes import (
    HAS_FUSED_WEIGHT_NORM,
    dispatch_modes,
    fused_weight_norm,
    is_traced,
    saved_tensors_hooks,
    transform_level,
)

__all__ = ["normalize"]

# Norms between which float32 squares, and the products of weights and gradients in the backward pass
# (gradients of 1e-28 to 1e28), neither overflow nor lose digits. The backward pass of layer norm multiplies
# by 1/std³.
_LOW, _HIGH = 1e-8, 1e8
_LOW_STD, _HIGH_STD = 1e-4, 1e4
# The highest byte of a float32, sign and all of the exponent but its last bit, is k from 2^(2k−127) up to
# 2^(2k−125): so these are within the above.
_ORDINARY_BYTES = bytes(range((127 - 25) // 2, (127 + 25) // 2))
_ORDINARY_STD_BYTES = bytes(range((127 - 13) // 2, (127 + 13) // 2))
_HIGHEST_BYTES = slice(3 if sys.byteorder == "little" else 0, None, 4)
# |mean|/std up to which the fused layer norm, which expands (v − mean)/std, loses at most about two bits.
# For the half types it keeps mean and std themselves in half.
_MEAN_OVER_STD, _MEAN_OVER_STD_HALF = 4.0, 1.0
# The fused weight norm adds float32 squares in sequence: the error of longer rows exceeds a few ULP.
_LONGEST_ROW = 16384
_PLAIN = (Tensor, torch.nn.Parameter)
_ROWS = Formula(0, center=False, factor=1.0)


def normalize(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight. Arguments as for `exact_forward`."""
    # Written flat, `is_transformed` too: on a small weight each microsecond is 3 % of the kernel.
    if is_compiling() or transform_level() is not None or forward_ad._current_level >= 0:
        return exact_forward(weight, gain, formula)
    # May Python look at values at no cost? On a CPU and with nothing recording operations.
    # (Of an empty weight torch's kernel divides by 0 and ends the process.)
    if (
        type(weight) in _PLAIN
        and weight.is_cpu
        and weight.numel()
        and not dispatch_modes()
        and not is_traced()
    ):
        if formula == _ROWS and gain is not None and gain.dtype is weight.dtype:
            out = _fused_plain(weight, gain)
            if out is None:
                out = _fused_brought(weight, gain, formula)
        else:
            out = _fused(weight, gain, formula)
        if out is not None:
            return out
    exact: Tensor = _Exact.apply(weight, gain, formula)
    return exact


# ----------------------------------------------------------------------------------------- fused kernels
def _fused(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | None:
    """Return what torch's fused kernels give, with the units as rows, or None where they are not exact."""
    dim, center = formula.dim, formula.center
    if gain is not None and gain.dtype is not weight.dtype:
        return None
    if formula.eps or not (center or formula.factor == 1):
        return None
    if dim == 0:
        rows = weight
    else:
        rows = weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0)
        gain = None if gain is None else gain.reshape([-1] + [1] * (rows.ndim - 1))
    out = _fused_centered(rows, gain, formula.factor) if center else _fused_plain(rows, gain)
    if out is None:
        out = _fused_brought(rows, gain, formula)
    if out is None or dim == 0:
        return out
    return out.reshape(weight.shape) if dim is None else out.movedim(0, dim).contiguous()


def _fused_brought(rows: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | None:
    """Return what the kernels give for rows that were brought to about 1, or None where that is not exact."""
    brought = _bring_to_one(rows, gain, formula.center)
    if brought is None:
        return None
    return _fused_centered(*brought, formula.factor) if formula.center else _fused_plain(*brought)


def _fused_plain(weight: Tensor, gain: Tensor | None) -> Tensor | None:
    """Weight normalisation of rows by torch's own kernel."""
    g = weight.new_ones([weight.shape[0]] + [1] * (weight.ndim - 1)) if gain is None else gain.contiguous()
    out: Tensor
    if weight.numel() > _LONGEST_ROW * g.numel() or not HAS_FUSED_WEIGHT_NORM:
        if weight.dtype.itemsize == 2:
            return None
        square = (weight * weight).sum(list(range(1, weight.ndim)), keepdim=True)
        out, norms = weight * (g * square.rsqrt()), square.detach().sqrt()
    else:
        out, norms = fused_weight_norm(weight.contiguous(), g, 0)
        if (node := out.grad_fn) is not None:
            if STATELESS is not None and saved_tensors_hooks(True) is None:
                node._register_hook_dict(STATELESS)  # what `mend` does, without the call
            else:
                mend(node, weight, g)
        if norms.dtype is torch.float32:
            # What is left without the ordinary ones; in a quarter of the time of the comparison below.
            return None if _highest_bytes(norms).translate(None, _ORDINARY_BYTES) else out
    low, high = torch.aminmax(norms)
    return out if low.item() > _LOW and high.item() < _HIGH else None


# -------------------------------------------------------------------------------- the kernel of layer norm
def _fused_centered(weight: Tensor, gain: Tensor | None, factor: float) -> Tensor | None:
    """The centered members of rows by the kernel of layer norm."""
    root = math.sqrt(weight.numel() / weight.shape[0])
    out: Tensor
    out, mean, inverse_std = torch.native_layer_norm(weight, weight.shape[1:], None, None, 0.0)
    if gain is None and factor == root and mean.dtype is torch.float32 and _ordinary_rows(mean, inverse_std):
        return out
    low, high = (extreme.item() for extreme in torch.aminmax(inverse_std))
    if not (low > 1 / _HIGH_STD and high < 1 / _LOW_STD) or not (gain is None or _ordinary(gain)):
        return None
    furthest = _MEAN_OVER_STD_HALF if weight.dtype.itemsize == 2 else _MEAN_OVER_STD
    low_mean, high_mean = torch.aminmax(mean)
    # The bound over all rows first: it needs no further operation, and almost always suffices.
    near = max(high_mean.item(), -low_mean.item()) * high < furthest
    if not (near or (mean * inverse_std).abs().max().item() < furthest):
        return None
    if gain is None and factor == root:
        return out
    scaled: Tensor = out * (factor / root if gain is None else gain * (factor / root))
    return scaled


def _ordinary_rows(mean: Tensor, inverse_std: Tensor) -> bool:
    """Whether the highest bytes of float32 statistics tell that all rows are ordinary, with means near 0."""
    inverse = _highest_bytes(inverse_std)
    if inverse.translate(None, _ORDINARY_STD_BYTES):
        return False
    largest = next(k for k in reversed(_ORDINARY_STD_BYTES) if k in inverse)
    return not _highest_bytes(mean).translate(None, _near_zero(largest))


@cache
def _near_zero(inverse_std: int) -> bytes:
    """Return the highest bytes of all means of which |mean|/std is below the bound for float32.

    Args:
        inverse_std: The highest byte of 1/std.
    """
    end = 127 - inverse_std  # 2^(2k−125) · 2^(2·inverse_std−125) is the bound, 2^2, with k = end − 1
    return bytes([*range(end), *range(128, 128 + end)])


@cache
def _characters(count: int) -> type[Array[c_char]]:
    return c_char * count


def _highest_bytes(values: Tensor) -> bytes:
    """Return the highest byte of each float32 of a contiguous tensor on the CPU: the fastest look at many."""
    return _characters(values.nbytes).from_address(values.data_ptr()).raw[_HIGHEST_BYTES]


def _ordinary(gain: Tensor) -> bool:
    """Whether no gain comes near the limits of the type; gains of 0 do not."""
    size = gain.detach().abs()
    low, high = torch.aminmax(size)
    return high.item() < _HIGH and (low.item() > _LOW or bool(((size > _LOW) | (size == 0)).all()))


def _bring_to_one(weight: Tensor, gain: Tensor | None, center: bool) -> tuple[Tensor, Tensor] | None:
    """Return rows with a largest entry of about 1 that have the same directions, and gains for them.

    Rows are multiplied by powers of two, which is exact; to be centered, they lose their first entry before.
    Rows without a direction become rows with one and a gain of 0, so that they give zeros and get a zero
    gradient. None where that does not help: the range of the gains or of the entries is too large.
    """
    if center and weight.dtype.itemsize == 2:  # the difference to the first entry would be rounded to half
        return None
    like_rows = [-1] + [1] * (weight.ndim - 1)
    with torch.no_grad():
        rows = weight.flatten(1)
        first = rows[:, :1] if center else rows.new_zeros(())
        largest = torch.maximum(rows.amax(1, keepdim=True) - first, first - rows.amin(1, keepdim=True))
        most = int(math.log2(torch.finfo(weight.dtype).max)) - 1
        exponent = torch.frexp(largest).exponent.clamp(-most, most)
        scale = torch.ldexp(torch.ones_like(largest), -exponent).reshape(like_rows)
        nothing = largest == 0
        if not (bool(largest.isfinite().all()) and (gain is None or _ordinary(gain))):
            return None
    brought = (weight - first.reshape(like_rows) if center else weight) * scale
    keep = (~nothing).to(weight.dtype).reshape(like_rows)
    if bool(nothing.any()):
        with torch.no_grad():  # adding a constant is nothing to autograd
            brought.flatten(1)[:, -1:].add_(nothing)
    return brought, keep if gain is None else gain * keep


# -------------------------------------------------------------------------------------- exact evaluation
class _Exact(torch.autograd.Function):
    """`exact_forward`, keeping only its arguments for the backward pass (and not their float64 copies)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
        ctx.save_for_backward(weight, gain)
        ctx.formula = formula
        return exact_forward(weight, gain, formula)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        weight, gain = ctx.saved_tensors
        to_weight, to_gain = exact_backward(gradients[0], weight, gain, ctx.formula)
        return to_weight, to_gain, None
