"""From a plan to a Decay: which rule, with which coefficient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.decay import Decay
from normwise.decay.rules import AdaptiveWeightShrink
from normwise.planning.budget import Budget
from normwise.planning.optimizer_probe import step_grows_with_gradient
from normwise.planning.treatment import Treatment
from normwise.units import Unit

__all__ = ["attach"]

_logger = logging.getLogger("normwise")
_DEGREES = {"sgd": 2, "adam": 1}


def attach(
    weights: Sequence[tuple[Treatment, Tensor]],
    optimizer: Optimizer,
    budgets: Sequence[Budget],
    source: str,
    kind: str | None,
    strength: float,
    announce: Callable[[str], None] | None,
    total_steps: int | None,
) -> Decay:
    """Construct the Decay for these parameters with the verdict "shrink", and log what was chosen.

    ``budgets`` are those of the param_groups, and ``source`` says where they come from. The other arguments
    are those of :meth:`normwise.planning.plan.Plan.attach`.
    """
    if not weights:
        raise ValueError(
            "the plan has no units: nothing in this model is scale-invariant, alone or jointly, so there is "
            "nothing for a rule to shrink; use plan.param_groups(weight_decay=...) for plain L2"
        )
    groups = _groups_of(weights, optimizer)
    degree = _degree(optimizer, groups[0], kind)
    budget, spread = _mean_budget([budgets[k] for k in groups], [p.numel() for _, p in weights])
    if degree == 2:
        measure, steps = "norm", "grow with the gradient"
        reference, why = _reference_norm(weights)
    else:
        measure, steps = "rms", "do not grow with the gradient"
        reference, why = (
            math.sqrt(budget.squares),
            "√Σlr², the RMS that an undecayed weight reaches from zero",
        )
    rule = AdaptiveWeightShrink.for_budget(budget.time, norm=reference, strength=strength)
    units = [Unit(parameter, t.dim, t.mask) for t, parameter in weights]
    half = any(p.dtype in (torch.float16, torch.bfloat16) for _, p in weights)
    decay = Decay(optimizer, rule, units, measure=measure, compensated=half)
    several = f" (the groups differ by a factor of {spread:.3g}: their mean)" if spread > 1.001 else ""
    notes = [
        f"Adaptive Weight Shrink sets the effective learning rate of {len(units)} scale-invariant "
        f"parameter{'s' if len(units) != 1 else ''}",
        f"time: Σlr = {budget.time:.4g} {source}{several}",
        f'measure: "{measure}", as the steps of {type(optimizer).__name__} {steps}',
        f"reference: {reference:.4g}, {why}",
        f"λ = {strength:g}/({reference:.4g} · {budget.time:.4g}) = {rule.strength:.4g}",
    ]
    if half:
        notes.append("weights in half precision: decay below their precision is kept (compensated=True)")
    for note in notes:
        _logger.info(note)
        if announce is not None:
            announce(note)
    decay._notes += notes
    if total_steps is not None:
        _watch(decay, total_steps)
    return decay


def _watch(decay: Decay, total_steps: int) -> None:
    """Log once when the optimizer steps beyond the steps that the coefficient was made for."""

    def check(*_: object) -> None:
        if decay.steps > total_steps:
            handle.remove()
            _logger.warning(
                "step %d: the attached decay was made for %d steps and goes on with the same λ: give attach "
                "the total_steps of the whole training",
                decay.steps,
                total_steps,
            )

    handle = decay.optimizer.register_step_post_hook(check)


def _groups_of(weights: Sequence[tuple[Treatment, Tensor]], optimizer: Optimizer) -> list[int]:
    """Return the index of each weight's param_group; raise where a weight is missing or decayed already."""
    where = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = []
    for t, parameter in weights:
        if id(parameter) not in where:
            raise ValueError(
                f"{t.name!r} of the plan is not in the optimizer: construct the optimizer from "
                "plan.param_groups(), or apply the plan to the wrapped model (plan.apply_to)"
            )
        group = where[id(parameter)]
        coefficient = optimizer.param_groups[group].get("weight_decay", 0)
        if coefficient:
            raise ValueError(
                f"{t.name!r} would be decayed twice: param_groups[{group}] has weight_decay={coefficient}; "
                "construct the optimizer from plan.param_groups(), or set weight_decay=0 there"
            )
        groups.append(group)
    return groups


def _degree(optimizer: Optimizer, group: int, kind: str | None) -> int:
    """Return 2 if the steps of the optimizer grow with the gradient (kind "sgd"), 1 if not (kind "adam")."""
    if kind in _DEGREES:
        return _DEGREES[kind]
    if kind is not None:
        raise ValueError(f"kind={kind!r} is not known: choose from {', '.join(map(repr, _DEGREES))}")
    grows = step_grows_with_gradient(optimizer, group)
    if grows is None:
        raise ValueError(
            f"how the steps of {type(optimizer).__name__} depend on the gradient could not be measured: give "
            "kind='sgd' if they grow with it, kind='adam' if they do not"
        )
    return 2 if grows else 1


def _mean_budget(budgets: list[Budget], numels: list[int]) -> tuple[Budget, float]:
    """Return the geometric mean over elements, and the ratio of the largest time to the smallest."""
    times = [budget.time for budget in budgets]
    if min(times) <= 0 or min(budget.squares for budget in budgets) <= 0:
        raise ValueError(
            f"the learning rates sum to {min(times):g} for some units: give a scheduler, a positive lr, or "
            "total_time="
        )
    squares = [budget.squares for budget in budgets]
    return Budget(_mean(times, numels), _mean(squares, numels)), max(times) / min(times)


def _mean(values: Sequence[float], numels: Sequence[int]) -> float:
    """Return the geometric mean over elements."""
    if len(set(values)) == 1:
        return values[0]
    return math.exp(sum(n * math.log(v) for n, v in zip(numels, values, strict=True)) / sum(numels))


def _reference_norm(weights: Sequence[tuple[Treatment, Tensor]]) -> tuple[float, str]:
    """Return the norm of a unit whose rows have norm 1: 1 for a row, √rows for a whole tensor.

    A Decay has one rule, so where units differ the norm is the geometric mean over elements.
    """
    norms = [1.0 if t.dim is not None else math.sqrt(max(1, p.shape[0] if p.ndim else 1)) for t, p in weights]
    whole = any(norm != 1.0 for norm in norms)
    return (
        _mean(norms, [p.numel() for _, p in weights]),
        "whole tensors whose rows have about unit norm" if whole else "units of about unit norm",
    )
