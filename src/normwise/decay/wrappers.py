"""What trainers wrap around optimizers and schedulers, taken off.

Lightning, Fabric and Accelerate hand out objects that look like the optimizer and have none of its hooks.
This module imports none of them: such an object says that it is an Optimizer, was never initialised as one,
and holds the real one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer

__all__ = ["UnwrappedSchedule", "unwrapped", "unwrapped_schedule"]

_HOLDERS = ("optimizer", "_optimizer")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that a trainer has wrapped, or what is given if it is not wrapped.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> unwrapped(optimizer) is optimizer
        True
    """
    while isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" not in vars(optimizer):
        held = [vars(optimizer).get(name) for name in _HOLDERS]
        inner = next((candidate for candidate in held if isinstance(candidate, Optimizer)), None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


class UnwrappedSchedule(NamedTuple):
    """A learning-rate schedule as it is stepped.

    Attributes:
        scheduler: The scheduler, without a wrapper.
        steps: How often it steps when ``step()`` of what was given is called once.
    """

    scheduler: Any
    steps: int = 1


def unwrapped_schedule(scheduler: Any) -> UnwrappedSchedule:
    """Return the scheduler that a trainer has wrapped, and how often it steps for one call.

    Accelerate's wrapper steps once per process, unless the batches are split among processes.
    """
    inner = vars(scheduler).get("scheduler") if hasattr(scheduler, "__dict__") else None
    if not hasattr(inner, "step") or not hasattr(scheduler, "step_with_optimizer"):
        return UnwrappedSchedule(scheduler)
    if not scheduler.step_with_optimizer or scheduler.split_batches:
        return UnwrappedSchedule(inner)
    return UnwrappedSchedule(inner, _number_of_processes())


def _number_of_processes() -> int:
    from accelerate.state import AcceleratorState  # it made the wrapper, so it is there

    return int(AcceleratorState().num_processes)
