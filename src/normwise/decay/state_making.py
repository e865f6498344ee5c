"""Steps that train nothing: ``torch.distributed.checkpoint`` takes one to make the state of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.collectives import sum_over
from normwise.sharding import local_tensor, meshes_of

__all__ = ["only_makes_state"]


def only_makes_state(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a step would train nothing: there is no state yet, and all rates and gradients are zero.

    That step is ``optimizer.step(closure=None)``; a plain ``optimizer.step()`` always counts.

    ``torch.distributed.checkpoint`` takes such a step where it needs the tensors of an optimizer's state
    before the first one, to save or to load them. A rule that acted on it would move weights that may have
    been loaded already.

    With sharded parameters all ranks must call this together. If the rates are zero and there is no state,
    it takes one reduction of a number per mesh, as a rank's part of the gradients can be zero by chance.

    Args:
        optimizer: The optimizer.
        args: What its step is called with, as its pre-hooks get it: the first is the optimizer.
        kwargs: What its step is called with by name.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.9)
        >>> weight.grad = torch.zeros(2)
        >>> only_makes_state(optimizer, (optimizer,), {"closure": None})
        True
        >>> weight.grad = torch.ones(2)
        >>> only_makes_state(optimizer, (optimizer,), {"closure": None})
        False
    """
    closures = [*args[1:], *kwargs.values()]
    if not closures or any(closure is not None for closure in closures):
        return False
    if optimizer.state or not all(_is_zero(group.get("lr")) for group in optimizer.param_groups):
        return False
    params = [param for group in optimizer.param_groups for param in group["params"]]
    gradients = [local_tensor(param.grad) for param in params if param.grad is not None]
    moving = torch.tensor([float(any(g.is_sparse or bool(g.any()) for g in gradients))])
    for mesh in meshes_of(params):
        moving = sum_over(mesh, moving)
    return not bool(moving)


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):  # reading one elsewhere would wait for the device at each step
        return rate.device.type == "cpu" and not bool(rate)
    return bool(rate == 0)
