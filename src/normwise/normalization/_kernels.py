"""The fastest evaluation of the family that is exact for the weight at hand.

On a CPU, torch's fused kernels run first. They also return the statistics of each unit, which tell whether
the result is exact. If not, the kernels run again on units scaled to a largest entry of about 1. If that does
not help either, `exact_forward` takes over. On an accelerator, reading the statistics would synchronise, and
under ``torch.compile`` and ``torch.func`` they have no values: there `exact_forward` always runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from normwise.normalization._exact import Formula, exact_backward, exact_forward

__all__ = ["has_readable_values", "is_transformed", "normalize"]

try:  # torch tells these by private names only
    from torch import _weight_norm_interface  # (weight, gain, 0) -> (result, norms)
    from torch._C import (
        _are_functorch_transforms_active,
        _current_autograd_node,
        _is_tracing,
        _len_torch_dispatch_stack,
    )

    _node: Any = _weight_norm_interface(torch.ones(1, 2, requires_grad=True), torch.ones(1, 1), 0)[0].grad_fn
    _HAS_PRIVATE_NAMES = hasattr(forward_ad, "_current_level") and all(
        hasattr(_node, name) for name in ("_register_hook_dict", "_saved_v", "_saved_g", "metadata")
    )
    del _node
except ImportError:  # then `exact_forward` evaluates everything: the same results, slower
    _HAS_PRIVATE_NAMES = False
# Whether saved tensors have hooks. Before torch 2.7 it does not tell; that they have is the safe answer.
_hooks_on_saved_tensors: Callable[[bool], object] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True
)


def _has_kernel(dtype: torch.dtype) -> bool:
    try:
        _weight_norm_interface(torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype), 0)
    except (NameError, RuntimeError):
        return False
    return True


# Before torch 2.8 the kernel of weight norm takes no float16 on the CPU, and before 2.5 no bfloat16 either.
_HALF_KERNELS = {dtype for dtype in (torch.float16, torch.bfloat16) if _has_kernel(dtype)}

# Between these norms, float32 squares and the products of weights and gradients in the backward pass
# (gradients of 1e-28 to 1e28) neither overflow nor lose digits. The backward pass of layer norm multiplies by
# 1/std³, so its range is narrower.
_LOW, _HIGH = 1e-8, 1e8
_LOW_STD, _HIGH_STD = 1e-4, 1e4
# The fused layer norm expands (v − mean)/std. Up to this |mean|/std it loses at most about two bits.
_MEAN_OVER_STD = 4.0
# The fused weight norm sums float32 squares sequentially: on longer rows its error exceeds a few ULP.
_LONGEST_ROW = 16384
_PLAIN = (Tensor, torch.nn.Parameter)
_ROWS = Formula(0, center=False, factor=1.0)


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode AD is active: they differentiate the formula themselves."""
    return not _HAS_PRIVATE_NAMES or _are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_readable_values(tensor: Tensor) -> bool:
    """Return whether reading values of ``tensor`` is free: it is on a CPU and nothing records operations."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and _HAS_PRIVATE_NAMES
        and not _len_torch_dispatch_stack()
        and not _is_tracing()
    )


def normalize(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight. Arguments as for `exact_forward`."""
    # `is_transformed` is written out here: on a small weight each microsecond is 1 % of the kernel.
    if (
        is_compiling()
        or not _HAS_PRIVATE_NAMES
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return exact_forward(weight, gain, formula)
    if has_readable_values(weight) and weight.numel():  # torch's kernel would divide by 0 and end the process
        out = _fused(weight, gain, formula)
        if out is not None:
            return out
    exact: Tensor = _Exact.apply(weight, gain, formula)
    return exact


class _Exact(torch.autograd.Function):
    """`exact_forward`, saving only its arguments for the backward pass, not their float64 copies."""

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


# ----------------------------------------------------------------------------------------- fused kernels
def _fused(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | None:
    """Return the normalised weight by torch's fused kernels, or None where they are not exact."""
    dim, center, factor, eps = formula
    if eps or not (center or factor == 1) or not (gain is None or gain.dtype is weight.dtype):
        return None
    rows = weight
    if dim != 0:
        rows = weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0)
        gain = None if gain is None else gain.reshape([-1] + [1] * (rows.ndim - 1))
    if weight.dtype.itemsize == 2 and (
        center or weight.dtype not in _HALF_KERNELS or weight.numel() > _LONGEST_ROW * len(rows)
    ):
        # The kernel of layer norm would round mean and std to half precision.
        out = _fused(rows.float(), None if gain is None else gain.float(), formula._replace(dim=0))
        out = None if out is None else out.to(weight.dtype)
    else:
        kernel = _layer_norm if center else _weight_norm
        out = kernel(rows, gain, factor)
        if out is None:
            scaled = _scale_to_one(rows, gain, center)
            out = None if scaled is None else kernel(*scaled, factor)
    if out is None or dim == 0:
        return out
    return out.reshape(weight.shape) if dim is None else out.movedim(0, dim).contiguous()


def _weight_norm(rows: Tensor, gain: Tensor | None, _: float) -> Tensor | None:
    """Return gain·v/‖v‖ of rows by the kernel of weight norm, or None where it is not exact."""
    g = rows.new_ones([len(rows)] + [1] * (rows.ndim - 1)) if gain is None else gain.contiguous()
    out: Tensor
    if rows.numel() > _LONGEST_ROW * g.numel():
        square = (rows * rows).sum(list(range(1, rows.ndim)), keepdim=True)
        out, norms = rows * (g * square.rsqrt()), square.detach().sqrt()
    else:
        out, norms = _weight_norm_interface(rows.contiguous(), g, 0)
        if (node := out.grad_fn) is not None:
            if _hooks_on_saved_tensors(True) is None:
                node._register_hook_dict(_HOOK_CARRIER)
            else:  # activation checkpointing: a saved tensor may be read once, and the node itself reads it
                node.register_hook(partial(_replace_gradients, rows, g))
    low, high = torch.aminmax(norms)
    return out if low.item() > _LOW and high.item() < _HIGH else None


def _layer_norm(rows: Tensor, gain: Tensor | None, factor: float) -> Tensor | None:
    """Return gain·factor·c/‖c‖ of rows by the kernel of layer norm, or None where it is not exact."""
    root = math.sqrt(rows.numel() / len(rows))
    out: Tensor
    out, mean, inverse_std = torch.native_layer_norm(rows, rows.shape[1:], None, None, 0.0)
    low, high = (bound.item() for bound in torch.aminmax(inverse_std))
    if not (low > 1 / _HIGH_STD and high < 1 / _LOW_STD) or not (gain is None or _is_ordinary(gain)):
        return None
    low_mean, high_mean = torch.aminmax(mean)
    # The bound over all rows comes first: it needs no further operation and almost always suffices.
    near = max(high_mean.item(), -low_mean.item()) * high < _MEAN_OVER_STD
    if not (near or (mean * inverse_std).abs().max().item() < _MEAN_OVER_STD):
        return None
    if gain is None and factor == root:
        return out
    return out * (factor / root if gain is None else gain * (factor / root))


def _is_ordinary(gain: Tensor) -> bool:
    """Return whether every gain is 0 or far from the limits of float32."""
    size = gain.detach().abs()
    low, high = torch.aminmax(size)
    return high.item() < _HIGH and (low.item() > _LOW or bool(((size > _LOW) | (size == 0)).all()))


def _scale_to_one(rows: Tensor, gain: Tensor | None, center: bool) -> tuple[Tensor, Tensor] | None:
    """Return rows of the same directions with a largest entry of about 1, and gains for them.

    Rows are multiplied by powers of two, which is exact. Rows to be centered lose their first entry before.
    A row without a direction is replaced by one with a direction and a gain of 0, so that it gives zeros and
    receives a zero gradient. Return None where this does not help: gains or entries span too large a range.
    """
    like_rows = [-1] + [1] * (rows.ndim - 1)
    with torch.no_grad():
        flat = rows.flatten(1)
        first = flat[:, :1] if center else flat.new_zeros(())
        largest = torch.maximum(flat.amax(1, keepdim=True) - first, first - flat.amin(1, keepdim=True))
        if not (bool(largest.isfinite().all()) and (gain is None or _is_ordinary(gain))):
            return None
        most = int(math.log2(torch.finfo(rows.dtype).max)) - 1
        exponent = torch.frexp(largest).exponent.clamp(-most, most)
        scale = torch.ldexp(torch.ones_like(largest), -exponent).reshape(like_rows)
        undirected = largest == 0
    scaled = (rows - first.reshape(like_rows) if center else rows) * scale
    directed = (~undirected).to(rows.dtype).reshape(like_rows)
    if bool(undirected.any()):
        with torch.no_grad():  # to autograd, adding a constant is the identity
            scaled.flatten(1)[:, -1:].add_(undirected)
    return scaled, directed if gain is None else gain * directed


# --------------------------------------------------------------------------------------- double backward
# The double backward of torch's kernel of weight normalisation is wrong: it takes the norms as constants
# (torch 2.13, CPU). Gradients that will be differentiated again are therefore replaced by `exact_backward`.
# An ordinary hook for that would cost a small weight a fifth of the kernel's time. The hook below has no
# handle, sees the incoming gradient only, and does nothing unless a second derivative is possible.
def _before_backward(_: Tensor) -> None:
    """Hook on the gradient that enters the kernel's node."""
    if _may_be_differentiated():
        node: Any = _current_autograd_node()
        if "normwise" not in node.metadata:  # an earlier pass over the same graph may have done it
            node.metadata["normwise"] = True
            node.register_hook(partial(_replace_gradients, node._saved_v, node._saved_g))


def _replace_gradients(
    weight: Tensor,
    gain: Tensor,
    gradients_in: tuple[Tensor | None, ...],
    gradients_out: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...] | None:
    """Hook on the kernel's node: return gradients that can be differentiated in place of the kernel's."""
    if not _may_be_differentiated():
        return None
    exact = exact_backward(gradients_out[0], weight, gain, _ROWS)
    return tuple(None if old is None else new for old, new in zip(gradients_in, exact, strict=True))


def _may_be_differentiated() -> bool:
    return is_grad_enabled() or _are_functorch_transforms_active()


# `_register_hook_dict` takes its hooks from a tensor.
_HOOK_CARRIER = torch.empty(0, device="cpu")
_HOOK_CARRIER._backward_hooks = {0: _before_backward}
