"""Find the invariances of any network: the stages of the search, in order."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normwise.invariance.derivative_check import false_gradients
from normwise.invariance.inputs_outputs import (
    bind_forward,
    is_about_precision,
    is_probed,
    take_batches,
)
from normwise.invariance.joint import find_joint
from normwise.invariance.probe import (
    JITTER,
    NonFiniteOutputsError,
    Probe,
    ProbeMode,
    check_model,
    preserved_random_state,
)
from normwise.invariance.rescale_check import (
    RescaleCheck,
    replace_values,
    scale_units,
    shift_units,
)
from normwise.invariance.result import Evidence, Invariances, SearchStats
from normwise.invariance.scale_gradients import scale_gradients
from normwise.invariance.verdicts import DraftVerdicts, EpsPasses, Thresholds, draft_verdicts

__all__ = ["find_invariances"]

# The probe computes in float64, where a zero is a zero, for up to this many weights.
DOUBLE_UP_TO = 1 << 27
DOUBLE_UP_TO_HALF = 1 << 24  # for half-precision models, which need a quarter of the memory themselves
# Larger models are stored narrow (see StandIns). Smaller ones get a copy: its weights are parameters, where
# reads of narrow ones are not, so that it serves models that read their weights in unusual ways.
NARROW_ABOVE = 1 << 22
MAX_BATCHES = 8
POINTS, COTANGENTS = 2, 4  # verdicts: generic points with shrunk eps, and backward passes at each
EXACT, EXACT_SHIFTS = 1, 2  # passes at each with Σ(wg)², which only tell sizes, without and with shifts
DRAWN_SEEDS = range(2, 8)  # points with the model's random draws, if it has any that the probe fixes
BALANCED_SEEDS = range(8, 12)  # points with balanced weights, if the signal dies at the others
NUDGE, NUDGED_COTANGENTS = 1e-4, 2
SCALES_WITH_VALUES = 100.0  # an effect grows with the change of values at least so much more than rounding
OWN_SEED = 12  # the model's own values
# Points at which to look for branches that the model takes rarely, and how many of them a parameter needs.
RARE_SEEDS, FEW_RARE, POINTS_OF_RARE = range(16, 64), 16, 2
_NEARBY = 2**-6  # of a doubling: a change of 1 %
_CHECK_SEEDS = (0, 1)
# The default type and the random state belong to the process.
_ONE_AT_A_TIME = threading.RLock()


def find_invariances(
    model: nn.Module,
    batches: Any,
    forward: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    *,
    joint: bool = True,
    progress: bool = True,
) -> Invariances:
    """Find which weights of a network are scale-invariant, and all joint rescaling symmetries.

    For an output f, a random cotangent v and a parameter w with gradient g = Jᵀv, Euler's identity says that
    Σ wᵢgᵢ = v·∂f(αw)/∂α at α = 1. The sum vanishes if the scale of w has no effect (Li, Chen & Yang 2020,
    doi 10.1609/aaai.v34i04.5904, section 2, for a normalised weight). One backward pass gives this sum for
    every parameter, row and column, and the null space of the sums contains all joint symmetries.

    The network is probed at random values near those of its parameters, in training mode, with dropout off
    and the eps of its norms shrunk. A model that is already in training mode keeps the flags of its modules.
    Rescaling confirms every result. The model is left unchanged, even after an exception.

    Args:
        model: Any module with a trainable parameter. Frozen parameters get verdicts too.
        batches: An iterable of batches, of which at most 8 are read, or a single tensor or mapping. A batch
            is a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``). If the model
            fails on a tuple, only the first part of each batch is used, as from a loader of (inputs, labels).
        forward: A function (model, batch) → outputs, if the model is called differently or only some outputs
            count. A symmetry leaves all outputs unchanged: tensors in nested tuples, lists, mappings and
            dataclasses.
        tolerance: A unit is invariant if its residual ``|Σwg|/√Σ(wg)²`` is at most this; less than 0.1.
            Default: 1e-5 in float64, 1e-3 in float32.
        joint: Whether to find joint symmetries, which takes more passes.
        progress: Whether to show a progress bar on a terminal after two seconds, if tqdm is installed.

    Raises:
        TypeError: If the model cannot be probed (scripted or sharded), or an argument has a wrong type.
        ValueError: If the model has no trainable parameter, there are no batches, no output depends on a
            parameter, or the outputs are NaN.
        RuntimeError: If the model fails on a batch, or memory runs out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> norm = nn.BatchNorm2d(8)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        >>> inv = find_invariances(net, [torch.randn(16, 3, 4, 4)])
        >>> inv.scale_invariant, inv.no_effect
        ({'0.weight': 0}, {'0.bias'})
        >>> inv.joint
        [{'1.weight': 1, '1.bias': 1, '4.weight': -1}]
    """
    check_model(model)
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < 0.1
    ):
        raise ValueError(
            f"tolerance={tolerance!r} must be a number above 0 and below 0.1, or None for the default"
        )
    call = bind_forward(forward)
    devices = {p.device for p in model.parameters()}
    with (
        _ONE_AT_A_TIME,
        torch.inference_mode(False),
        preserved_random_state(devices),
        _ProgressBar(progress) as bar,
    ):
        taken = take_batches(batches, MAX_BATCHES)
        precisions = _precisions(model)
        note = ""
        for dtype, narrow in precisions:
            thresholds = Thresholds.of(dtype, tolerance)
            for jitter in (JITTER, JITTER / 10):
                probe = Probe(model, taken, call, dtype, jitter, thresholds.eps_factor, narrow=narrow)
                try:
                    with probe:
                        result = _Search(model, probe, thresholds, bar).run(joint)
                        result.stats.note = note if dtype == torch.float32 else ""
                        return result
                except NonFiniteOutputsError:
                    if jitter != JITTER:
                        raise
                except (RuntimeError, TypeError) as error:
                    if (dtype, narrow) == precisions[-1] or not is_about_precision(error):
                        raise
                    if dtype == torch.float64:
                        note = (
                            "computed in float32, which is less certain: the model does not run in float64 "
                            f"({str(error).splitlines()[0]}). Use operations that do; for experts of "
                            'transformers: model.set_experts_implementation("eager")'
                        )
                    break
    raise AssertionError("unreachable: the last precision returns or raises")


def _precisions(model: nn.Module) -> list[tuple[torch.dtype, bool]]:
    """Return (type of the computation, whether weights are stored narrow), the most precise first."""
    parameters = [p for p in model.parameters() if is_probed(p)]
    weights = sum(p.numel() for p in parameters)
    if any(p.device.type == "mps" for p in parameters):
        return [(torch.float32, False)]
    if any(p.dtype in (torch.float64, torch.complex128) for p in parameters):
        return [(torch.float64, False)]
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
    fits = weights <= (DOUBLE_UP_TO_HALF if half else DOUBLE_UP_TO)
    if not fits:
        return [(torch.float32, True), (torch.float32, False)]
    precisions = [(torch.float64, False), (torch.float32, False)]
    return precisions if weights <= NARROW_ABOVE else [(torch.float64, True), *precisions]


@dataclass(frozen=True)
class _Rescaling:
    """A parameter to change: its index and units, the mask of units to change, and their blocks.

    With ``shifts``, constants are added to the units instead.
    """

    index: int
    dim: int | None
    mask: Tensor | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    shifts: bool = False


def _touched(item: _Rescaling) -> list[int]:
    return [item.index]


class _Search:
    """One search, at one precision."""

    def __init__(self, model: nn.Module, probe: Probe, thresholds: Thresholds, bar: _ProgressBar) -> None:
        self._probe, self._thresholds, self._bar = probe, thresholds, bar
        self._check = RescaleCheck(probe, _CHECK_SEEDS)
        self._result = Invariances(
            evidence={name: Evidence("undetermined") for name, _ in model.named_parameters()},
            frozen={name for name, p in model.named_parameters() if not p.requires_grad},
            undetermined=dict(probe.unprobed),
            stats=SearchStats(dtype=str(probe.dtype).removeprefix("torch.")),
        )

    def run(self, joint: bool) -> Invariances:
        """Return the result."""
        passes, draft = self._draft()
        self._decide_silent(draft)
        self._decide_false_gradients(draft, passes)
        self._confirm(draft)
        self._record(draft)
        if joint:
            find_joint(
                self._probe,
                passes,
                self._result,
                self._thresholds,
                self._check,
                self._bar.update,
                nearby=draft.nearby,
            )
        self._result.stats.trials = self._check.passes
        return self._result

    def _draft(self) -> tuple[EpsPasses, DraftVerdicts]:
        """Return the backward passes and draft verdicts."""
        outside: dict[int, str] = {}
        passes = EpsPasses()
        for seed in range(1, POINTS):
            self._add_passes(passes, seed, outside)
        self._add_passes(passes, 0, outside)
        self._add_passes(passes, 0, None)
        if self._probe.fixes_draws or not all(
            (row.reached == passes.shrunk[0].reached).all() for row in passes.shrunk
        ):
            self._add_passes_in(ProbeMode(keep_branches=False), DRAWN_SEEDS, passes, outside)
        if self._probe.draws_single_numbers:
            self._add_rare_passes(passes, outside, RARE_SEEDS)
        elif self._probe.fixes_draws:  # one number per sample, say: each point has many
            self._add_rare_passes(passes, outside, RARE_SEEDS[:FEW_RARE])
        if passes.faint(self._thresholds):
            self._probe.nudge = NUDGE
            invisible = {int(k) for k in np.flatnonzero(~passes.visible(self._thresholds))}
            passes.nudged = list(
                scale_gradients(self._probe, 1, NUDGED_COTANGENTS, invisible, shifts=True, only=invisible)
            )
            self._probe.nudge = 0.0
        if passes.signal_dies(self._thresholds):
            passes.balanced_from = len(passes.shrunk)
            self._add_passes_in(ProbeMode(balanced=True), BALANCED_SEEDS, passes, outside)
        self._result.stats.passes = len(passes.shrunk) + len(passes.real) + len(passes.nudged)
        shapes = [p.shape for p in self._probe.parameters]
        if not any(row.reached.any() for row in passes.shrunk) and not outside:
            raise ValueError(
                "the outputs depend on no parameter: return what the model computes, or give forward="
            )
        return passes, draft_verdicts(shapes, passes, outside, self._thresholds)

    def _add_passes_in(
        self, mode: ProbeMode, seeds: range, passes: EpsPasses, outside: dict[int, str]
    ) -> None:
        """Add backward passes in another mode, at more points if some parameters stay invisible."""
        self._probe.mode = mode
        for seed in seeds:
            self._check.modes[seed] = mode
            self._add_passes(passes, seed, outside)
            if seed > seeds[0] and passes.visible(self._thresholds).all():
                break
        self._add_passes(passes, seed, None)
        self._probe.mode = ProbeMode()

    def _add_rare_passes(self, passes: EpsPasses, outside: dict[int, str], seeds: range) -> None:
        """Add backward passes under draws at which parameters without a gradient so far get one."""
        mode = ProbeMode(keep_branches=False, every_draw=True)
        invisible = {int(k) for k in np.flatnonzero(~passes.visible(self._thresholds))}
        found = dict.fromkeys(invisible, 0)
        largest = max(float(row.squares.max()) for row in passes.shrunk if row.has_squares)
        last = None
        for seed in seeds:
            wanted = {k for k, count in found.items() if count < POINTS_OF_RARE}
            if not wanted:
                break
            self._probe.mode = mode
            (row,) = scale_gradients(self._probe, seed, 1, None, only=wanted)
            seen = {k for k in wanted if row.squares[k] > self._thresholds.silent**2 * largest}
            if seen:
                self._check.modes[seed] = mode
                self._add_passes(passes, seed, outside)
                last = seed
                found.update({k: found[k] + 1 for k in seen})
        if last is not None:
            self._add_passes(passes, last, None)
        self._probe.mode = ProbeMode()

    def _add_passes(self, passes: EpsPasses, seed: int, outside: dict[int, str] | None) -> None:
        """Add backward passes with shrunk eps; without ``outside``, at the model's eps."""
        real_eps = outside is None
        rows = passes.real if real_eps else passes.shrunk
        everything = set(range(len(self._probe.parameters)))
        # Shifts need as many sums again: at one point, and where random draws may leave parameters out.
        shifts = not real_eps and (seed == POINTS - 1 or self._probe.mode != ProbeMode())
        # In float32 a pass that records a graph may round too differently.
        seen = not real_eps and seed in _CHECK_SEEDS and self._probe.dtype == torch.float64
        keep_outputs = functools.partial(self._check.remember, seed) if seen else None
        for row in scale_gradients(
            self._probe,
            seed,
            COTANGENTS,
            everything,
            real_eps=real_eps,
            outside=outside,
            shifts=shifts,
            squares=EXACT_SHIFTS if shifts else EXACT,
            keep_outputs=keep_outputs,
        ):
            rows.append(row)
            done = len(passes.shrunk) + len(passes.real)
            self._bar.update("verdicts", done, (POINTS + 1) * COTANGENTS)
        if real_eps:
            passes.paired += passes.shrunk[-COTANGENTS:]

    def _decide_silent(self, draft: DraftVerdicts) -> None:
        """Replace the values of parameters without a visible gradient, and decide by the outputs."""
        if draft.silent:
            self._check.modes[OWN_SEED] = ProbeMode(as_is=True)
        changes = self._changes_by_replacement(draft.silent, tolerance=self._thresholds.traces)
        by_size = {k: change for k, change in changes.items() if change > self._thresholds.replaced}
        by_sign = self._changes_by_replacement([k for k in draft.silent if k not in by_size], signs=True)
        self._check.modes.pop(OWN_SEED, None)
        traces = self._traces([k for k in changes if k not in by_size and k not in by_sign])
        # A dead parameter wakes up near zero; if a norm removes its size, only its sign matters.
        by_any_size = self._changes_by_replacement(list(by_sign), decades=6.0)
        changed = self._changes_by_replacement(draft.canceling, signs=True)
        for k in set(draft.canceling) - changed.keys():
            draft.evidence[k] = Evidence("no effect")
            draft.masks.pop(k, None)
        for k in draft.silent:
            if k in by_sign and k not in by_any_size:
                draft.evidence[k] = self._only_signs_matter(k)
            elif k in by_size or k in by_sign:
                why = "dead: its gradient is zero at the probed points"
                if k in draft.unreached:
                    why = "no gradient reaches it (torch.no_grad or detach)"
                change, values = (by_size[k], "values") if k in by_size else (by_sign[k], "signs")
                reason = f"{why}, but other {values} change the outputs by {change:.0e}"
                draft.evidence[k] = Evidence("undetermined", reason=reason)
            elif k in traces:
                reason = f"its effect is tiny: other values change the outputs by {traces[k]:.0e}"
                draft.evidence[k] = Evidence("undetermined", reason=reason)
            else:
                draft.evidence[k] = Evidence("no effect")

    def _traces(self, indices: list[int]) -> dict[int, float]:
        """Return {parameter: change of the outputs} for effects that are tiny, but no rounding errors.

        The change of an effect grows with the change of the values; that of rounding errors hardly does.
        """
        tolerance = self._thresholds.traces
        changes = self._changes_by_replacement(indices, tolerance=tolerance)
        nudged: dict[int, float] = {}
        for k in changes:
            nudged |= self._changes_by_replacement([k], decades=NUDGE, tolerance=0.0)
        return {
            k: change for k, change in changes.items() if change > SCALES_WITH_VALUES * nudged.get(k, 0.0)
        }

    def _changes_by_replacement(
        self,
        indices: list[int],
        *,
        signs: bool = False,
        decades: float = 1.0,
        tolerance: float | None = None,
    ) -> dict[int, float]:
        """Return {parameter: change of the outputs} for those whose replacement changes the outputs."""

        def replace(item: _Rescaling, generator: torch.Generator) -> None:
            replace_values(self._probe.parameters[item.index], generator, signs=signs, decades=decades)

        items = [_Rescaling(k, None) for k in indices]
        allowed = self._thresholds.replaced if tolerance is None else tolerance
        failures = self._check.failures(items, replace, _touched, allowed)
        return {indices[position]: change for position, change in failures.items()}

    def _only_signs_matter(self, k: int) -> Evidence:
        """Return the evidence for a parameter whose sizes have no effect: each value is a unit."""
        shape = self._probe.parameters[k].shape
        dim = None if not shape else 1 if len(shape) > 1 and shape[1] == shape.numel() > 1 else 0
        units = shape[dim] if dim is not None else 1
        reason = "only the signs of its values have an effect"
        return Evidence(
            "scale-invariant", dim, residual=0.0, units=units, invariant_units=units, reason=reason
        )

    def _decide_false_gradients(self, draft: DraftVerdicts, passes: EpsPasses) -> None:
        """Rescale parameters whose gradients are not those of the outputs, and decide by that."""
        if self._probe.dtype != torch.float64:
            return
        candidates = [k for k, e in enumerate(draft.evidence) if e.verdict == "not invariant"]
        points = [(0, passes.paired[:COTANGENTS]), (1, passes.shrunk[:COTANGENTS])]
        for k in false_gradients(self._probe, points, candidates, self._check.unchanged):
            for dim in [*range(min(2, self._probe.parameters[k].ndim)), None]:
                item = _Rescaling(k, dim)
                if not self._check.failures([item], self._rescale, _touched, self._thresholds.unchanged):
                    units = 1 if dim is None else self._probe.parameters[k].shape[dim]
                    reason = "by rescaling alone: its gradient is not that of the outputs"
                    draft.evidence[k] = Evidence(
                        "scale-invariant", dim, units=units, invariant_units=units, reason=reason
                    )
                    break

    def _confirm(self, draft: DraftVerdicts) -> None:
        """Rescale and shift what seems to be invariant, and refute what changes the outputs."""
        scalings = [
            _Rescaling(k, evidence.dim, draft.masks.get(k), tuple(evidence.blocks))
            for k, evidence in enumerate(draft.evidence)
            if k in draft.masks or evidence.verdict.startswith("scale-invariant")
        ]
        shifts = [
            _Rescaling(k, evidence.shift_dim, shifts=True)
            for k, evidence in enumerate(draft.evidence)
            if evidence.shift_residual <= self._thresholds.invariant and evidence.verdict != "no effect"
        ]
        items = scalings + shifts
        failures = self._check.refuted(items, self._change, _touched, self._thresholds.unchanged)
        held = [item for position, item in enumerate(items) if position not in failures]
        self._refute_scalings(draft, [(items[p], c) for p, c in failures.items() if not items[p].shifts])
        self._result.shift_invariant = {self._probe.names[item.index] for item in held if item.shifts}
        if self._probe.shrinks_constants:
            self._confirm_at_real_constants(draft, [item for item in held if not item.shifts])

    def _refute_scalings(self, draft: DraftVerdicts, changed: list[tuple[_Rescaling, float]]) -> None:
        """Refute what large factors change: it holds only nearby, or the gradient is wrong."""
        items = [item for item, _ in changed]
        little = functools.partial(self._rescale, doublings=_NEARBY)
        not_nearby = self._check.failures(items, little, _touched, self._thresholds.unchanged)
        for position, (item, change) in enumerate(changed):
            verdict, where = "undetermined", ""
            if position not in not_nearby:
                verdict, where = "not invariant", ", so that it holds only nearby, as below a clamp"
                draft.nearby.add(item.index)
            reason = f"its gradient says invariant, but rescaling changes the outputs by {change:.0e}{where}"
            self._refute(draft, item.index, verdict, reason)

    def _confirm_at_real_constants(self, draft: DraftVerdicts, items: list[_Rescaling]) -> None:
        double = functools.partial(self._rescale, doublings=1)
        failures = self._check.failures(
            items, double, _touched, self._thresholds.real_constants, real_constants=True
        )
        for position, change in failures.items():
            self._refute(
                draft,
                items[position].index,
                "not invariant",
                "it would be invariant without the small constants that the model adds; with them, a factor "
                f"of two changes the outputs by {change:.0e}",
            )

    def _refute(self, draft: DraftVerdicts, k: int, verdict: str, reason: str) -> None:
        draft.masks.pop(k, None)
        evidence = draft.evidence[k]
        evidence.verdict, evidence.dim, evidence.reason = verdict, None, reason
        evidence.invariant_units, evidence.blocks = 0, []

    def _change(self, item: _Rescaling, generator: torch.Generator, inverse: bool) -> None:
        if item.shifts:
            shift_units(self._probe.parameters[item.index], item.dim, generator)
        else:
            self._rescale(item, generator, inverse=inverse)

    def _rescale(
        self,
        item: _Rescaling,
        generator: torch.Generator,
        doublings: float | None = None,
        inverse: bool | None = None,
    ) -> None:
        doublings = self._thresholds.doublings if doublings is None else doublings
        weight = self._probe.parameters[item.index]
        one_by_one = item.mask
        if item.dim is not None and item.mask is not None:
            one_by_one = item.mask.clone()
            for a, b in item.blocks:
                one_by_one[a:b] = False
                block = weight.narrow(item.dim, a, b - a)
                scale_units(block, None, generator, doublings=doublings, inverse=inverse)
        scale_units(weight, item.dim, generator, one_by_one, doublings=doublings, inverse=inverse)

    def _record(self, draft: DraftVerdicts) -> None:
        """Enter every verdict under the parameter's name."""
        result = self._result
        for name, reason in self._probe.unprobed.items():
            result.evidence[name].reason = reason
        for k, (name, evidence) in enumerate(zip(self._probe.names, draft.evidence, strict=True)):
            result.evidence[name] = evidence
            if evidence.verdict == "no effect":
                result.no_effect.add(name)
            elif evidence.verdict == "undetermined":
                result.undetermined[name] = evidence.reason
            elif evidence.verdict == "not invariant":
                result.not_invariant.add(name)
            elif k in draft.masks:
                assert evidence.dim is not None
                result.partial[name] = (evidence.dim, draft.masks[k])
            else:
                result.scale_invariant[name] = evidence.dim
            if evidence.invariant_units and evidence.residual_real_eps > self._thresholds.invariant:
                result.up_to_eps[name] = evidence.residual_real_eps


class _ProgressBar:
    """A bar of tqdm for each stage: on a terminal, after two seconds, and only if tqdm is installed."""

    def __init__(self, shown: bool) -> None:
        self._tqdm: Any = None
        self._bar: Any = None
        self._stage = ""
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._tqdm = tqdm

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, stage: str, done: int, expected: int) -> None:
        """Show that ``done`` of about ``expected`` passes of ``stage`` are done."""
        if self._tqdm is None:
            return
        if stage != self._stage:
            if self._bar is not None:
                self._bar.close()
            # disable=None: silent if stderr is no terminal
            self._bar = self._tqdm(desc=stage, unit=" passes", delay=2, disable=None, leave=False)
            self._stage = stage
        self._bar.total = max(expected, done)
        self._bar.update(done - self._bar.n)
