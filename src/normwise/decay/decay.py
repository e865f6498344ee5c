"""A decay rule at work beside a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay import copying
from normwise.decay.arithmetic import add_pull, explicit_factors, flow_factors, shrink
from normwise.decay.checks import check_settings, check_state, check_units, group_of, name_of
from normwise.decay.clock import Clock
from normwise.decay.rules import Rule, Sphere
from normwise.units import Unit

__all__ = ["Decay"]

_STATE_FORMAT = 1


class _Live(NamedTuple):
    """A parameter that has a gradient in this step."""

    which: int  # the index of its Unit
    unit: Unit
    param: Tensor
    group: int


class _Swap(NamedTuple):
    """A gradient that was replaced for the length of a step."""

    param: Tensor
    grad: Tensor
    changed: Tensor
    version: int


class Decay:
    r"""Applies a decay rule at every ``optimizer.step()``, from the moment it is constructed.

    The optimizer keeps it alive and calls it through its step hooks; there is no ``decay.step()``. A
    parameter without a gradient is left alone, as the optimizer leaves it alone, and so is everything on a
    step that a GradScaler skips.

    Args:
        optimizer: Any torch.optim optimizer; it must hold the parameters.
        rule: A :class:`~normwise.decay.rules.Rule`.
        params: A parameter, a :class:`~normwise.units.Unit`, or several of these. Tensors are read as
            ``Unit(param, dim)``.
        dim: Which dimension counts the units of plain parameters: 0 rows, 1 columns, None whole tensors.
        mode: How the rule acts in a step of time t:

            - ``"flow"``: after the step, w ← w·φ(n, t)/n. Decoupled, exact, stable for any coefficient.
            - ``"explicit"``: before the step, w ← (1 − t·c(n))·w. With L2 this is AdamW, bit for bit.
            - ``"coupled"``: the optimizer sees ∇ + c(n)·w for ∇. With L2 this is torch's ``weight_decay``.
              ``param.grad`` itself is the same after the step as before it.
        clock: The time t of a step in the modes "flow" and "explicit": ``"lr"``, the learning rate of the
            parameter's group; ``"lr^2/max_lr"``, with the largest rate of that group so far (Defazio, "Why
            gradients rapidly increase near the end of training", arXiv 2506.02285); ``"step"``, 1.
        measure: The magnitude n that the rule sees: ``"norm"``, or ``"rms"``, the norm over √numel of the
            unit (for Adam-like optimizers, whose steps are constant per element).

    Attributes:
        optimizer: The optimizer that it is attached to.
        rule: The rule as given.
        units: The units that it acts on, as a tuple.
        steps: How many steps it has decayed; a scheduled coefficient is a function of this number.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed, a parameter is not in the optimizer, or is under a rule
            already.

    In ``step()``, mode "explicit" raises ValueError where t·c(n) ≥ 1, which would flip the weight, before
    anything has been changed; "coupled" raises on a closure, as the gradient does not exist yet when the
    step begins.

    Example:
        >>> import normwise as nw
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.01), layer.weight)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> decay
        Decay(AdaptiveWeightShrink(coefficient=0.01), 1 parameter, mode='flow', clock='lr', measure='norm')
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        params: Tensor | Unit | Iterable[Tensor | Unit],
        dim: int | None = 0,
        mode: str = "flow",
        clock: str = "lr",
        measure: str = "norm",
    ) -> None:
        check_settings(optimizer, rule, mode, clock, measure)
        self.optimizer = optimizer
        self.rule = rule
        self.mode = mode
        self.clock = clock
        self.measure = measure
        self.steps = 0
        self.units = check_units(optimizer, rule, params, dim)
        self._clock = Clock(clock)
        self._reference = self._reference_norms()
        # A subclass whose step() calls super().step() fires the hooks twice, and a step that raises never
        # fires the second: so each hook notes what it has done, and nothing is counted.
        self._in_step = False
        self._shrunk = False
        self._swaps: list[_Swap] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        copying.register(optimizer, self)

    # -- the hooks ---------------------------------------------------------------------------------------

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if self.mode == "coupled":
            if closure is not None:
                raise ValueError(
                    'mode="coupled" cannot work with a closure, whose gradient does not exist yet when the '
                    'step begins: call the closure before optimizer.step(), or use mode="flow"'
                )
            self._couple()
        nested, self._in_step = self._in_step, True
        if self.mode == "explicit" and not self._shrunk:
            if closure is None:
                self._shrink_explicitly()
            elif not nested:
                return self._with_closure(closure, args, kwargs)
        return None

    def _with_closure(self, closure: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shrink after the closure has been evaluated and before the gradient step, as AdamW does."""

        def closure_then_shrink() -> Any:
            loss = closure()
            if not self._shrunk:
                self._shrink_explicitly()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_shrink}
        return (args[0], closure_then_shrink, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        if not self._in_step:
            return
        if self.mode == "flow":
            self._shrink_by_flow()
        for param, grad, changed, _version in self._swaps:
            if param.grad is changed:
                param.grad = grad
        if not (self.rule.scheduled and self._skipped()):
            self.steps += 1
        self._swaps = []
        self._in_step = self._shrunk = False

    def _skipped(self) -> bool:
        """Whether a GradScaler makes a fused optimizer skip this step (reading this waits for CUDA)."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    # -- the three modes ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _shrink_by_flow(self) -> None:
        live = self._live()
        self._clock.advance(self.optimizer)
        magnitudes = {one.which: self._magnitudes(one.unit) for one in live}
        chunks: dict[Any, list[_Live]] = {}
        for one in live:  # one evaluation of the rule for all that share it, their time and their device
            of_its_own = one.which if self._reference else None
            chunks.setdefault((one.group, one.param.device, of_its_own), []).append(one)
        for (group, _, _), chunk in chunks.items():
            joined = torch.cat([magnitudes[one.which] for one in chunk])
            time = self._clock.time(self.optimizer, group)
            factors = flow_factors(self._rule_for(chunk[0].which), joined, time)
            for one, factor in zip(chunk, factors.split([one.unit.count for one in chunk]), strict=True):
                self._multiply(one, factor)

    @torch.no_grad()
    def _shrink_explicitly(self) -> None:
        live = self._live()
        self._clock.advance(self.optimizer)
        factors = []
        for one in live:
            time, name = self._clock.time(self.optimizer, one.group), name_of(self.optimizer, one.param)
            magnitudes = self._magnitudes(one.unit)
            factors.append(explicit_factors(self._rule_for(one.which), magnitudes, time, one.unit.mask, name))
        for one, factor in zip(live, factors, strict=True):  # only now, so that an error has changed nothing
            self._multiply(one, factor)
        self._shrunk = True

    @torch.no_grad()
    def _couple(self) -> None:
        # Called again in a nested step, or after one that raised: what holds its pull is not pulled twice.
        held = {
            id(s.param) for s in self._swaps if s.param.grad is s.changed and s.changed._version == s.version
        }
        scale = getattr(self.optimizer, "grad_scale", None)
        for which, unit, param, group in self._live():
            grad = param.grad
            if grad is None or id(param) in held:
                continue
            if grad.is_sparse:
                raise ValueError(
                    f'{name_of(self.optimizer, param)} has a sparse gradient, to which mode="coupled" cannot '
                    'add a dense pull: use mode="flow"'
                )
            sign = -1.0 if self.optimizer.param_groups[group].get("maximize") else 1.0
            changed = add_pull(grad, param, unit, self._rule_for(which), self._magnitudes(unit), sign, scale)
            param.grad = changed
            self._swaps.append(_Swap(param, grad, changed, changed._version))

    def _multiply(self, one: _Live, factor: Tensor | float) -> None:
        shrink(one.param, one.unit, factor, getattr(self.optimizer, "found_inf", None))

    def _live(self) -> list[_Live]:
        groups = group_of(self.optimizer)
        live = []
        for index, unit in enumerate(self.units):
            for param in unit.params:
                if id(param) not in groups:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(param.shape)} that this Decay was attached to is no "
                        "longer in the optimizer (was it replaced, as fully_shard does?): remove() this "
                        "Decay and construct it anew"
                    )
                if param.grad is not None:
                    live.append(_Live(index, unit, param, groups[id(param)]))
        return live

    def _magnitudes(self, unit: Unit) -> Tensor:
        norms = unit.norms()
        return norms / unit.numel**0.5 if self.measure == "rms" else norms

    def _rule_for(self, index: int) -> Rule:
        rule = self.rule.at(self.steps)
        return rule.bound_to(self._reference[index]) if self._reference else rule

    def _reference_norms(self) -> list[Tensor]:
        """What a Sphere without a radius holds each unit at: the magnitudes as they are now."""
        if not isinstance(self.rule, Sphere) or self.rule.radius is not None:
            return []
        references = [self._magnitudes(unit) for unit in self.units]
        for unit, reference in zip(self.units, references, strict=True):
            meant = reference if unit.mask is None else reference[unit.mask]
            if not bool(((meant > 0) & meant.isfinite()).all()):
                raise ValueError(
                    f"{name_of(self.optimizer, unit.params[0])} has units whose norm is zero or not finite, "
                    "through which no Sphere goes: give Sphere(radius=...), or initialise it first"
                )
        return references

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values and tensors (``weights_only=True``)."""
        return {
            "format": _STATE_FORMAT,
            "rule": self.rule.settings(),
            "mode": self.mode,
            "clock": self.clock,
            "measure": self.measure,
            "units": [unit.describe() for unit in self.units],
            "steps": self.steps,
            "max_lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in self._clock.max_lr],
            "reference": [reference.clone() for reference in self._reference],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state_dict of a Decay with the same rule, settings and units.

        Raises:
            ValueError: It was made by another rule, mode, clock, measure or by other units; the message
                names the difference, and nothing has been changed.
        """
        check_state(state_dict, self.state_dict())
        self.steps = state_dict["steps"]
        self._clock.max_lr = list(state_dict["max_lr"])
        self._reference = [
            saved.to(own, copy=True)
            for saved, own in zip(state_dict["reference"], self._reference, strict=True)
        ]

    def remove(self) -> None:
        """Detach from the optimizer: its steps decay nothing any more. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        copying.unregister(self.optimizer, self)

    def __reduce__(self) -> Any:
        return copying.reduce_decay(self)

    def __repr__(self) -> str:
        count = len({id(param) for unit in self.units for param in unit.params})
        return (
            f"Decay({self.rule}, {count} parameter{'s' if count != 1 else ''}, mode={self.mode!r}, "
            f"clock={self.clock!r}, measure={self.measure!r})"
        )
