"""A decay rule at work beside a torch.optim optimizer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.collectives import check_same, together
from normwise.decay import copying
from normwise.decay.checks import (
    check_options,
    check_parts,
    check_settings,
    check_state,
    check_units,
    name_of,
    parameters_of,
)
from normwise.decay.clock import Clock
from normwise.decay.compensation import Compensation
from normwise.decay.coupling import Coupling
from normwise.decay.live import Live, check_gradients, live_parameters
from normwise.decay.rules import Rule, Sphere
from normwise.decay.shrinking import Shrinking
from normwise.decay.watch import report_non_finite
from normwise.sharding import meshes_of
from normwise.units import Unit, from_checkpoint, local_units, to_checkpoint

__all__ = ["Decay"]

_STATE_FORMAT = 1


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
        compensated: Whether to keep decay that is finer than the precision of a parameter beside it until it
            can be seen (:class:`~normwise.decay.compensation.Compensation`). For bfloat16 and float16
            parameters without a float32 copy, whose decay would else be lost. Not in mode "coupled", where
            the optimizer itself rounds. Costs two more norms a step, and one number per unit in the state.
        nonfinite: What happens to a unit whose norm is not finite: ``"skip"``, the rule leaves it alone;
            ``"warn"`` or ``"raise"`` also say so, naming the parameter and the unit. Looking costs a pass
            over the weights and makes an accelerator wait; "skip" in mode "flow" never does.
        check_every: Look for such units in every so many steps only.

    Attributes:
        optimizer: The optimizer that it is attached to.
        rule: The rule as given.
        units: The units that it acts on, as a tuple.
        steps: How many steps it has decayed; a scheduled coefficient is a function of this number. (Steps
            that a GradScaler makes a fused optimizer skip count, unless the coefficient is scheduled.)

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed, a parameter is not in the optimizer, or is under a rule
            already.
        RuntimeError: In ``step()``, with ``nonfinite="raise"``.

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
        *,
        compensated: bool = False,
        nonfinite: str = "skip",
        check_every: int = 1,
    ) -> None:
        sharded = meshes_of(parameters_of(optimizer))
        with together(sharded):
            check_settings(optimizer, rule, mode, clock, measure)
            check_options(rule, mode, measure, compensated, nonfinite, check_every)
            self.units = check_units(optimizer, rule, params, dim)
            self._parts = [local_units(unit, functools.partial(name_of, optimizer)) for unit in self.units]
            check_parts(optimizer, rule, compensated, self.units, self._parts)
        self.optimizer = optimizer
        self.rule = rule
        self.mode = mode
        self.clock = clock
        self.measure = measure
        self.compensated = compensated
        self.nonfinite = nonfinite
        self.check_every = check_every
        self.steps = 0
        check_same(sharded, "what a Decay is given", self._in_words())
        self._clock = Clock(clock)
        self._compensation = Compensation(tuple(its[0] for its in self._parts)) if compensated else None
        self._shrinking = Shrinking(
            optimizer, self.units, self._parts, self._clock, measure, self._compensation
        )
        if isinstance(rule, Sphere) and rule.radius is None:
            self._shrinking.refer_to_present_norms()
        self._coupling = Coupling()
        # A subclass whose step() calls super().step() fires the hooks twice, and a step that raises never
        # fires the second: so each hook notes what it has done, and nothing is counted.
        self._in_step = False
        self._shrunk = False
        self._has_seen_gradients = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        copying.register(optimizer, self)

    # -- the hooks; torch.compile leaves them to Python, so that no number in them is compiled in ----------

    @torch.compiler.disable
    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if self.mode == "coupled" and closure is not None:
            raise ValueError(
                'mode="coupled" cannot work with a closure, whose gradient does not exist yet when the step '
                'begins: call the closure before optimizer.step(), or use mode="flow"'
            )
        if self.rule.scheduled and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the coefficient of {type(self.rule).__name__} is a function of the step, which a CUDA "
                "graph cannot call: give a number, or schedule the learning rate, as a tensor"
            )
        self._in_step = True
        if self.mode == "flow":
            self._shrinking.keep_weights(self.rule)
        elif self.mode == "coupled":
            live = self._live()
            self._report(live)
            self._coupling.add(self.optimizer, self.rule.at(self.steps), self._parts, live, self.measure)
        elif closure is not None:
            return self._with_closure(closure, args, kwargs)
        else:
            self._shrink_explicitly()
        return None

    def _with_closure(self, closure: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shrink after the closure has been evaluated and before the gradient step, as AdamW does."""

        def closure_then_shrink() -> Any:
            loss = closure()
            self._shrink_explicitly()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_shrink}
        return (args[0], closure_then_shrink, *args[2:]), kwargs

    def _shrink_explicitly(self) -> None:
        if self._shrunk:
            return
        live = self._live()
        self._report(live)
        self._clock.advance(self.optimizer)
        self._shrinking.explicitly(self.rule.at(self.steps), live)
        self._shrunk = True

    @torch.compiler.disable
    def _after_step(self, *_: Any) -> None:
        if not self._in_step:
            return
        self._in_step = self._shrunk = False
        if not self._has_seen_gradients:
            check_gradients(self.optimizer)
            self._has_seen_gradients = True
        self._coupling.restore()
        if self.mode == "flow":
            live = self._live()
            self._report(live)
            self._clock.advance(self.optimizer)
            self._shrinking.by_flow(self.rule.at(self.steps), live)
        if not (self.rule.scheduled and self._skipped()):
            self.steps += 1

    def _skipped(self) -> bool:
        """Whether a GradScaler makes a fused optimizer skip this step (reading this waits for CUDA)."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _live(self) -> list[Live]:
        return live_parameters(self.optimizer, self._parts)

    def _report(self, live: list[Live]) -> None:
        if self.steps % self.check_every == 0:
            report_non_finite(self.optimizer, live, self._parts, self.nonfinite)

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values and tensors (``weights_only=True``)."""
        return {
            "format": _STATE_FORMAT,
            "rule": self.rule.settings(),
            "mode": self.mode,
            "clock": self.clock,
            "measure": self.measure,
            "compensated": self.compensated,
            "units": [unit.describe() for unit in self.units],
            "steps": self.steps,
            "max_lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in self._clock.max_lr],
            "reference": [reference.clone() for reference in self._shrinking.reference],
            "pending": [
                [
                    to_checkpoint(factors, part, k)
                    for k, (factors, part) in enumerate(zip(one, parts, strict=True))
                ]
                for one, parts in zip(self._pending(), self._parts, strict=False)  # none, or one for each
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state_dict of a Decay with the same rule, settings and units.

        Raises:
            ValueError: It was made by another rule, mode, clock, measure or by other units; the message
                names the difference, and nothing has been changed.
        """
        check_state(state_dict, self.state_dict(), len(self.optimizer.param_groups))
        self.steps = state_dict["steps"]
        peaks = state_dict["max_lr"]  # copied, as they are changed in place
        self._clock.max_lr = [peak.clone() if isinstance(peak, Tensor) else peak for peak in peaks]
        for mine, theirs in zip(self._shrinking.reference, state_dict["reference"], strict=True):
            mine.copy_(theirs)
        for which, one in enumerate(self._pending()):
            for mine, theirs, part in zip(one, state_dict["pending"][which], self._parts[which], strict=True):
                mine.copy_(from_checkpoint(theirs, part))

    def _pending(self) -> list[list[Tensor]]:
        return [] if self._compensation is None else self._compensation.pending

    def remove(self) -> None:
        """Detach from the optimizer: its steps decay nothing any more. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._coupling.restore()  # in case that the last step raised
        copying.unregister(self.optimizer, self)

    def _in_words(self) -> str:
        """Return what all ranks must have in common, to be compared and read."""
        rule = ", ".join(f"{name}={value}" for name, value in self.rule.settings().items())
        settings = f"mode={self.mode!r}, clock={self.clock!r}, measure={self.measure!r}"
        units = hashlib.sha256(repr([unit.describe() for unit in self.units]).encode()).hexdigest()[:8]
        options = (
            f"compensated={self.compensated}, nonfinite={self.nonfinite!r}, check_every={self.check_every}"
        )
        return f"rule ({rule}), {settings}, {options} and {len(self.units)} units (digest {units})"

    def __reduce__(self) -> Any:
        return copying.reduce_decay(self)

    def __repr__(self) -> str:
        count = len({id(param) for unit in self.units for param in unit.params})
        return (
            f"Decay({self.rule}, {count} parameter{'s' if count != 1 else ''}, mode={self.mode!r}, "
            f"clock={self.clock!r}, measure={self.measure!r})"
        )
