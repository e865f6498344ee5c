"""From units to a Decay with nothing to tune: the rule, its coefficient, and the norms to start from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normwise.decay.decay import Decay
from normwise.decay.rules import L2, AdaptiveWeightShrink, Rule, checked
from normwise.decay.start import JointGroup, Start, running_statistics
from normwise.decay.targets import group_of, name_of
from normwise.decay.wrappers import unwrapped
from normwise.planning.budget import Budget, budgets_of, has_begun
from normwise.planning.stepping import Stepping, stepping_of, textbook_stepping
from normwise.theory.equilibrium import equilibrium_norm
from normwise.units import Unit

__all__ = ["STARTS", "Settings", "Weight", "attach", "attach_weights", "few", "say"]

_logger = logging.getLogger("normwise")
STARTS = ("equilibrium", "as is")
_RULES = (AdaptiveWeightShrink, L2)
# Where γ must be measured, over so many steps: the first gradients of a training are not typical, and clipped
# ones tell too little. Without batch norm a network may start so flat that γ grows fortyfold in 12 steps.
_MEASURED_STEPS = 32


@dataclass(frozen=True)
class Weight:
    """A parameter to decay, and what placing it must respect.

    Attributes:
        name: Its name, for messages.
        unit: Its units.
        movable: Whether scaling a unit changes no output: "alone", "with its group", "linked" (with a group
            that has weights in several optimizers) or "no".
        rigid: Whether the units are invariant in blocks only.
        smallest_rms: The root mean square of values below which eps of norm layers is not negligible.
    """

    name: str
    unit: Unit
    movable: str = "alone"
    rigid: bool = False
    smallest_rms: float = 0.0


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`attach` that say how to decay."""

    total_time: float | None = None
    scheduler: LRScheduler | None = None
    total_steps: int | None = None
    scheduler_interval: int | Callable[[int], int] = 1
    kind: str | None = None
    strength: float = 3.0
    start: str = "equilibrium"
    rule: type[Rule] = AdaptiveWeightShrink
    every: int = 1
    announce: Callable[[str], None] | None = None

    def check(self) -> None:
        """Raise an error that names the first argument that is not allowed."""
        checked("strength", self.strength, positive=True)
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} is not known: choose from {', '.join(map(repr, STARTS))}")
        if self.rule not in _RULES:
            known = " or ".join(rule.__name__ for rule in _RULES)
            raise ValueError(f"rule={self.rule!r} is not known: give the class {known}; others need nw.Decay")


def attach(
    optimizer: Optimizer,
    params: Tensor | Unit | Iterable[Tensor | Unit],
    total_time: float | None = None,
    *,
    dim: int | None = 0,
    scheduler: LRScheduler | None = None,
    total_steps: int | None = None,
    scheduler_interval: int | Callable[[int], int] = 1,
    kind: str | None = None,
    strength: float = 3.0,
    start: str = "equilibrium",
    rule: type[Rule] = AdaptiveWeightShrink,
    every: int = 1,
    model: nn.Module | None = None,
    announce: Callable[[str], None] | None = None,
) -> Decay:
    """Decay scale-invariant weights by Adaptive Weight Shrink, with nothing to tune.

    As :meth:`normwise.Plan.attach`, which explains it, for those who know which weights are scale-invariant.
    The start scales every unit by itself, so each unit must be scale-invariant alone.

    Args:
        optimizer: It must hold the parameters, in groups without weight_decay.
        params: As for :class:`normwise.Decay`.
        total_time: As for ``Plan.attach``, like all further arguments.
        dim: As for :class:`normwise.Decay`.
        scheduler: The learning-rate schedule.
        total_steps: The number of steps to come.
        scheduler_interval: The number of optimizer steps per ``scheduler.step()``.
        kind: "sgd" or "adam", for an optimizer that cannot be measured.
        strength: S. The rate of decay at the start is S/Σlr.
        start: "equilibrium" or "as is".
        rule: The class ``AdaptiveWeightShrink`` or ``L2``.
        every: As for :class:`normwise.Decay`.
        model: The model. The running statistics of its batch norms begin anew when the weights are placed.
            Without it they average over outputs at the old norms until these are forgotten: with large
            initial norms, evaluation mode is wrong for some hundred steps.
        announce: Called with each line that is logged.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: As for ``Plan.attach``.

    Example:
        >>> import normwise as nw
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0)
        >>> decay = nw.attach(optimizer, net[0].weight, total_steps=600)
        >>> net(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> rms = net[0].weight.detach().norm(dim=1) / 3**0.5
        >>> rms.round(decimals=1)  # √(ηT/2S) = 0.1, and one step
        tensor([0.1000, 0.1000, 0.1000, 0.1000])
    """
    optimizer = unwrapped(optimizer)
    settings = Settings(
        total_time, scheduler, total_steps, scheduler_interval, kind, strength, start, rule, every, announce
    )
    given = [params] if isinstance(params, (Tensor, Unit)) else list(params)
    units = [item if isinstance(item, Unit) else Unit(item, dim) for item in given]
    weights = [Weight(name_of(optimizer, unit.params[0]), unit) for unit in units]
    statistics = [] if model is None else running_statistics(model)
    return attach_weights(weights, (), optimizer, settings, statistics=statistics)


