"""What torch is doing at the moment: whether Python may look at values, and who will read them.

Much of that torch tells by private names only. Where a version of torch lacks one, the answer here is the one
that leads to public operations alone: right, and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "HAS_FUSED_WEIGHT_NORM",
    "dispatch_modes",
    "fused_weight_norm",
    "is_traced",
    "is_transformed",
    "saved_tensors_hooks",
    "transform_level",
]


def _always(*_: Any) -> Any:
    return 1


# The depth of torch.func's transforms, or None outside of them.
transform_level: Callable[[], int | None] = getattr(torch._C._functorch, "maybe_current_level", _always)
if not hasattr(forward_ad, "_current_level"):  # read by `is_transformed`
    transform_level = _always
# How many modes (fake tensors, recorders) see each operation.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _always)
# Whether torch.jit.trace records.
is_traced: Callable[[], bool] = getattr(torch._C, "_is_tracing", _always)
# The hooks on tensors saved for backward (activation checkpointing has some), or None.
saved_tensors_hooks: Callable[[bool], object] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", _always
)
# torch's kernel of weight normalisation: (weight, gain, 0) to (result, norms).
HAS_FUSED_WEIGHT_NORM = hasattr(torch, "_weight_norm_interface")
fused_weight_norm: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = getattr(
    torch, "_weight_norm_interface", _always
)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they differentiate the formula themselves."""
    return transform_level() is not None or forward_ad._current_level >= 0
