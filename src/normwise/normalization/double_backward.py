"""A right double backward for torch's kernel of weight normalisation.

The kernel's own takes the norms as constants and is wrong (torch 2.13, CPU). Gradients that will be
differentiated are replaced by `exact_backward`. Almost none will be, and on a small weight an ordinary hook
on the node, with its handle and with Python objects for all gradients, costs a fifth of the kernel. So a hook
on the incoming gradient alone, registered without a handle, looks at the mode, and registers the hook that
replaces only if a second derivative may be asked for. This takes private names of torch; where a version
lacks one, the ordinary hook does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from normwise.normalization.exact import Formula, exact_backward
from normwise.normalization.modes import (
    HAS_FUSED_WEIGHT_NORM,
    fused_weight_norm,
    transform_level,
)

__all__ = ["STATELESS", "mend"]

_ROWS = Formula(0, center=False, factor=1.0)
# Of a node in the graph.
_PRIVATE = ("_register_hook_dict", "_saved_v", "_saved_g", "metadata")


def mend(node: Any, weight: Tensor, gain: Tensor) -> None:
    """Have ``node``, of torch's kernel, give gradients that can be differentiated."""
    if STATELESS is None:
        node.register_hook(partial(_second_order, weight, gain))
    else:  # activation checkpointing lets a saved tensor be read once, and the node itself reads it
        node._register_hook_dict(_carrier(partial(_when_differentiated, weight, gain)))


def _when_differentiated(weight: Tensor, gain: Tensor, _: Tensor) -> None:
    """Hook on the gradient that enters the node: see to those that leave it, if need be."""
    if _may_be_differentiated():
        _replace_gradients(torch._C._current_autograd_node(), weight, gain)


def _when_differentiated_stateless(_: Tensor) -> None:
    """The same, with the weight and the gain that the node saved."""
    if is_grad_enabled() or transform_level() is not None:
        node: Any = torch._C._current_autograd_node()
        _replace_gradients(node, node._saved_v, node._saved_g)


def _replace_gradients(node: Any, weight: Tensor, gain: Tensor) -> None:
    if "normwise" not in node.metadata:  # it is there after an earlier pass over the same graph
        node.metadata["normwise"] = True
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
    return is_grad_enabled() or transform_level() is not None


def _carrier(hook: Callable[[Tensor], None]) -> Tensor:
    """Return what `_register_hook_dict` takes hooks from: a tensor."""
    carrier = torch.empty(0, device="cpu")
    carrier._backward_hooks = {0: hook}
    return carrier


def _hooks_without_a_handle_work() -> bool:
    """Whether this torch has what hooks without a handle take."""
    if not HAS_FUSED_WEIGHT_NORM:
        return False
    with torch.enable_grad():
        weight = torch.ones(1, 2, device="cpu", requires_grad=True)
        node = fused_weight_norm(weight, weight.new_ones(1, 1), 0)[0].grad_fn
    return all(hasattr(node, name) for name in _PRIVATE) and hasattr(torch._C, "_current_autograd_node")


# None where they do not.
STATELESS = _carrier(_when_differentiated_stateless) if _hooks_without_a_handle_work() else None
