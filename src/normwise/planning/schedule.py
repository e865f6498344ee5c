"""How much time a schedule has: its learning rates, summed on a copy."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["Budget", "Scheduler", "constant_budgets", "simulated_budgets", "summed_budgets"]

Scheduler: TypeAlias = LRScheduler


@dataclass(frozen=True)
class Budget:
    """What is to come for one param_group.

    Attributes:
        time: Σ lr.
        squares: Σ lr².
    """

    time: float
    squares: float


def simulated_budgets(
    optimizer: Optimizer, scheduler: Scheduler, total_steps: int, interval: int
) -> list[Budget]:
    """Return the budget of each param_group for ``total_steps`` optimizer steps from now on.

    The scheduler is copied with a stand-in in place of its optimizer, so both stay as they are.

    Args:
        optimizer: The optimizer.
        scheduler: Its schedule, as it stands now.
        total_steps: How many optimizer steps are to come.
        interval: How many optimizer steps there are to one step of the schedule.

    Raises:
        TypeError: It is no scheduler.
        ValueError: It belongs to another optimizer, depends on a metric, or ends before.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "a ReduceLROnPlateau depends on a metric, so its rates are unknown: give total_time="
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be a torch.optim.lr_scheduler, not {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler is that of another optimizer: give the one made for this optimizer")
    stand_in = _stand_in(optimizer)
    sums = [[0.0, 0.0] for _ in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the order of steps: here nothing is optimised
        try:
            moving: Any = copy.deepcopy(scheduler, {id(optimizer): stand_in})
            for step in range(total_steps):
                if step and step % interval == 0:
                    moving.step()
                for pair, group in zip(sums, stand_in.param_groups, strict=True):
                    rate = float(group["lr"])
                    pair[0] += rate
                    pair[1] += rate * rate
        except Exception as error:  # a schedule of any make
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"scheduler cannot be simulated for total_steps={total_steps} ({text}): check total_steps, "
                "or give total_time="
            ) from error
    return [Budget(time, squares) for time, squares in sums]


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and settings, and one number for parameters in each."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: _copied(v) for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**settings, "params": [torch.nn.Parameter(torch.zeros(()))]})
    stand_in = torch.optim.SGD(groups, lr=0.0)
    stand_in.defaults = copy.deepcopy(optimizer.defaults)
    return stand_in


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def constant_budgets(optimizer: Optimizer, total_steps: int) -> list[Budget]:
    """Return the budget of each group if its present rate stays."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return [Budget(rate * total_steps, rate * rate * total_steps) for rate in rates]


def summed_budgets(optimizer: Optimizer, total_time: float) -> list[Budget]:
    """Return the budget of each group for a given Σ lr, as if the rate were constant.

    A warm-up has lowered the present rate, so the rate is the initial one where a scheduler has noted it.
    """
    rates = [max(float(g["lr"]), float(g.get("initial_lr", 0.0))) for g in optimizer.param_groups]
    return [Budget(total_time, total_time * rate) for rate in rates]
