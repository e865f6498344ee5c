"""When a rule acts in a step: after it ("flow"), before it ("explicit"), or through the gradient ("coupled").

Each mode is one pass over the same stages: collect the parameters that the step concerns, take the norms of
their units, compute factors from the rule, and scale in place. Where a rate does not depend on the norm (L2),
no norm is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normwise.collectives import together
from normwise.decay.clock import Clock, ElapsedTime
from normwise.decay.nonfinite import report_non_finite, report_unrepresentable
from normwise.decay.rules import Rule
from normwise.decay.scaling import (
    constant_flow_factor,
    explicit_factors,
    flow_factors,
    has_direction,
    is_representable,
)
from normwise.decay.targets import ActiveParam, Targets
from normwise.sharding import like, local_tensor, placed_as
from normwise.units import LocalUnit, Unit, meshes_with_distributed_units

__all__ = ["Coupled", "Explicit", "Flow", "Mode", "Schedule", "mode_class"]


class Schedule(NamedTuple):
    """When to apply the rule and when to look for norms that are not finite, in steps."""

    every: int = 1
    check_every: int = 1
    nonfinite: str = "skip"


class Mode:
    """When a rule acts in a step.

    Args:
        rule: The rule as the user gave it.
        targets: The units that it acts on.
        clock: How much time passes.
        elapsed: The time that has not been applied yet.
        schedule: In which steps to act.

    Attributes:
        needs_whole_units: Whether a rank must hold all elements of a unit.
        scales: Whether decay is a factor by which weights are multiplied.
        reads_measure: Whether the magnitude that the Decay measures matters.
        inside_closure: Whether to act after a closure has been evaluated and before the gradient step.
    """

    needs_whole_units: ClassVar[bool] = False
    scales: ClassVar[bool] = True
    reads_measure: ClassVar[bool] = True
    inside_closure: ClassVar[bool] = False

    def __init__(
        self, rule: Rule, targets: Targets, clock: Clock, elapsed: ElapsedTime, schedule: Schedule
    ) -> None:
        self.rule = rule
        self.targets = targets
        self.clock = clock
        self.elapsed = elapsed
        self.schedule = schedule
        self._policy = "skip"  # in this step

    def before_step(self, step: int) -> None:
        """Act before the optimizer's step with this number. May be called twice for one step."""

    def after_step(self, step: int) -> None:
        """Act after the step. Not called if the step raised."""

    def flush(self, step: int) -> None:
        """Apply the time that has not been applied yet."""

    def restore(self) -> None:
        """Undo what :meth:`before_step` changed for the length of the step."""

    def collect(self, step: int) -> list[ActiveParam]:
        """Return the parameters that have a gradient, and look for norms that are not finite."""
        active = self.targets.with_gradient()
        self._policy = self.schedule.nonfinite if step % self.schedule.check_every == 0 else "skip"
        report_non_finite(self.targets, active, self._policy)
        return active

    def times(self, active: Sequence[ActiveParam]) -> dict[int, float | Tensor]:
        """Return the time of this step for each group of these parameters."""
        groups = {entry.group for entry in active}
        return {group: self.clock.time(self.targets.optimizer, group) for group in groups}

    def factors(
        self,
        rule: Rule,
        active: list[ActiveParam],
        times: list[float | Tensor],
        evaluate: Callable[[Rule, Tensor, Any, list[ActiveParam]], Tensor],
    ) -> list[Tensor]:
        """Evaluate a function of norms at once for all parameters of the same time and device.

        Returns:
            For each parameter one factor per unit; 1 where the weights' type cannot represent the product.
        """
        magnitudes = self.targets.magnitudes(active)
        batches: dict[object, list[int]] = {}
        for k, (entry, time) in enumerate(zip(active, times, strict=True)):
            when = id(time) if isinstance(time, Tensor) else time
            batches.setdefault((when, entry.param.device), []).append(k)
        factors = [torch.empty(0)] * len(active)
        unfit = [torch.empty(0)] * len(active)
        for batch in batches.values():
            some = [active[k] for k in batch]
            norms = torch.cat([magnitudes[k] for k in batch])
            values = evaluate(self.targets.bind(rule, some), norms, times[batch[0]], some)
            spoils = is_representable(values, norms, self.targets.limits(some)).logical_not()
            values = values.masked_fill(spoils, 1.0)
            counts = [entry.unit.count for entry in some]
            for k, value, bad in zip(batch, values.split(counts), spoils.split(counts), strict=True):
                factors[k], unfit[k] = value, bad
        report_unrepresentable(self.targets, active, unfit, self._policy)
        return factors


