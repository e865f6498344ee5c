"""The fastest evaluation of the family that is exact for the weight at hand.

On a CPU torch's fused kernels run first. They return the statistics of each unit as a by-product, and a look
at those few numbers tells whether the result is exact. If it is not, they run on units that were brought to
a largest entry of about 1; if that does not help either, `exact_forward` does. On an accelerator such a look
would wait for the device, and under ``torch.compile`` and ``torch.func`` it cannot be had: there
`exact_forward` runs always.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normwise.normalization.exact import Formula, exact_backward, exact_forward

__all__ = ["normalize"]

# Norms between which float32 squares, and the products of weights and gradients in the backward pass
# (gradients of 1e-28 to 1e28), neither overflow nor lose digits. The backward pass of layer norm multiplies
# by 1/std³.
_LOW, _HIGH = 1e-8, 1e8
_LOW_STD, _HIGH_STD = 1e-4, 1e4
# |mean|/std up to which the fused layer norm, which expands (v − mean)/std, loses at most about two bits.
# For the half types it keeps mean and std themselves in half.
_MEAN_OVER_STD, _MEAN_OVER_STD_HALF = 4.0, 1.0
# The fused weight norm adds float32 squares in sequence: the error of longer rows exceeds a few ULP.
_LONGEST_ROW = 16384
_PLAIN = (Tensor, torch.nn.Parameter)


def normalize(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor:
    """Return the normalised weight. Arguments as for `exact_forward`."""
    if torch.compiler.is_compiling() or is_transformed():
        return exact_forward(weight, gain, formula)
    # May Python look at values at no cost? On a CPU and with nothing recording operations.
    if (
        type(weight) in _PLAIN
        and weight.is_cpu
        and not formula.eps
        and weight.numel()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    ):
        out = _fused(weight, gain, formula)
        if out is not None:
            return out
    exact: Tensor = _Exact.apply(weight, gain, formula)
    return exact


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they differentiate the formula themselves."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# ----------------------------------------------------------------------------------------- fused kernels
def _fused(weight: Tensor, gain: Tensor | None, formula: Formula) -> Tensor | None:
    """Return what torch's fused kernels give, with the units as rows, or None where they are not exact."""
    dim, center = formula.dim, formula.center
    if (gain is not None and gain.dtype is not weight.dtype) or not (center or formula.factor == 1):
        return None
    if dim == 0:
        rows = weight
    else:
        rows = weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0)
        gain = None if gain is None else gain.reshape([-1] + [1] * (rows.ndim - 1))
    out = _fused_centered(rows, gain, formula.factor) if center else _fused_plain(rows, gain)
    if out is None and (brought := _bring_to_one(rows, gain, center)) is not None:
        out = _fused_centered(*brought, formula.factor) if center else _fused_plain(*brought)
    if out is None or dim == 0:
        return out
    return out.reshape(weight.shape) if dim is None else out.movedim(0, dim).contiguous()


def _fused_plain(weight: Tensor, gain: Tensor | None) -> Tensor | None:
    """Weight normalisation of rows by torch's own kernel."""
    g = weight.new_ones([weight.shape[0]] + [1] * (weight.ndim - 1)) if gain is None else gain.contiguous()
    out: Tensor
    if weight.numel() > _LONGEST_ROW * g.numel():
        if weight.dtype.itemsize == 2:
            return None
        square = (weight * weight).sum(list(range(1, weight.ndim)), keepdim=True)
        out, norms = weight * (g * square.rsqrt()), square.detach().sqrt()
    else:
        out, norms = torch._weight_norm_interface(weight.contiguous(), g, 0)
        if (node := out.grad_fn) is not None:
            _mend_second_order(node, weight, g)
    low, high = torch.aminmax(norms)
    return out if low.item() > _LOW and high.item() < _HIGH else None


# ----------------------------------------------------- the double backward of torch's weight norm kernel
# It takes the norms as constants and is wrong (torch 2.13, CPU). Gradients that will be differentiated are
# replaced by `exact_backward`. Almost none will be, and on a small weight an ordinary hook, with its handle
# and with Python objects for all gradients, costs a fifth of the kernel. So a hook on the incoming gradient
# alone, registered without a handle, looks at the mode; only if needed does it register the replacement.
_ROWS = Formula(0, center=False, factor=1.0)


def _mend_second_order(node: Any, weight: Tensor, gain: Tensor) -> None:
    """Have ``node``, of torch's kernel, give gradients that can be differentiated."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        node._register_hook_dict(_STATELESS)
    else:  # activation checkpointing lets a saved tensor be read once, and the node itself reads it
        node._register_hook_dict(_carrier(weight, gain))


def _when_differentiated(weight: Tensor | None, gain: Tensor | None, _: Tensor) -> None:
    """Hook on the gradient that enters the node: see to those that leave it, if need be."""
    if not _may_be_differentiated():
        return
    node: Any = torch._C._current_autograd_node()
    if "normwise" not in node.metadata:  # in an earlier pass over the same graph
        node.metadata["normwise"] = True
        weight, gain = (node._saved_v, node._saved_g) if weight is None else (weight, gain)
        node.register_hook(partial(_second_order, weight, gain))


def _second_order(
    weight: Tensor,
    gain: Tensor,
    gradients_in: tuple[Tensor | None, ...],
    gradients_out: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...] | None:
    """Hook on the node: return what replaces its gradients."""
    if not _may_be_differentiated():
        return None
    exact = exact_backward(gradients_out[0], weight, gain, _ROWS)
    return tuple(None if old is None else new for old, new in zip(gradients_in, exact, strict=True))


def _may_be_differentiated() -> bool:
    return torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None


def _carrier(weight: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return what `_register_hook_dict` takes hooks from: a tensor."""
    carrier = torch.empty(0, device="cpu")
    carrier._backward_hooks = {0: partial(_when_differentiated, weight, gain)}  # type: ignore[assignment]
    return carrier


_STATELESS = _carrier(None, None)


# -------------------------------------------------------------------------------- the kernel of layer norm
def _fused_centered(weight: Tensor, gain: Tensor | None, factor: float) -> Tensor | None:
    """The centered members of rows by the kernel of layer norm."""
    root = math.sqrt(weight.numel() / weight.shape[0])
    out: Tensor
    out, mean, inverse_std = torch.native_layer_norm(weight, weight.shape[1:], None, None, 0.0)
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
