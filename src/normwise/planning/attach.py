"""From a plan to a Decay: the one place that knows both units and decay.

A plan yields units and decay takes units; the rooms invariance and decay do not know each other. This file
stands above both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.decay import Decay
from normwise.decay.rule import checked
from normwise.decay.rules import AdaptiveWeightShrink
from normwise.planning.schedule import (
    Budget,
    Scheduler,
    constant_budgets,
    simulated_budgets,
    summed_budgets,
)
from normwise.planning.treatment import SHRINK, Treatment
from normwise.planning.twin import step_grows_with_gradient
from normwise.units import Unit

__all__ = ["attach"]

_KINDS = ("sgd", "adam")


def attach(
    treatments: list[Treatment],
    parameters: dict[str, Tensor],
    optimizer: Optimizer,
    *,
    total_time: float | None,
    scheduler: Scheduler | None,
    total_steps: int | None,
    scheduler_interval: int,
    kind: str | None,
    strength: float,
    announce: Callable[[str], None] | None,
) -> Decay:
    """Construct the Decay of a plan; see :meth:`normwise.planning.plan.Plan.attach`.

    Args:
        treatments: Those of the plan.
        parameters: {name in the plan: parameter}.
        optimizer: See there, as all that follow.
        total_time: See there.
        scheduler: See there.
        total_steps: See there.
        scheduler_interval: See there.
        kind: See there.
        strength: See there.
        announce: See there.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    shrunk = [t for t in treatments if t.verdict == SHRINK]
    if not shrunk:
        raise ValueError(
            "the plan has no units: nothing in this model is scale-invariant, alone or jointly, so there is "
            "nothing for a rule to shrink; use plan.param_groups(weight_decay=...) for plain L2"
        )
    weights = [(t, parameters[t.name]) for t in shrunk]
    groups = _groups_of(weights, optimizer)
    budgets, source = _budgets(optimizer, total_time, scheduler, total_steps, scheduler_interval)
    grows = _is_sgd_like(optimizer, groups[0], kind)
    mean, spread = _mean_budget([budgets[k] for k in groups], [p.numel() for _, p in weights])
    if grows:
        norm, why = _reference_norm(weights)
        measure = "norm"
    else:
        norm, why = math.sqrt(mean.squares), "√Σlr², the RMS that an undecayed weight reaches from zero"
        measure = "rms"
    rule = AdaptiveWeightShrink.for_budget(mean.time, norm=norm, strength=strength)
    units = [Unit(parameter, t.dim, t.mask) for t, parameter in weights]
    low = {p.dtype for _, p in weights} & {torch.float16, torch.bfloat16}
    decay = Decay(optimizer, rule, units, measure=measure, compensated=bool(low))
    if announce is not None:
        step = "grow with the gradient" if grows else "do not grow with the gradient"
        several = f" (the groups differ by a factor of {spread:.3g}: their mean)" if spread > 1.001 else ""
        announce(
            f"normwise: Adaptive Weight Shrink on {len(units)} of {len(treatments)} parameters, the "
            "scale-invariant ones; it sets their effective learning rate"
        )
        announce(f"  time      Σlr = {mean.time:.4g} {source}{several}")
        announce(f'  measure   "{measure}", as the steps of {type(optimizer).__name__} {step}')
        announce(f"  reference {norm:.4g}: {why}")
        announce(f"  λ         {strength:g}/({norm:.4g} · {mean.time:.4g}) = {rule.strength:.4g}")
        if low:
            announce("  precision weights in half precision: decay too small to show is kept (compensated)")
    return decay


def _groups_of(weights: list[tuple[Treatment, Tensor]], optimizer: Optimizer) -> list[int]:
    """Return the index of the group of each weight; raise where one is missing or decayed already."""
    where = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = []
    for t, parameter in weights:
        if id(parameter) not in where:
            raise ValueError(
                f"{t.name!r} of the plan is not in the optimizer: construct the optimizer from "
                "plan.param_groups(), or apply the plan to the wrapped model (plan.apply_to)"
            )
        group = where[id(parameter)]
        own = optimizer.param_groups[group].get("weight_decay", 0)
        if own:
            raise ValueError(
                f"{t.name!r} would be decayed twice: its param_groups[{group}] has weight_decay={own}; "
                "construct the optimizer from plan.param_groups(), or set weight_decay=0 there"
            )
        groups.append(group)
    return groups


def _budgets(
    optimizer: Optimizer,
    total_time: float | None,
    scheduler: Scheduler | None,
    total_steps: int | None,
    interval: int,
) -> tuple[list[Budget], str]:
    """Return the budget of each group, and where it comes from in words."""
    for name, value in (("total_steps", total_steps), ("scheduler_interval", interval)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed: give at least 1")
    if total_time is not None:
        if scheduler is not None or total_steps is not None:
            raise ValueError(
                "total_time is given beside scheduler or total_steps: give the time, or what it follows from"
            )
        return summed_budgets(optimizer, checked("total_time", total_time, positive=True)), "as given"
    if total_steps is None:
        raise ValueError(
            "the budget is missing: give scheduler= and total_steps=, or total_steps= alone for a constant "
            "rate, or total_time=Σlr"
        )
    if scheduler is None:
        return constant_budgets(optimizer, total_steps), f"over {total_steps} steps at the present rate"
    budgets = simulated_budgets(optimizer, scheduler, total_steps, interval)
    return budgets, f"over {total_steps} steps of {type(scheduler).__name__}, simulated on a copy"


def _is_sgd_like(optimizer: Optimizer, group: int, kind: str | None) -> bool:
    if kind is not None:
        if kind not in _KINDS:
            raise ValueError(f"kind={kind!r} is not known: choose from {', '.join(map(repr, _KINDS))}")
        return kind == "sgd"
    grows = step_grows_with_gradient(optimizer, group)
    if grows is None:
        raise ValueError(
            f"{type(optimizer).__name__} is of no kind that could be measured: say kind='sgd' if its steps "
            "grow with the gradient, kind='adam' if they do not"
        )
    return grows


def _mean_budget(budgets: list[Budget], numels: list[int]) -> tuple[Budget, float]:
    """Return the geometric mean over elements, and the ratio of the largest time to the smallest."""
    times = [budget.time for budget in budgets]
    if min(times) <= 0 or min(budget.squares for budget in budgets) <= 0:
        raise ValueError(
            f"the learning rates sum to {min(times):g} for some units: give a scheduler, a positive lr, or "
            "total_time="
        )
    total = sum(numels)

    def mean(values: list[float]) -> float:
        if len(set(values)) == 1:
            return values[0]
        return math.exp(sum(n * math.log(v) for n, v in zip(numels, values, strict=True)) / total)

    return Budget(mean(times), mean([budget.squares for budget in budgets])), max(times) / min(times)


def _reference_norm(weights: list[tuple[Treatment, Tensor]]) -> tuple[float, str]:
    """Return the norm that a unit has whose rows have norm 1: 1 for a row, √rows for a whole tensor.

    A Decay has one rule, so where units differ it is their geometric mean over elements.
    """
    norms = [1.0 if t.dim is not None else math.sqrt(max(1, p.shape[0] if p.ndim else 1)) for t, p in weights]
    if set(norms) == {1.0}:
        return 1.0, "units of about unit norm"
    logs = sum(p.numel() * math.log(n) for n, (_, p) in zip(norms, weights, strict=True))
    mean = math.exp(logs / sum(p.numel() for _, p in weights))
    return mean, "whole tensors whose rows have about unit norm"