class Flow(Mode):
    """Mode "flow": after every ``every`` steps, w ← w·φ(n, t)/n for the time t of these steps."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Add the time of the step, and apply the rule after every ``every`` steps."""
        active = self.collect(step)
        self.clock.advance(self.targets.optimizer)
        times = self.times(active)
        found_inf = self.targets.found_inf if self.schedule.every > 1 else None
        self.elapsed.add((((entry.which, entry.place), times[entry.group]) for entry in active), found_inf)
        if (step + 1) % self.schedule.every == 0:
            self._apply(step, found_inf)

    @torch.no_grad()
    def flush(self, step: int) -> None:
        """Apply the time that has not been applied yet."""
        if self.schedule.every > 1:
            self._policy = self.schedule.nonfinite
            self._apply(step, None)

    def _apply(self, step: int, found_inf: Tensor | None) -> None:
        active = self.targets.at_places(self.elapsed.__contains__)
        times = [self.elapsed[entry.which, entry.place] for entry in active]
        try:
            self.apply(self.rule.at(step), active, times)
        finally:  # where nonfinite="raise" has raised, the next step must not decay for this one too
            self.elapsed.clear(found_inf)

    def apply(self, rule: Rule, active: list[ActiveParam], times: list[float | Tensor]) -> None:
        """Scale the units of parameters by the flow of a rule over a time for each."""
        constant = self._constant_factors(rule, times)
        self.targets.scale(
            active,
            self.factors(rule, active, times, lambda rule, n, t, _: flow_factors(rule, n, t))
            if constant is None
            else constant,
        )

    def _constant_factors(self, rule: Rule, times: list[float | Tensor]) -> list[float | Tensor] | None:
        """Return a factor for each time; None where the norms are needed to know the factors or their range.

        A factor below 1/2 may make a unit vanish. Sharded units are scaled nonetheless, as by torch's own
        decay: a rank without a gradient would let the others wait for its norms.
        """
        if rule.constant_rate is None:
            return None
        distinct = {id(time): time for time in times}
        by_time = {key: constant_flow_factor(rule, time) for key, time in distinct.items()}
        is_strong = any(not isinstance(factor, Tensor) and factor < 0.5 for factor in by_time.values())
        if is_strong and not any(isinstance(parts[0], LocalUnit) for parts in self.targets.local):
            return None
        return [by_time[id(time)] for time in times]


