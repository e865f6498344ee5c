"""What trainers wrap around optimizers and schedulers, taken off.

Lightning, Fabric and Accelerate hand out objects that look like the optimizer and have none of its hooks.
This module imports none of them: such an object says that it is an Optimizer, was never initialised as one,
and holds the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["FirstGroups", "UnwrappedSchedule", "unwrapped", "unwrapped_schedule"]

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


class FirstGroups(Optimizer):
    """An optimizer as a scheduler sees it that was built before some groups were split.

    It shows the groups that there were. The parts that were split off are the last groups of the optimizer,
    and :meth:`pass_on` gives them what the scheduler has set in the groups that they come from.

    Args:
        optimizer: The optimizer, or what a trainer has wrapped around it.
        parents: For each of the last groups, the index of the group that it comes from.
    """

    _SCHEDULED = ("lr", "momentum", "betas")

    def __init__(self, optimizer: Any, parents: Sequence[int]) -> None:  # not that of Optimizer: it is none
        self.optimizer = optimizer
        self.parents = list(parents)

    def __getattr__(self, name: str) -> Any:
        if name == "param_groups":
            self.pass_on()  # schedulers read what they have set at the end of their step
            groups = self.optimizer.param_groups
            return groups[: len(groups) - len(self.parents)]
        if name in ("optimizer", "parents"):  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def step(self) -> Any:
        """That of the optimizer, which schedulers mark."""
        return self.optimizer.step

    def pass_on(self, *_: object) -> None:
        """Set in the last groups what is set in the groups that they come from."""
        groups = self.optimizer.param_groups
        for group, parent in zip(groups[len(groups) - len(self.parents) :], self.parents, strict=True):
            for name in self._SCHEDULED:
                value = groups[parent].get(name)
                if isinstance(group.get(name), Tensor) and isinstance(value, Tensor):
                    group[name].copy_(value)
                elif value is not None:
                    group[name] = value

    def of(self, optimizer: Any) -> FirstGroups:
        """Return another optimizer with the same groups, seen alike."""
        return FirstGroups(optimizer, self.parents)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"FirstGroups({self.optimizer!r})"


def _number_of_processes() -> int:
    from accelerate.state import AcceleratorState  # it made the wrapper, so it is there

    return int(AcceleratorState().num_processes)