@dataclass
class _Chosen:
    """What is computed for each weight: its group's budget, and how its optimizer steps."""

    budget: Budget
    stepping: Stepping


def attach_weights(
    weights: Sequence[Weight],
    groups: Sequence[tuple[Mapping[str, float], Sequence[tuple[Tensor, float]]]],
    optimizer: Optimizer,
    settings: Settings,
    measured: dict[str, Stepping] | None = None,
    statistics: Sequence[nn.Module] = (),
) -> Decay:
    """Construct the Decay, and log what was chosen.

    Args:
        weights: What to decay.
        groups: Jointly scale-invariant groups: exponents of weights by name, and of other parameters.
        optimizer: It holds all these weights.
        settings: How to decay.
        measured: What is known of optimizers already; what is measured is added.
        statistics: Batch norms whose running statistics begin anew when weights are placed.
    """
    settings.check()
    budgets, source = budgets_of(
        optimizer,
        settings.total_time,
        settings.scheduler,
        settings.total_steps,
        settings.scheduler_interval,
    )
    weights, notes = _with_a_budget(weights, optimizer, budgets)
    chosen = _chosen(weights, optimizer, budgets, settings.kind, {} if measured is None else measured)
    time, spread = _mean([c.budget.time for c in chosen], [_numel(w) for w in weights])
    if settings.start == "equilibrium":
        arguments, how = _from_equilibrium(weights, groups, optimizer, chosen, time, settings, statistics)
    else:
        arguments, how = _as_is(weights, chosen, time, settings)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for w in weights for p in w.unit.params)
    units = [w.unit for w in weights]
    decay = Decay(optimizer, params=units, every=settings.every, compensated=half, **arguments)
    several = f" (the groups differ by a factor of {spread:.3g}: their mean)" if spread > 1.001 else ""
    number = len({id(p) for w in weights for p in w.unit.params})
    said = "Adaptive Weight Shrink sets" if settings.rule is AdaptiveWeightShrink else "L2 sets"
    lines = [
        f"{said} the effective learning rate of {number} scale-invariant parameter{'s' * (number != 1)}",
        f"time: Σlr = {time:.4g} {source}{several}",
        *how,
        *notes,
    ]
    if half:
        lines.append("weights in half precision: decay below their precision is kept (compensated=True)")
    for line in lines:
        say(line, [decay], settings.announce)
    if settings.total_steps is not None:
        _watch(decay, settings.total_steps)
    return decay


# -- the two starts --------------------------------------------------------------------------------------


