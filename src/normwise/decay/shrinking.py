"""Modes "flow" and "explicit": what multiplies the weights, and in what order memory is read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.arithmetic import explicit_factors, flow_factors, multiply, multiply_all
from normwise.decay.checks import name_of
from normwise.decay.clock import Clock
from normwise.decay.compensation import Compensation
from normwise.decay.live import Live, batches, magnitudes
from normwise.decay.rotation import turned
from normwise.decay.rules import Rule, Sphere
from normwise.units import Unit, joined_norms, wide_dtype

__all__ = ["Shrinking"]


class Shrinking:
    """Multiplies units by what a rule makes of their norms.

    Args:
        optimizer: The optimizer, whose rates are the time and which knows whether a step is skipped.
        units: All units of the Decay.
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
        clock: Clock,
        measure: str,
        compensation: Compensation | None,
    ) -> None:
        self.optimizer = optimizer
        self.units = units
        self.clock = clock
        self.measure = measure
        self.compensation = compensation
        self.reference: list[Tensor] = []
        self._before: dict[int, Tensor] = {}

    def refer_to_present_norms(self) -> None:
        """Keep the magnitudes as they are now, for a Sphere without a radius."""
        self.reference = [self._magnitudes(which) for which in range(len(self.units))]
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
        factors = []
        for one in live:
            seen = self._magnitudes(one.which)
            name = functools.partial(name_of, self.optimizer, one.param)
            factors.append(explicit_factors(rule, seen, times[one.group], one.unit.mask, name))
        for one, factor in zip(live, factors, strict=True):
            self._multiply(one, factor)

    @torch.no_grad()
    def by_flow(self, rule: Rule, live: list[Live]) -> None:
        """Multiply by φ(n, t)/n."""
        times = self._times(live)
        if isinstance(rule, Sphere) and rule.rotate:
            self._turn(rule, live, times)
            return
        if rule.constant_rate is not None:  # one factor for all: no norm is needed
            ratios = {group: rule.flow(_one_beside(time), time) for group, time in times.items()}
            for one in live:
                self._multiply(one, ratios[one.group])
            return
        cut = [one for one in live if len(one.unit.params) == 1 and self.compensation is None]
        for batch in batches(cut, self.measure):
            self._shrink_batch(rule, batch, times[batch[0].group])
        whole = [one for one in live if len(one.unit.params) > 1 or self.compensation is not None]
        seen = {one.which: self._magnitudes(one.which) for one in whole}  # before the first of a joint unit
        for one in whole:
            bound = self._bound(rule, one.which)
            self._multiply(one, flow_factors(bound, seen[one.which], times[one.group]))

    def _shrink_batch(self, rule: Rule, batch: list[Live], time: float | Tensor) -> None:
        # All norms first and then all products: after a pass over memory every Python step is slow, which
        # costs more than finding a weight in the cache again would gain.
        unit = batch[0].unit
        norms, regular = joined_norms([one.param for one in batch], unit.dim)
        if self.reference:
            rule = rule.bound_to(torch.cat([self.reference[one.which] for one in batch]))
        factors = flow_factors(rule, magnitudes(norms, unit, self.measure), time, regular)
        split = factors.split([one.unit.count for one in batch])
        multiply_all([one.param for one in batch], split, [one.unit for one in batch], self._found_inf())

    def keep_weights(self, rule: Rule) -> None:
        """Copy the weights before the step, for a rule that has to know what the step has added."""
        if isinstance(rule, Sphere) and rule.rotate:
            # all of them, as a closure may give gradients to those that have none yet
            self._before = {id(p): p.detach().clone() for unit in self.units for p in unit.params}

    def _turn(self, rule: Rule, live: list[Live], times: dict[int, float | Tensor]) -> None:
        found_inf = self._found_inf()
        for one in live:
            unit = one.unit
            if one.place != len(unit.params) - 1 or any(param.grad is None for param in unit.params):
                continue  # a joint unit turns as a whole, when its last tensor is reached, or not at all
            before = [self._before[id(param)] for param in unit.params]
            seen, time = self._magnitudes(one.which), times[one.group]
            size = unit.numel**0.5 if self.measure == "rms" else 1.0
            new = turned(unit, before, self._bound(rule, one.which).flow(seen, time) * size, time)
            for param, value in zip(unit.params, new, strict=True):
                if unit.mask is not None:
                    value = torch.where(unit.broadcast(unit.mask, param), value, param)
                if found_inf is not None:
                    value = torch.where(found_inf.to(param.device) > 0, param, value)
                param.copy_(value)
        self._before = {}

    def _times(self, live: list[Live]) -> dict[int, float | Tensor]:
        return {group: self.clock.time(self.optimizer, group) for group in {one.group for one in live}}

    def _magnitudes(self, which: int) -> Tensor:
        unit = self.units[which]
        norms = unit.norms() if self.compensation is None else self.compensation.norms(which)
        return magnitudes(norms, unit, self.measure)

    def _bound(self, rule: Rule, which: int) -> Rule:
        return rule.bound_to(self.reference[which]) if self.reference else rule

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
