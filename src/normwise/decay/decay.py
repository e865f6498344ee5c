"""A decay rule attached to a torch.optim optimizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.collectives import check_same, together
from normwise.decay import copying, riding
from normwise.decay.checks import (
    check_options,
    check_rates,
    check_settings,
    check_units,
    check_whole_units,
    parameters_of,
    warn_of_bypassed_steps,
    watch_weight_decay,
)
from normwise.decay.clock import Clock, ElapsedTime
from normwise.decay.kahan import KahanScale
from normwise.decay.modes import Schedule, mode_class
from normwise.decay.rules import Rule
from normwise.decay.saved_state import check_state
from normwise.decay.second_copies import check_second_copies
from normwise.decay.start import Start
from normwise.decay.state_making import only_makes_state
from normwise.decay.targets import Targets, check_gradients
from normwise.decay.wrappers import unwrapped
from normwise.sharding import meshes_of
from normwise.units import Unit, from_checkpoint, meshes_with_distributed_units, to_checkpoint

__all__ = ["Decay"]

_logger = logging.getLogger("normwise")
_STATE_FORMAT = 3


class Decay:
    r"""Applies a decay rule at every ``optimizer.step()``, from the moment it is constructed.

    The optimizer keeps it alive and calls it through step hooks; there is no ``decay.step()``. It leaves
    alone what the optimizer leaves alone: parameters without a gradient, and all parameters on a step that a
    GradScaler skips.

    Args:
        optimizer: Any torch.optim optimizer; it must hold the parameters. What Lightning, Fabric or
            Accelerate has wrapped around it is taken off.
        rule: A :class:`~normwise.decay.rules.Rule`.
        params: A parameter, a :class:`~normwise.units.Unit`, or several of these. A tensor means
            ``Unit(tensor, dim)``, whatever the model normalises; where the rule depends on the norm, this is
            logged. ``Invariances.units(model)`` are the units whose decay changes no output (up to eps).
        dim: Which dimension counts the units of plain parameters: 0 rows, 1 columns, None whole tensors.
        mode: How the rule acts in a step of time t:

            - ``"flow"``: after the step, w ← w·φ(n, t)/n. Decoupled, exact, stable for any coefficient.
            - ``"explicit"``: before the step, w ← (1 − t·c(n))·w. With L2 this is AdamW, bit for bit.
            - ``"coupled"``: the optimizer sees ∇ + c(n)·w instead of ∇. With L2 this is torch's
              ``weight_decay``. ``param.grad`` is unchanged after the step.
        clock: The time t of a step in the modes "flow" and "explicit": ``"lr"``, the learning rate of the
            parameter's group; ``"lr^2/max_lr"``, with the largest rate of that group so far (Defazio, "Why
            gradients rapidly increase near the end of training", arXiv 2506.02285); ``"step"``, 1.
        measure: The magnitude n that the rule sees: ``"norm"``, or ``"rms"``, the norm over √numel of the
            unit (for Adam-like optimizers, whose steps are constant per element), or ``"relative"``, the norm
            over the norm that the unit had when the rule was attached (or placed by ``start``). A coefficient
            is then the rate at that norm, whatever the norm is.
        every: In mode "flow", apply the rule after every so many steps, for the sum of their times. The other
            steps cost almost nothing. Flows compose, φ(φ(n, s), t) = φ(n, s + t), so this changes only how
            the rule and the gradient steps alternate. Under L2 the factor is exactly that of the single
            steps. Under c(n) ∝ nᵖ, for the same updates, the norm after one application is smaller by a
            fraction of about (1 + p)·D·G·(k − 1)/2k, where k = ``every``, D = c(n)·Σt, and G is the relative
            growth of the norm by the updates in between; at equilibrium G = D. Both are of the order of a
            learning rate, so the fraction is of second order. See also :meth:`flush`.
        compensated: Whether to keep decay that is finer than a parameter's precision beside the parameter,
            until it is large enough to apply (:class:`~normwise.decay.kahan.KahanScale`). For bfloat16 and
            float16 parameters without a float32 copy, which would otherwise lose this decay. Not in mode
            "coupled", where the optimizer rounds. Costs two more norms per application, and one number per
            unit in the state.
        nonfinite: What happens to a unit whose norm is not finite, or for whose new norm the weight's type
            has no numbers. ``"skip"``: the rule leaves it alone. ``"warn"`` or ``"raise"`` also say so,
            naming the parameter and the unit. Looking costs a pass over the weights and makes an accelerator
            wait; "skip" in mode "flow" never does.
        check_every: Look for such units in every so many steps only.
        start: What places the units in equilibrium, in the first steps. ``plan.attach`` and ``nw.attach``
            make it.

    Attributes:
        optimizer: The optimizer.
        rule: The rule as given.
        units: The units that the rule acts on, as a tuple.
        steps: The number of steps so far; a scheduled coefficient is a function of this number. (Steps that a
            GradScaler makes a fused optimizer skip count, unless the coefficient is scheduled.)

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed, a parameter is not in the optimizer, or is under a rule
            already.
        RuntimeError: In ``step()``, with ``nonfinite="raise"``.

    In ``step()``, mode "explicit" raises ValueError where t·c(n) ≥ 1, which would flip the weight, before
    anything has been changed.

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
        every: int = 1,
        *,
        compensated: bool = False,
        nonfinite: str = "skip",
        check_every: int = 1,
        start: Start | None = None,
    ) -> None:
        optimizer = unwrapped(optimizer)
        schedule = Schedule(every, check_every, nonfinite)
        sharded = meshes_of(parameters_of(optimizer))
        with together(sharded):
            check_settings(optimizer, rule, mode, clock, measure)
            kind = mode_class(rule, mode)
            check_options(rule, mode, kind, measure, compensated, schedule)
            given = [params] if isinstance(params, (Tensor, Unit)) else list(params)
            self.units = check_units(optimizer, rule, given, dim)
            check_rates(optimizer, self.units, mode, clock)
            self._targets = Targets(optimizer, self.units, measure)
            check_whole_units(self._targets, rule, kind, compensated)
            self._targets.has_second_copies = check_second_copies(
                optimizer, mode, scales=kind.scales, compensated=compensated
            )
        self.optimizer = optimizer
        self.rule = rule
        self.mode = mode
        self.clock = clock
        self.measure = measure
        self.every = every
        self.compensated = compensated
        self.nonfinite = nonfinite
        self.check_every = check_every
        self.start = start
        self.steps = 0
        check_same(sharded, "what a Decay is given", self._in_words())
        if compensated:
            self._targets.kahan = KahanScale([parts[0] for parts in self._targets.local])
        if rule.needs_initial_norms or measure == "relative":
            self._targets.keep_initial_magnitudes()
        self._clock = Clock(clock)
        self._elapsed = ElapsedTime()
        self._mode = kind(rule, self._targets, self._clock, self._elapsed, schedule)
        self._notes: list[str] = []  # further lines for explain()
        # A subclass whose step() calls super().step() fires the hooks twice, and a step that raises never
        # fires the second: so each hook notes what it has done, and nothing is counted.
        self._in_step = False
        self._has_seen_gradients = False
        warn_of_bypassed_steps(optimizer)
        # torch.compile must leave the hooks to Python, or it would compile their numbers in. It is disabled
        # here, not by a decorator, as that would import torch._dynamo, which takes a second, with normwise.
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
            *watch_weight_decay(optimizer, self.units),
        ]
        copying.register(optimizer, self)
        riding.ride(optimizer, "decay", self)
        self._log_how_tensors_are_taken(sum(isinstance(item, Tensor) for item in given), dim)

    def _log_how_tensors_are_taken(self, number: int, dim: int | None) -> None:
        """Say which units plain tensors are, where that matters: where the rule depends on the norm."""
        if not number or self.rule.constant_rate is not None:
            return
        what = {None: "as whole tensors", 0: "row by row", 1: "column by column"}.get(dim, "slice by slice")
        several = "1 parameter is" if number == 1 else f"{number} parameters are"
        _logger.info(
            "%s decayed %s (dim=%s); give Units (Invariances.units) or use plan.attach to choose",
            several,
            what,
            dim,
        )

    # -- the hooks ---------------------------------------------------------------------------------------

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._in_step = False
        if only_makes_state(self.optimizer, args, kwargs):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        self._check_capture()
        self._in_step = True
        self._targets.note_gradients()
        starts = self.start is not None and self.start.waiting
        acts_inside = closure is not None and (self._mode.inside_closure or starts)
        if not acts_inside:
            self._act_on_gradients(starts)
        if closure is None:
            return None

        def closure_then_decay() -> Any:
            self._mode.restore()  # an optimizer may evaluate its closure twice
            loss = closure()
            self._targets.note_gradients()
            if acts_inside:
                self._act_on_gradients(starts)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_decay}
        return (args[0], closure_then_decay, *args[2:]), kwargs

    def _act_on_gradients(self, starts: bool) -> None:
        if starts:
            assert self.start is not None
            self.start.place(self._targets)
        self._mode.before_step(self.steps)

    def _check_capture(self) -> None:
        """Raise if a CUDA graph is being captured and a replay would not do what a step does."""
        scheduled, counted = self.rule.scheduled, self.every > 1
        starts = self.start is not None and self.start.waiting
        if not (scheduled or counted or starts) or not torch.cuda.is_available():
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the coefficient of {type(self.rule).__name__} is a function of the step, which a CUDA "
                "graph cannot call: give a number, or schedule the learning rate, as a tensor"
                if scheduled
                else "the start in equilibrium measures gradients in the first steps, which a CUDA graph "
                "cannot do: take these steps before the capture"
                if starts
                else f"every={self.every} counts steps, which a CUDA graph cannot do: use every=1"
            )

    def _after_step(self, *_: Any) -> None:
        if not self._in_step:
            return
        self._in_step = False
        if not self._has_seen_gradients:
            if not self._targets.noted_gradients:
                check_gradients(self.optimizer)
            self._has_seen_gradients = True
        self._mode.after_step(self.steps)
        if not (self.rule.scheduled and self._skipped()):
            self.steps += 1

    def _skipped(self) -> bool:
        """Whether a GradScaler makes a fused optimizer skip this step (reading this waits for CUDA)."""
        found_inf = self._targets.found_inf
        return found_inf is not None and bool(found_inf)

    def flush(self) -> None:
        """Apply the time that has passed since the rule was last applied, with ``every`` above 1.

        Call it before an evaluation, an export, or a comparison of weights at the end of training, so that
        the weights have all of their decay. It is not needed before a checkpoint: the time that has not been
        applied is part of :meth:`state_dict`, and a resumed run equals an uninterrupted one to the bit. With
        sharded parameters all ranks must call it together.

        Example:
            >>> import normwise as nw
            >>> weight = torch.nn.Parameter(torch.ones(1, 4))
            >>> optimizer = torch.optim.SGD([weight], lr=0.1)
            >>> decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(1.0), weight, every=8)
            >>> weight.grad = torch.zeros(1, 4)
            >>> optimizer.step()
            >>> weight[0, 0].item()
            1.0
            >>> decay.flush()
            >>> round(weight[0, 0].item(), 6)  # 1/(1 + λnt)
            0.833333
        """
        self._mode.flush(self.steps)

    def explain(self) -> str:
        """Return what this Decay does, as text.

        Example:
            >>> import normwise as nw
            >>> layer = torch.nn.Linear(3, 2)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            >>> print(nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.01), layer.weight, every=8).explain())
            AdaptiveWeightShrink(coefficient=0.01)
              units    2 rows of 1 parameter
              clock    "lr": the time of a step is the learning rate of the parameter's group
              measure  "norm": the norm of a unit
              mode     "flow": after the step, w ← w·φ(n, t)/n
              every    8 steps, for the sum of their times; flush() applies it at once
        """
        lines = [
            ("units", self._units_in_words()),
            ("clock", _CLOCKS[self.clock]) if self.mode != "coupled" else ("clock", "none"),
            ("measure", _MEASURES[self.measure]),
            ("mode", _MODES[self.mode]),
            (
                "every",
                "1 step"
                if self.every == 1
                else f"{self.every} steps, for the sum of their times; flush() applies it at once",
            ),
        ]
        if self.compensated:
            lines.append(("precision", "decay finer than the weights' precision is kept (compensated)"))
        width = max(len(name) for name, _ in lines)
        described = [f"  {name:{width}}  {text}" for name, text in lines]
        return "\n".join([str(self.rule), *described, *(f"  {note}" for note in self._notes)])

    def _units_in_words(self) -> str:
        counts: dict[str, int] = {}
        for unit in self.units:
            kind = {None: "whole tensors", 0: "rows", 1: "columns"}.get(
                unit.dim, f"slices along dim={unit.dim}"
            )
            acting = unit.count if unit.mask is None else int(unit.mask.sum())
            counts[kind] = counts.get(kind, 0) + acting
        number = len({id(param) for unit in self.units for param in unit.params})
        units = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        return f"{units} of {number} parameter{'s' if number != 1 else ''}"

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values and tensors (``weights_only=True``)."""
        local = self._targets.local
        return {
            "format": _STATE_FORMAT,
            "rule": self.rule.settings(),
            "mode": self.mode,
            "clock": self.clock,
            "measure": self.measure,
            "every": self.every,
            "compensated": self.compensated,
            "units": [unit.describe() for unit in self.units],
            "steps": self.steps,
            "elapsed": self._elapsed.state(len(unit.params) for unit in self.units),
            "max_lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in self._clock.max_lr],
            "start": [] if self.start is None else self.start.state(),
            "reference": [magnitudes.clone() for magnitudes in self._targets.initial],
            "pending": [
                [
                    to_checkpoint(factors, part, k)
                    for k, (factors, part) in enumerate(zip(of_unit, parts, strict=True))
                ]
                for of_unit, parts in zip(self._pending(), local, strict=False)  # none, or one for each
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state_dict of a Decay with the same rule, settings and units.

        ``optimizer.load_state_dict()`` does this too, if the optimizer's state was saved with a Decay. With
        sharded parameters all ranks must call this together.

        Raises:
            ValueError: The state was saved with another rule, mode, clock, measure or ``every``, or with
                other units, or a value in it is not one that a Decay has. The message names the difference,
                and nothing has been changed.
        """
        self.check_state_dict(state_dict)
        pending = [
            [from_checkpoint(saved, part) for saved, part in zip(of_unit, parts, strict=True)]
            for of_unit, parts in zip(state_dict["pending"], self._targets.local, strict=False)
        ]
        self.steps = state_dict["steps"]
        self._elapsed.load(state_dict["elapsed"])
        peaks = state_dict["max_lr"]  # copied, as they are changed in place
        self._clock.max_lr = [p.detach().clone() if isinstance(p, Tensor) else float(p) for p in peaks]
        if self.start is not None:
            self.start.load(state_dict["start"])
        for present, saved in zip(self._targets.initial, state_dict["reference"], strict=True):
            present.copy_(saved)
        self._targets.forget_limits()
        for of_unit, loaded in zip(self._pending(), pending, strict=True):
            for present, saved in zip(of_unit, loaded, strict=True):
                present.copy_(saved)
        riding.note_loaded(self.optimizer, self)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ValueError that :meth:`load_state_dict` would raise, if any."""
        with together(meshes_with_distributed_units(self._targets.local)):
            rates = [group.get("lr", 0.0) for group in self.optimizer.param_groups]
            check_state(state_dict, self.state_dict(), self.units, rates)

    def _pending(self) -> list[list[Tensor]]:
        return [] if self._targets.kahan is None else self._targets.kahan.pending

    def remove(self) -> None:
        """Detach from the optimizer, whose steps decay nothing from then on. A second call does nothing.

        Time that has passed and is not applied yet (``every``) is dropped: call :meth:`flush` before.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._mode.restore()  # in case that the last step raised
        copying.unregister(self.optimizer, self)
        riding.leave(self.optimizer, self)

    def _in_words(self) -> str:
        """Return what must be the same on all ranks, to be compared and read."""
        rule = ", ".join(f"{name}={value}" for name, value in self.rule.settings().items())
        settings = f"mode={self.mode!r}, clock={self.clock!r}, measure={self.measure!r}, every={self.every}"
        units = hashlib.sha256(repr([unit.describe() for unit in self.units]).encode()).hexdigest()[:8]
        options = (
            f"compensated={self.compensated}, nonfinite={self.nonfinite!r}, check_every={self.check_every}"
        )
        return f"rule ({rule}), {settings}, {options} and {len(self.units)} units (digest {units})"

    def __reduce__(self) -> Any:
        return copying.reduce_decay(self)

    def __repr__(self) -> str:
        count = len({id(param) for unit in self.units for param in unit.params})
        every = f", every={self.every}" if self.every > 1 else ""
        return (
            f"Decay({self.rule}, {count} parameter{'s' if count != 1 else ''}, mode={self.mode!r}, "
            f"clock={self.clock!r}, measure={self.measure!r}{every})"
        )


_CLOCKS = {
    "lr": '"lr": the time of a step is the learning rate of the parameter\'s group',
    "lr^2/max_lr": '"lr^2/max_lr": the time of a step is lr², over the largest lr of the group so far',
    "step": '"step": the time of a step is 1',
}
_MEASURES = {
    "norm": '"norm": the norm of a unit',
    "rms": '"rms": the norm of a unit over the root of the number of its elements',
    "relative": '"relative": the norm of a unit over the norm at which it started',
}
_MODES = {
    "flow": '"flow": after the step, w ← w·φ(n, t)/n',
    "explicit": '"explicit": before the step, w ← (1 − t·c(n))·w',
    "coupled": '"coupled": the optimizer sees ∇ + c(n)·w instead of ∇',
}