def _from_equilibrium(
    weights: Sequence[Weight],
    groups: Sequence[tuple[Mapping[str, float], Sequence[tuple[Tensor, float]]]],
    optimizer: Optimizer,
    chosen: Sequence[_Chosen],
    time: float,
    settings: Settings,
    statistics: Sequence[nn.Module],
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a Decay whose units start in equilibrium, and lines that say so."""
    if has_begun(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} has stepped already, and its momentum belongs to the present norms: "
            'attach before the first step (to resume, before you load its state), or give start="as is"'
        )
    norms: list[float | None] = []
    for weight, own in zip(weights, chosen, strict=True):
        # AWS has the rate S/T of its own group; L2 has one rate for all groups
        pull = settings.strength / (own.budget.time if settings.rule is AdaptiveWeightShrink else time)
        norms.append(None if weight.movable == "no" else _unit_norm(weight, own, pull))
    index = {w.name: k for k, w in enumerate(weights)}
    joint = [
        JointGroup({index[name]: e for name, e in members.items()}, others)
        for members, others in groups
        if all(name in index for name in members)
    ]
    grouped = {which for group in joint for which in group.units}
    for which, weight in enumerate(weights):
        if weight.movable == "with its group" and which not in grouped:
            norms[which] = None
    grows = [own.stepping.grows_with_gradient for own in chosen]
    buffers = _common_buffers(chosen)
    steps = _MEASURED_STEPS if any(grows) and buffers is not None else 1
    start = Start(
        norms,
        grows,
        joint,
        frozenset(k for k, w in enumerate(weights) if w.rigid),
        {k: w.smallest_rms * w.unit.numel**0.5 for k, w in enumerate(weights) if w.smallest_rms > 0},
        steps,
        buffers or {},
        {k: own.budget.time / time for k, own in enumerate(chosen)}
        if settings.rule is AdaptiveWeightShrink
        else {},
        statistics,
    )
    rate = settings.strength / time
    lines = [f"rate at the start: {settings.strength:g}/Σlr = {rate:.4g}"]
    name = type(optimizer).__name__
    if all(grows):
        lines.append(
            f"start: in equilibrium, as measured in the first {steps} step{'s' * (steps > 1)}, because the "
            f"steps of {name} grow with the gradient"
        )
    else:
        lines.append(f"start: in equilibrium, from the first step on; the steps of {name} were measured")
    lines.append("weights change in norm, not in direction, at the first step; outputs stay as they are")
    if statistics:
        lines.append("running statistics of batch norms begin anew when the weights have been placed")
    still = [w.name for w, norm in zip(weights, norms, strict=True) if norm is None]
    if still:
        lines.append(f"started as they are: {few(still)}, which cannot be scaled alone")
    return {"rule": settings.rule(rate), "measure": "relative", "start": start}, lines  # type: ignore[call-arg]


def _unit_norm(weight: Weight, own: _Chosen, pull: float) -> float:
    """Return the equilibrium norm of a unit for γ = 1, at the largest rate of the schedule."""
    total = 0.0
    for param in weight.unit.params:
        total += own.stepping.diffusivity(param.shape, param.device) / weight.unit.count
    degree = 2 if own.stepping.grows_with_gradient else 1
    scale = math.sqrt(own.stepping.per_element if degree == 2 else total)
    if not scale > 0 or not math.isfinite(scale):
        raise ValueError(
            f"the steps of the optimizer could not be measured for {weight.name!r} of shape "
            f"{tuple(weight.unit.params[0].shape)}: give kind='sgd' or kind='adam'"
        )
    return float(equilibrium_norm(L2(pull), own.budget.peak, scale, degree=degree))


def _as_is(
    weights: Sequence[Weight], chosen: Sequence[_Chosen], time: float, settings: Settings
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a Decay that takes the norms as they are, and lines that say so."""
    numels = [_numel(w) for w in weights]
    grows = {own.stepping.grows_with_gradient for own in chosen}
    if len(grows) > 1:
        raise ValueError(
            "the steps of some groups grow with the gradient and those of others do not, so no one reference "
            'norm fits: give start="equilibrium"'
        )
    if grows == {True}:
        measure, steps = "norm", "grow with the gradient"
        norms = [math.sqrt(max(1, w.unit.params[0].shape[0])) if w.unit.dim is None else 1.0 for w in weights]
        whole = any(norm != 1.0 for norm in norms)
        why = "whole tensors whose rows have about unit norm" if whole else "units of about unit norm"
        reference, _ = _mean(norms, numels)
    else:
        measure, steps = "rms", "do not grow with the gradient"
        squares = [
            own.budget.squares * _diffusivity(w, own) / _numel(w)
            for w, own in zip(weights, chosen, strict=True)
        ]
        reference, why = (
            math.sqrt(_mean(squares, numels)[0]),
            "the RMS that an undecayed weight reaches from zero",
        )
    coefficient = settings.strength / time
    if settings.rule is AdaptiveWeightShrink:
        coefficient = AdaptiveWeightShrink.for_budget(time, reference, settings.strength).strength
    lines = [
        f'measure: "{measure}", as the steps of the optimizer {steps}',
        f"reference: {reference:.4g}, {why}",
        f"λ = {settings.strength:g}/({reference:.4g} · {time:.4g}) = {coefficient:.4g}",
        "start: the norms as they are",
    ]
    return {"rule": settings.rule(coefficient), "measure": measure}, lines  # type: ignore[call-arg]


def _diffusivity(weight: Weight, own: _Chosen) -> float:
    return sum(own.stepping.diffusivity(p.shape, p.device) for p in weight.unit.params)


# -- what is measured ------------------------------------------------------------------------------------


def _with_a_budget(
    weights: Sequence[Weight], optimizer: Optimizer, budgets: Sequence[Budget]
) -> tuple[list[Weight], list[str]]:
    """Return the weights that the optimizer will step, and a line about the others.

    Raises:
        ValueError: A weight is missing from the optimizer or decayed already, or no weight is stepped.
    """
    where = group_of(optimizer)
    kept: list[Weight] = []
    left: list[Weight] = []
    for weight in weights:
        for param in weight.unit.params:
            if id(param) not in where:
                raise ValueError(
                    f"{weight.name!r} of the plan is not in the optimizer: construct the optimizer from "
                    "plan.param_groups(), give all optimizers as a list, or apply the plan to the wrapped "
                    "model (plan.apply_to)"
                )
            group = where[id(param)]
            coefficient = optimizer.param_groups[group].get("weight_decay", 0)
            if coefficient:
                raise ValueError(
                    f"{weight.name!r} would be decayed twice: param_groups[{group}] has "
                    f"weight_decay={coefficient}; construct the optimizer from plan.param_groups(), or set "
                    "weight_decay=0 there"
                )
        stepped = all(budgets[where[id(p)]].time > 0 for p in weight.unit.params)
        (kept if stepped else left).append(weight)
    if not kept:
        raise ValueError(
            "the learning rates sum to 0 for all units: give a scheduler, a positive lr, or total_time="
        )
    named = few([w.name for w in left])
    return kept, [f"left out, as the learning rate is 0: {named}"] if left else []


def _chosen(
    weights: Sequence[Weight],
    optimizer: Optimizer,
    budgets: Sequence[Budget],
    kind: str | None,
    known: dict[str, Stepping],
) -> list[_Chosen]:
    """Return the budget of each weight, and how its optimizer steps: measured once per kind of group.

    Raises:
        ValueError: No norm is in balance with the steps of this optimizer, or they cannot be measured.
    """
    where = group_of(optimizer)
    found = []
    for weight in weights:
        k = where[id(weight.unit.params[0])]
        group = optimizer.param_groups[k]
        key = repr([type(optimizer), {n: v for n, v in group.items() if n not in _NO_MATTER}])
        if key not in known:
            stepping = textbook_stepping(group, kind) if kind is not None else stepping_of(optimizer, k)
            if isinstance(stepping, str):
                remedy = (
                    "give kind='sgd' if its steps grow with the gradient, kind='adam' if they do not, or use "
                    "nw.Decay with a coefficient of your own"
                )
                raise ValueError(f"{stepping}: {remedy}")
            known[key] = stepping
        found.append(_Chosen(budgets[k], known[key]))
    return found


_NO_MATTER = ("params", "param_names", "lr", "initial_lr", "weight_decay", "name", "max_lr", "min_lr")


def _common_buffers(chosen: Sequence[_Chosen]) -> dict[str, float] | None:
    """Return how the buffers of all groups scale; None where one of them does not scale by a power."""
    common: dict[str, float] = {}
    for own in chosen:
        if own.stepping.buffers is None:
            return None
        common |= own.stepping.buffers
    return common


def _mean(values: Sequence[float], numels: Sequence[int]) -> tuple[float, float]:
    """Return the geometric mean over elements, and the ratio of the largest value to the smallest."""
    if len(set(values)) == 1:
        return values[0], 1.0
    logs = sum(n * math.log(v) for n, v in zip(numels, values, strict=True))
    return math.exp(logs / sum(numels)), max(values) / min(values)


def _numel(weight: Weight) -> int:
    return sum(param.numel() for param in weight.unit.params)


def say(line: str, decays: Sequence[Decay], announce: Callable[[str], None] | None) -> None:
    """Log a line, announce it, and keep it for ``explain()`` of these Decays."""
    _logger.info(line)
    if announce is not None:
        announce(line)
    for decay in decays:
        decay._notes.append(line)


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _watch(decay: Decay, total_steps: int) -> None:
    """Log once when the optimizer steps beyond the steps that the coefficient was made for."""
    said = False

    def check(*_: object) -> None:
        nonlocal said
        if not said and decay.steps > total_steps:
            said = True  # the hook stays, as removing it here would disturb torch's loop over hooks
            _logger.warning(
                "step %d: the attached decay was made for %d steps and goes on with the same λ: give attach "
                "the total_steps of the whole training",
                decay.steps,
                total_steps,
            )

    decay.optimizer.register_step_post_hook(check)
