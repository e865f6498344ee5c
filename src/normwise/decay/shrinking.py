"""Modes "flow" and "explicit": what multiplies the weights, and in what order memory is read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.collectives import together
from normwise.decay.arithmetic import explicit_factors, flow_factors, multiply, multiply_all
from normwise.decay.checks import name_of
from normwise.decay.clock import Clock
from normwise.decay.compensation import Compensation
from normwise.decay.live import Live, batches, magnitudes, magnitudes_of, summed_norms
from normwise.decay.rotation import turned
from normwise.decay.rules import Rule, Sphere
from normwise.norms import concatenated_norms, wide_dtype
from normwise.sharding import local_tensor
from normwise.units import Unit, global_norms, local_values, meshes_with_distributed_units, needs_reduction

__all__ = ["Shrinking"]


class Shrinking:
    """Multiplies units by what a rule makes of their norms.

    Args:
        optimizer: The optimizer, whose rates are the time and which knows whether a step is skipped.
        units: All units of the Decay.
        parts: What this rank holds of them, as :func:`normwise.units.local_units` returned it.
        clock: How much time passes.
        measure: The magnitude that the rule sees.
        compensation: Where decay too small to be seen is kept, or None.

    Attributes:
        reference: For a Sphere without a radius, the magnitudes of each Unit when it was attached.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        units: tuple[Unit, ...],
        parts: list[tuple[Unit, ...]],
        clock: Clock,
        measure: str,
        compensation: Compensation | None,
    ) -> None:
        self.optimizer = optimizer
        self.units = units
        self.parts = parts
        self.clock = clock
        self.measure = measure
        self.compensation = compensation
        self.reference: list[Tensor] = []
        self._before: dict[int, Tensor] = {}
        self._dealt = meshes_with_distributed_units(parts)

    def refer_to_present_norms(self) -> None:
        """Keep the magnitudes as they are now, for a Sphere without a radius."""
        norms = global_norms(self.parts)
        self.reference = [
            magnitudes(n, unit, self.measure) for n, unit in zip(norms, self.units, strict=True)
        ]
        for unit, reference in zip(self.units, self.reference, strict=True):
            meant = reference if unit.mask is None else reference[unit.mask]
            if not bool(((meant > 0) & meant.isfinite()).all()):
                raise ValueError(
                    f"{name_of(self.optimizer, unit.params[0])} has units whose norm is zero or not finite, "
                    "through which no Sphere goes: give Sphere(radius=...), or initialise it first"
                )

    @torch.no_grad()
    def explicitly(self, rule: Rule, live: list[Live]) -> None:
        """Multiply by 1 − t·c(n); raise before anything is changed where that is zero or negative."""
        times = self._times(live)
        constant = rule.constant_rate is not None
        seen = [torch.empty(0)] * len(live) if constant else self._magnitudes(live)
        factors = []
        with together([] if constant else self._dealt):  # a rank does not see the units of another
            for one, magnitude in zip(live, seen, strict=True):
                name = functools.partial(name_of, self.optimizer, one.owner)
                factors.append(explicit_factors(rule, magnitude, times[one.group], one.unit.mask, name))
        for one, factor in zip(live, factors, strict=True):
            self._multiply(one, factor)

    @torch.no_grad()
    def by_flow(self, rule: Rule, live: list[Live]) -> None:
        """Multiply by φ(n, t)/n."""
        times = self._times(live)
        if isinstance(rule, Sphere) and rule.rotate:
            self._turn(rule, live, times)
            return
        if rule.constant_rate is not None:
            self._shrink_alike(rule, live, times)
            return
        summed = summed_norms(self.parts)
        cut = [one for one in live if len(one.unit.params) == 1 and self.compensation is None]
        for batch in batches(cut, self.measure):
            self._shrink_batch(rule, batch, times[batch[0].group], summed)
        whole = [one for one in live if len(one.unit.params) > 1 or self.compensation is not None]
        seen = self._magnitudes(whole, summed)  # before the first of a joint unit is changed
        for one, magnitude in zip(whole, seen, strict=True):
            self._multiply(one, flow_factors(self._bound(rule, one), magnitude, times[one.group]))

    def _shrink_alike(self, rule: Rule, live: list[Live], times: dict[int, float | Tensor]) -> None:
        """Multiply all units of a group by the same factor, for which no norm is needed."""
        ratios = {group: rule.flow(_one_beside(time), time) for group, time in times.items()}
        found_inf = self._found_inf()
        if self.compensation is None and found_inf is None:
            alike: dict[object, list[Live]] = {}
            for one in live:
                if one.unit.mask is None and ratios[one.group].device.type == "cpu":
                    alike.setdefault((one.group, one.param.device, one.param.dtype), []).append(one)
            for batch in alike.values():
                torch._foreach_mul_([one.param for one in batch], ratios[batch[0].group].item())
            done = {id(one.param) for batch in alike.values() for one in batch}
            live = [one for one in live if id(one.param) not in done]
        for one in live:
            self._multiply(one, ratios[one.group])

    def _shrink_batch(
        self, rule: Rule, batch: list[Live], time: float | Tensor, summed: dict[int, Tensor]
    ) -> None:
        # All norms first and then all products: after a pass over memory every Python step is slow, which
        # costs more than finding a weight in the cache again would gain.
        unit = batch[0].unit
        if needs_reduction(unit):
            norms, regular = torch.cat([local_values(one.unit, summed[one.which]) for one in batch]), False
        else:
            norms, regular = concatenated_norms([one.param for one in batch], unit.dim)
        rule = self._bound_to_all(rule, batch)
        factors = flow_factors(rule, magnitudes(norms, unit, self.measure), time, regular)
        split = factors.split([one.unit.count for one in batch])
        multiply_all([one.param for one in batch], split, [one.unit for one in batch], self._found_inf())

    def keep_weights(self, rule: Rule) -> None:
        """Copy the weights before the step, for a rule that has to know what the step has added."""
        if isinstance(rule, Sphere) and rule.rotate:
            # all of them, as a closure may give gradients to those that have none yet
            params = [param for unit in self.units for param in unit.params]
            self._before = {id(param): local_tensor(param).detach().clone() for param in params}

    def _turn(self, rule: Rule, live: list[Live], times: dict[int, float | Tensor]) -> None:
        found_inf = self._found_inf()
        for one in live:
            unit, owners = one.unit, self.units[one.which].params
            if one.place != len(owners) - 1 or any(param.grad is None for param in owners):
                continue  # a joint unit turns as a whole, when its last tensor is reached, or not at all
            before = [self._before[id(param)] for param in owners]
            (seen,), time = self._magnitudes([one]), times[one.group]
            size = unit.numel**0.5 if self.measure == "rms" else 1.0
            new = turned(unit, before, self._bound(rule, one).flow(seen, time) * size, time)
            for param, value in zip(unit.params, new, strict=True):
                if unit.mask is not None:
                    value = torch.where(unit.broadcast(unit.mask, param), value, param)
                if found_inf is not None:
                    value = torch.where(found_inf.to(param.device) > 0, param, value)
                param.copy_(value)
        self._before = {}

    def _times(self, live: list[Live]) -> dict[int, float | Tensor]:
        return {group: self.clock.time(self.optimizer, group) for group in {one.group for one in live}}

    def _magnitudes(self, live: list[Live], summed: dict[int, Tensor] | None = None) -> list[Tensor]:
        return magnitudes_of(live, self.parts, self.measure, self.compensation, summed)

    def _bound(self, rule: Rule, one: Live) -> Rule:
        return rule.bound_to(local_values(one.unit, self.reference[one.which])) if self.reference else rule

    def _bound_to_all(self, rule: Rule, batch: list[Live]) -> Rule:
        if not self.reference:
            return rule
        return rule.bound_to(torch.cat([local_values(one.unit, self.reference[one.which]) for one in batch]))

    def _multiply(self, one: Live, factor: float | Tensor) -> None:
        if self.compensation is not None:
            self.compensation.multiply(one, factor, self._found_inf())
        else:
            multiply(one.param, factor, one.unit, self._found_inf())

    def _found_inf(self) -> Tensor | None:
        """What a GradScaler leaves with a fused optimizer: 1 where the step is skipped."""
        found_inf: Tensor | None = getattr(self.optimizer, "found_inf", None)
        return found_inf


def _one_beside(time: float | Tensor) -> Tensor:
    """Return 1 on the device of a time, as moving a rate to another device would wait for it."""
    device = time.device if isinstance(time, Tensor) else torch.device("cpu")
    return torch.ones((), dtype=wide_dtype(device), device=device)
