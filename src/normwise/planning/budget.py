"""How much time a training has: the learning rates of a schedule, summed on a copy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from normwise.decay.rules import checked
from normwise.decay.wrappers import FirstGroups, unwrapped, unwrapped_schedule

__all__ = ["Budget", "budgets_of", "has_begun", "simulated_budgets"]


@dataclass(frozen=True)
class Budget:
    """The learning rates to come for one param_group.

    Attributes:
        time: Σ lr.
        squares: Σ lr².
        peak: The largest lr.
    """

    time: float
    squares: float
    peak: float


def budgets_of(
    optimizer: Optimizer,
    total_time: float | None,
    scheduler: LRScheduler | None,
    total_steps: int | None,
    interval: int | Callable[[int], int],
) -> tuple[list[Budget], str]:
    """Return the budget of each param_group, and in words where it comes from.

    Args:
        optimizer: The optimizer.
        total_time: Σ lr, if it is known; Σ lr² is then that of a constant rate.
        scheduler: A schedule to simulate instead.
        total_steps: The number of steps to come; without a ``scheduler``, at the present rate.
        interval: The number of optimizer steps per ``scheduler.step()``; or a function of the number of
            optimizer steps taken, which says how often ``scheduler.step()`` follows.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The budget is missing or given twice, or the schedule cannot be simulated.
    """
    intervals = () if callable(interval) else (("scheduler_interval", interval),)
    for name, value in (("total_steps", total_steps), *intervals):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed: give at least 1")
    for k, group in enumerate(optimizer.param_groups):
        if not isinstance(group.get("lr"), (Real, Tensor)):
            raise ValueError(
                f"param_groups[{k}] of {type(optimizer).__name__} has lr={group.get('lr')}, so the time of a "
                'step is unknown: give the optimizer a learning rate, or use nw.Decay with clock="step"'
            )
    if total_time is not None:
        if scheduler is not None or total_steps is not None:
            raise ValueError(
                "total_time is given beside scheduler or total_steps: give only the time, or only these"
            )
        time = checked("total_time", total_time, positive=True)
        # A warm-up lowers the present rate, so take the initial one where a scheduler has noted it.
        rates = [max(float(g["lr"]), float(g.get("initial_lr", 0.0))) for g in optimizer.param_groups]
        return [Budget(time, time * rate, rate) for rate in rates], "as given"
    if total_steps is None:
        raise ValueError(
            "the budget is missing: give scheduler= and total_steps=, or total_steps= alone for a constant "
            "rate, or total_time=Σlr"
        )
    _warn_if_begun(optimizer, scheduler)
    if scheduler is None:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        budgets = [Budget(rate * total_steps, rate * rate * total_steps, rate) for rate in rates]
        return budgets, f"over {total_steps} steps at the present rate"
    budgets = simulated_budgets(optimizer, scheduler, total_steps, interval)
    return budgets, f"over {total_steps} steps of {type(scheduler).__name__}, simulated on a copy"


def has_begun(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has stepped."""
    # Adagrad's state has step 0 before the first step; the state of others is empty.
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state)


def _warn_if_begun(optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Warn if the optimizer or the scheduler has stepped, as after loading a checkpoint."""
    begun = []
    if has_begun(optimizer):
        begun.append("the optimizer has stepped")
    if getattr(scheduler, "last_epoch", 0) > 0:
        begun.append(f"the scheduler is at step {scheduler.last_epoch}")  # type: ignore[union-attr]
    if begun:
        warnings.warn(
            f"{' and '.join(begun)} already, so the coefficient is that of a training which begins now. To "
            "resume, attach before you load the states of optimizer, scheduler and decay; to begin here, "
            "give total_time=",
            stacklevel=4,
        )


def simulated_budgets(
    optimizer: Optimizer,
    scheduler: LRScheduler,
    total_steps: int,
    interval: int | Callable[[int], int],
) -> list[Budget]:
    """Return the budget of each param_group for ``total_steps`` optimizer steps from now on.

    A copy of the scheduler drives a stand-in for the optimizer, so both stay as they are.

    Args:
        optimizer: The optimizer.
        scheduler: The optimizer's schedule, in its present state.
        total_steps: The number of optimizer steps to come.
        interval: As for :func:`budgets_of`.

    Raises:
        TypeError: ``scheduler`` is no scheduler.
        ValueError: The schedule belongs to another optimizer, depends on a metric, or ends before.
    """
    optimizer = unwrapped(optimizer)
    scheduler, steps_per_call = unwrapped_schedule(scheduler)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "a ReduceLROnPlateau depends on a metric, so its rates are unknown: give total_time="
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be a torch.optim.lr_scheduler, not {type(scheduler).__name__}")
    if unwrapped(scheduler.optimizer) is not optimizer:
        raise ValueError("scheduler belongs to another optimizer: give the scheduler of this one")
    stand_in = _stand_in(optimizer)
    sums = [[0.0, 0.0, 0.0] for _ in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the scheduler steps before the optimizer
        try:
            seen = scheduler.optimizer
            shown = seen.of(stand_in) if isinstance(seen, FirstGroups) else stand_in
            moving: Any = copy.deepcopy(scheduler, {id(optimizer): stand_in, id(seen): shown})
            for step in range(total_steps):
                calls = int(step % interval == 0) if isinstance(interval, int) else interval(step)
                for _ in range(calls * steps_per_call if step else 0):
                    moving.step()
                if isinstance(shown, FirstGroups):
                    shown.pass_on()
                for entry, group in zip(sums, stand_in.param_groups, strict=True):
                    rate = float(group["lr"])
                    entry[0] += rate
                    entry[1] += rate * rate
                    entry[2] = max(entry[2], rate)
        except Exception as error:  # any class of scheduler, any error
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"scheduler cannot be simulated for total_steps={total_steps} ({text}): check total_steps, "
                "or give total_time="
            ) from error
    return [Budget(*entry) for entry in sums]


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and settings, and a scalar as the parameter of each."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: _copied(v) for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**settings, "params": [torch.nn.Parameter(torch.zeros(()))]})
    stand_in = torch.optim.SGD(groups, lr=0.0)
    stand_in.defaults = copy.deepcopy(optimizer.defaults)
    return stand_in


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