class Explicit(Mode):
    """Mode "explicit": before the step, w ← (1 − t·c(n))·w."""

    inside_closure = True
    _done = False

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Scale the weights, once for each step that is completed.

        Raises:
            ValueError: A factor would not be positive; then nothing has been changed, on any rank.
        """
        if self._done:
            return
        active = self.collect(step)
        self.clock.advance(self.targets.optimizer)
        rule, by_group = self.rule.at(step), self.times(active)
        times = [by_group[entry.group] for entry in active]
        factors: Sequence[float | Tensor]
        if rule.constant_rate is not None:
            factors = [
                explicit_factors(rule, torch.empty(0), time, None, lambda _: self.targets.name(entry.owner))  # noqa: B023
                for entry, time in zip(active, times, strict=True)
            ]
        else:
            # a rank does not see the units of another
            with together(meshes_with_distributed_units(self.targets.local)):
                factors = self.factors(rule, active, times, self._factors)
        self.targets.scale(active, factors)
        self._done = True

    def after_step(self, step: int) -> None:
        """Be ready for the next step."""
        self._done = False

    def _factors(self, rule: Rule, norms: Tensor, time: float | Tensor, some: list[ActiveParam]) -> Any:
        mask = None
        if any(entry.unit.mask is not None for entry in some):
            every_unit = [norms.new_ones(entry.unit.count, dtype=torch.bool) for entry in some]
            masks = [entry.unit.mask for entry in some]
            mask = torch.cat([ones if m is None else m for m, ones in zip(masks, every_unit, strict=True)])

        def name(unit: int) -> str:
            ends = itertools.accumulate(entry.unit.count for entry in some)
            owner = next(entry.owner for entry, end in zip(some, ends, strict=True) if unit < end)
            return self.targets.name(owner)

        return explicit_factors(rule, norms, time, mask, name)


class _Replaced(NamedTuple):
    param: Tensor
    grad: Tensor
    replacement: Tensor


class Coupled(Mode):
    """Mode "coupled": the optimizer sees ∇ + c(n)·w instead of ∇, for the length of a step."""

    scales = False
    inside_closure = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replaced: list[_Replaced] = []

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Replace the gradients, unless that is done already.

        It is done if a subclass whose step() calls super().step() fired the hook before, or if the last step
        raised.

        Raises:
            ValueError: A gradient is sparse; then nothing has been changed.
        """
        active, optimizer = self.collect(step), self.targets.optimizer
        for entry in active:
            if entry.owner.grad is not None and entry.owner.grad.is_sparse:
                raise ValueError(
                    f'{self.targets.name(entry.owner)} has a sparse gradient, to which mode="coupled" cannot '
                    'add a dense pull: use mode="flow"'
                )
        if self._replaced:
            return
        rule, scale = self.rule.at(step), getattr(optimizer, "grad_scale", None)
        masked = any(unit.mask is not None for unit in self.targets.units)
        constant = rule.constant_rate if scale is None else None
        magnitudes = [torch.empty(0)] * len(active)
        if constant is None or masked:
            magnitudes = self.targets.magnitudes(active)
        unfit = [torch.zeros((), dtype=torch.bool, device=entry.param.device) for entry in active]
        for k, (entry, norms) in enumerate(zip(active, magnitudes, strict=True)):
            owner, grad = entry.owner, entry.owner.grad
            assert grad is not None  # or the parameter would not be active
            sign = -1.0 if optimizer.param_groups[entry.group].get("maximize") else 1.0
            local = local_tensor(placed_as(owner, grad))
            if constant is not None and entry.unit.mask is None:  # the very expression of torch.optim
                changed = torch.add(local, entry.param, alpha=sign * constant)
            else:
                vector, rates = self.pull(rule, entry, norms)
                unfit[k] = self._is_unfit(rates, norms, entry)
                rates = rates.masked_fill(unfit[k], 0.0)
                finite = entry.param.device.type == "cpu" and bool(norms.isfinite().all())
                changed = _add_pull(local, vector, rates * sign, entry.unit, scale, finite)
            owner.grad = like(changed, owner)
            self._replaced.append(_Replaced(owner, grad, owner.grad))
        try:
            report_unrepresentable(self.targets, active, unfit, self._policy)
        except RuntimeError:
            self.restore()
            raise

    def _is_unfit(self, rates: Tensor, norms: Tensor, entry: ActiveParam) -> Tensor:
        """Return for which units the pull, or its rate, is too large for the type of the weights."""
        size = self.targets.norm_of_magnitude_one(entry)
        largest = torch.finfo(entry.param.dtype).max / size
        largest_rate = torch.finfo(torch.promote_types(entry.param.dtype, torch.float32)).max
        too_large = (rates.abs() > largest_rate) | ((rates * norms).abs() > largest)
        return too_large & norms.isfinite()

    def after_step(self, step: int) -> None:
        """Put the gradients back."""
        self.restore()

    def restore(self) -> None:
        """Put the gradients back as they were before the step."""
        for param, grad, replacement in self._replaced:
            if param.grad is replacement:
                param.grad = grad
        self._replaced = []

    def pull(self, rule: Rule, entry: ActiveParam, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor and one rate per unit, whose product is the pull on the parameter."""
        rates = rule.rate(magnitudes)
        return entry.param, torch.where(has_direction(magnitudes), rates, torch.zeros_like(rates))


def _add_pull(
    grad: Tensor, vector: Tensor, rates: Tensor, unit: Unit, scale: Tensor | None, finite: bool
) -> Tensor:
    """Return grad + rates·vector in the gradient's type, as a new tensor.

    Args:
        grad: ∇.
        vector: What is pulled along, of the gradient's shape.
        rates: One for each unit.
        unit: The Unit, which knows the dim and the mask.
        scale: What a fused optimizer will divide the gradient by (GradScaler), or None.
        finite: Whether the vector is known to be finite, which saves a copy.
    """
    wide = torch.promote_types(vector.dtype, torch.float32)
    if unit.mask is not None:
        rates = torch.where(unit.mask, rates, torch.zeros_like(rates))
    if scale is not None:
        rates = rates * scale.to(rates)
    by_unit = unit.broadcast(rates.to(wide), vector)
    if not finite:
        vector = vector.masked_fill(by_unit == 0, 0.0)  # zero times infinity is not a number
    return torch.addcmul(grad.to(wide), vector.to(wide), by_unit).to(grad.dtype)


MODE_CLASSES: dict[str, type[Mode]] = {"flow": Flow, "explicit": Explicit, "coupled": Coupled}


def mode_class(rule: Rule, mode: str) -> type[Mode]:
    """Return the class that applies a rule in a mode: that of the mode, unless the rule names another."""
    kind: type[Mode] = rule.applied_by.get(mode, MODE_CLASSES[mode])
    return kind
