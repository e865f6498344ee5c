"""From scale gradients to a verdict for each parameter, before rescaling confirms it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.result import Evidence
from normwise.invariance.scale_gradients import Array, ScaleGradients, UnitSums

__all__ = ["DraftVerdicts", "EpsPasses", "Thresholds", "draft_verdicts"]

_FALLS = 1e-3  # a residual that eps causes falls at least to this fraction when eps is shrunk
_CAUSED_BY_EPS = 100.0  # a gradient is caused by eps if it is this many times larger at the model's eps
_REPRODUCIBLE = 0.05  # the sums of a gradient change at most by this fraction when the values are nudged
_FEW, _REPRODUCIBLE_FEW = 6, 0.005  # the same for fewer sums, which rounding errors may repeat by chance


@dataclass(frozen=True)
class Thresholds:
    """What counts as zero, for one floating-point type; fixed on the networks of benchmarks/invariances.py.

    Attributes:
        eps_factor: The factor by which the probe shrinks every eps.
        invariant: A residual up to this threshold counts as zero.
        nonzero: A residual above this threshold counts as nonzero unless it shrinks with eps.
        silent: A parameter has no visible gradient if its products wg are below this fraction of the largest
            of any parameter; a unit, if they are below this fraction of the largest of its parameter.
        unchanged: Outputs count as unchanged by rescaling if their relative change is at most this.
        real_constants: Where an added constant above 1e-4 counted as an eps, a symmetry is refuted if a
            factor of two changes the outputs by more than this at the constant's real value.
        replaced: Outputs count as unchanged by a replacement of values if their relative change is at most
            this.
        constant: A parameter has no visible gradient either if its products wg are below this fraction of the
            outputs. So no parameter has one where the outputs are signs.
        traces: Smaller changes than ``replaced`` but above this may be an effect; smaller nudges tell.
        null: Singular values of unit-RMS columns up to this threshold count as zero.
        rounding: The same, where some between the two belong to no symmetry.
        doublings: Rescaling confirms by factors of up to so many doublings or halvings: far enough to leave
            the range in which a ReLU6 or a clamp happens to be linear at the probed points.
    """

    eps_factor: float
    invariant: float
    nonzero: float
    silent: float
    unchanged: float
    real_constants: float
    replaced: float
    traces: float
    null: float
    rounding: float
    constant: float
    doublings: int

    @staticmethod
    def of(dtype: torch.dtype, tolerance: float | None = None) -> Thresholds:
        """Return the thresholds for ``dtype``, with ``tolerance`` (if given) as ``invariant``.

        Example:
            >>> Thresholds.of(torch.float64, 1e-4).invariant
            0.0001
        """
        default = _DOUBLE if dtype == torch.float64 else _SINGLE
        if tolerance is None:
            return default
        return dataclasses.replace(default, invariant=tolerance, nonzero=max(default.nonzero, tolerance))


_DOUBLE = Thresholds(
    eps_factor=1e-12,
    invariant=1e-5,
    nonzero=1e-3,
    silent=1e-9,
    unchanged=1e-4,
    real_constants=0.05,
    replaced=1e-7,
    traces=1e-9,
    null=1e-6,
    rounding=1e-10,
    constant=1e-12,
    doublings=8,
)
_SINGLE = Thresholds(
    eps_factor=1e-6,
    invariant=1e-3,
    nonzero=3e-2,
    silent=1e-5,
    unchanged=5e-3,
    real_constants=0.05,
    replaced=1e-3,
    traces=1e-5,
    null=1e-4,
    rounding=1e-5,
    constant=1e-5,
    doublings=3,
)


@dataclass
class EpsPasses:
    """The backward passes behind the verdicts.

    Attributes:
        shrunk: Those with shrunk eps.
        real: Those with the model's eps.
        paired: Those of ``shrunk`` that differ from ``real`` in eps only.
        nudged: The first passes of ``shrunk`` again, with all values nudged by a small fraction. Gradients
            that are rounding errors change completely; others hardly change, however small they are.
        balanced_from: The number of the first pass of ``shrunk`` with balanced weights, if there is any.
    """

    shrunk: list[ScaleGradients] = field(default_factory=list)
    real: list[ScaleGradients] = field(default_factory=list)
    paired: list[ScaleGradients] = field(default_factory=list)
    nudged: list[ScaleGradients] = field(default_factory=list)
    balanced_from: int | None = None

    def visible(self, thresholds: Thresholds) -> NDArray[np.bool_]:
        """Return whether each parameter has a gradient above rounding errors."""
        squares = _squares(self.shrunk)
        visible = _above_rounding(squares, thresholds)
        if self.nudged:
            size, size_real = (np.sqrt(_squares(rows).max(axis=0)) for rows in (self.paired, self.real))
            for k in np.flatnonzero(~visible & (size_real <= _CAUSED_BY_EPS * size)):
                visible[k] = self._is_reproducible(int(k))
        return visible

    def faint(self, thresholds: Thresholds) -> bool:
        """Return whether some parameters have a gradient, but none above ordinary rounding errors."""
        return bool((~self.visible(thresholds) & _squares(self.shrunk).any(axis=0)).any())

    def signal_dies(self, thresholds: Thresholds) -> bool:
        """Return whether some gradients are zero, or real but far below those of other parameters."""
        squares = _squares(self.shrunk)
        faint = ~_above_rounding(squares, thresholds)
        reached = np.any([row.reached for row in self.shrunk], axis=0)
        return bool((faint & reached & (self.visible(thresholds) | ~squares.any(axis=0))).any())

    def _is_reproducible(self, k: int) -> bool:
        """Return whether any sums of the gradient are nearly the same when all values are nudged."""
        again = self.shrunk[: len(self.nudged)]
        pairs: list[tuple[Any, Any]] = []
        for d in (0, 1):
            if (k, d) in again[0].units and (k, d) in self.nudged[0].units:
                units, nudged = ([row.units[k, d] for row in rows] for rows in (again, self.nudged))
                pairs.append(([u.scale for u in units], [u.scale for u in nudged]))
                if all(u.shift is not None for u in [*units, *nudged]):
                    pairs.append((_shift_sums(units)[0], _shift_sums(nudged)[0]))
        if not pairs:
            pairs = [([row.sums[k] for row in again], [row.sums[k] for row in self.nudged])]
        return any(_nearly_same(np.asarray(before), np.asarray(after)) for before, after in pairs)


def _nearly_same(before: Array, after: Array) -> bool:
    """Return whether sums before and after a nudge differ as little as those of a gradient do."""
    allowed = _REPRODUCIBLE if before.size >= _FEW else _REPRODUCIBLE_FEW
    return bool(
        np.linalg.norm(before) > 0 and np.linalg.norm(after - before) <= allowed * np.linalg.norm(before)
    )


def _squares(rows: Sequence[ScaleGradients]) -> Array:
    """Return Σ(wg)² in the passes that have it, passes × parameters."""
    return np.stack([row.squares for row in rows if row.has_squares])


def _above_rounding(squares: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Return whether each parameter's products are above ordinary rounding errors in some pass."""
    largest = np.sqrt(squares.max(axis=1, keepdims=True))
    least = np.maximum(thresholds.silent * largest, thresholds.constant)
    return np.asarray((np.sqrt(squares) > least).any(axis=0))


@dataclass
class DraftVerdicts:
    """The evidence for every parameter, and the cases that only a replacement of values can decide.

    Attributes:
        evidence: One per parameter. The verdict is empty where it is not decided yet.
        masks: {parameter: mask of its invariant units} for partly invariant parameters.
        silent: Parameters without a visible gradient: they have no effect, or only their signs have one, or
            they are dead.
        canceling: Parameters whose gradient seems to cancel between several uses: the sums over all rows and
            columns are zero, so that they may have no effect.
        unreached: The silent parameters that no gradient reached at all.
        nearby: Parameters that are invariant near the probed points only.
    """

    evidence: list[Evidence] = field(default_factory=list)
    masks: dict[int, Tensor] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    canceling: list[int] = field(default_factory=list)
    unreached: set[int] = field(default_factory=set)
    nearby: set[int] = field(default_factory=set)


def draft_verdicts(
    shapes: list[torch.Size], passes: EpsPasses, outside: dict[int, str], thresholds: Thresholds
) -> DraftVerdicts:
    """Return a draft of the verdict for each parameter.

    Args:
        shapes: The shape of each parameter.
        passes: The backward passes, with the sums over units.
        outside: {parameter: reason} for parameters that cannot be probed.
        thresholds: The thresholds.
    """
    visible = passes.visible(thresholds)
    draft = DraftVerdicts()
    for k, shape in enumerate(shapes):
        if k in outside:
            draft.evidence.append(Evidence("undetermined", reason=outside[k]))
        elif 0 in shape:
            draft.evidence.append(Evidence("undetermined", reason="it has no elements"))
        elif not visible[k]:
            draft.evidence.append(Evidence(""))
            draft.silent.append(k)
            if not any(row.reached[k] for row in passes.shrunk):
                draft.unreached.add(k)
        else:
            draft.evidence.append(_evidence(k, shape, passes, thresholds, draft))
            if _cancels(k, shape, passes.shrunk, thresholds):
                draft.canceling.append(k)
    return draft


def _cancels(k: int, shape: torch.Size, rows: list[ScaleGradients], thresholds: Thresholds) -> bool:
    """Return whether all sums of a gradient are zero, compared with those of the parameter's single uses."""
    rows = [row for row in rows if row.reached[k]]
    if not shape:
        pairs = [(np.array([[row.sums[k]] for row in rows]), _squares(rows)[:, [k]])]
    else:
        units = [[row.units[k, d] for row in rows] for d in range(min(2, len(shape)))]
        shifted = [[u for u in us if u.shift is not None] for us in units]
        pairs = [pair for d in range(len(units)) if (pair := _stacked(k, d, rows)) is not None]
        pairs += [_shift_sums(us) for us in shifted if us]
    return all(np.nan_to_num(residual(*pair)).max() <= thresholds.invariant for pair in pairs)


def _evidence(
    k: int, shape: torch.Size, passes: EpsPasses, thresholds: Thresholds, draft: DraftVerdicts
) -> Evidence:
    """Return the evidence for a parameter that has a gradient."""
    total = _Sums.of(k, None, passes)
    of_tensor = int(total.readings(thresholds)[0])
    whole, whole_real = float(residual(*total.shrunk)[0]), float(residual(*total.real)[0])
    evidence = Evidence("not invariant", residual=whole, residual_real_eps=whole_real)
    evidence.shift_dim, evidence.shift_residual = _shift(k, shape, passes.shrunk, thresholds)
    dims = [d for d in range(min(2, len(shape))) if d == 0 or shape[d] > 1]
    sums = {d: _Sums.of(k, d, passes) for d in dims}
    readings = {d: sums[d].readings(thresholds) for d in dims}
    for d, codes in readings.items():
        seen = codes != _Reading.UNSEEN
        if seen.any() and (codes[seen] == _Reading.INVARIANT).all():
            evidence.dim, evidence.units = d, len(codes)
            evidence.invariant_units, evidence.unseen_units = int(seen.sum()), int((~seen).sum())
            evidence.residual = float(residual(*sums[d].shrunk)[seen].max())
            evidence.residual_real_eps = float(residual(*sums[d].real)[seen].max())
            return _invariant(evidence, "scale-invariant", thresholds)
    if of_tensor == _Reading.INVARIANT:
        for d in dims:
            blocks = sums[d].blocks(thresholds)
            if len(blocks) > 1 and not evidence.blocks:
                evidence.blocks, evidence.units = blocks, shape[d]
        evidence.invariant_units = evidence.units
        return _invariant(evidence, "scale-invariant", thresholds)
    for d in dims:
        if _is_partly_invariant(k, d, readings[d], sums[d], thresholds, evidence, draft):
            return _invariant(evidence, "partly scale-invariant", thresholds)
    unclear = [d for d in dims if not (readings[d] == _Reading.NONZERO).any()]
    if of_tensor != _Reading.NONZERO or unclear:
        evidence.verdict = "undetermined"
        evidence.reason = (
            f"too noisy: residual {whole:.1e}, {whole_real:.1e} at the model's eps; up to "
            f"{thresholds.invariant:.0e} it counts as zero, from {thresholds.nonzero:.0e} as nonzero"
        )
    return evidence


def _invariant(evidence: Evidence, verdict: str, thresholds: Thresholds) -> Evidence:
    up_to_eps = evidence.residual_real_eps > max(thresholds.invariant, 2 * evidence.residual)
    evidence.verdict = f"{verdict} up to eps" if up_to_eps and verdict == "scale-invariant" else verdict
    if up_to_eps:
        evidence.reason = f"residual {evidence.residual_real_eps:.1e} at the model's eps"
    return evidence


class _Reading(IntEnum):
    """What a residual says about a unit."""

    UNSEEN = 0
    INVARIANT = 1
    UNCLEAR = 2
    NONZERO = 3


Pair = tuple[Array, Array]


@dataclass
class _Sums:
    """Σ wg and Σ (wg)² (passes × units): at shrunk eps, in the paired passes, and at the model's eps."""

    shrunk: Pair
    paired: Pair
    real: Pair

    @staticmethod
    def of(k: int, d: int | None, passes: EpsPasses) -> _Sums:
        """Return the sums of parameter ``k`` over the units of ``d``, from the passes that reach it."""
        shrunk, paired, real = (
            _stacked(k, d, [row for row in rows if row.reached[k]])
            for rows in (passes.shrunk, passes.paired, passes.real)
        )
        assert shrunk is not None
        empty = np.zeros((0, shrunk[0].shape[1])), np.zeros((0, shrunk[0].shape[1]))
        return _Sums(shrunk, paired or empty, real or empty)

    def readings(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """Return the reading of each unit: invariant if its residual is zero, or falls with eps."""
        shrunk, paired, real = residual(*self.shrunk), residual(*self.paired), residual(*self.real)
        codes = np.full(len(shrunk), _Reading.UNCLEAR, dtype=np.int64)
        with np.errstate(invalid="ignore"):
            # A small residual that is no effect of eps stays when eps shrinks by orders of magnitude.
            codes[shrunk >= thresholds.nonzero] = _Reading.NONZERO
            falls = (shrunk < thresholds.nonzero) & (paired <= _FALLS * real)
            codes[(shrunk <= thresholds.invariant) | falls] = _Reading.INVARIANT
        squares = self.shrunk[1].sum(0)
        codes[~(squares > thresholds.silent**2 * squares.max())] = _Reading.UNSEEN
        return codes

    def blocks(self, thresholds: Thresholds) -> list[tuple[int, int]]:
        """Return the ranges of units that are invariant together."""
        return invariant_blocks(*self.shrunk, thresholds.invariant, thresholds.silent)


def _stacked(k: int, d: int | None, rows: list[ScaleGradients]) -> Pair | None:
    if not rows:  # a random draw left the parameter out
        return None
    if d is None:
        return np.array([[row.sums[k]] for row in rows]), _squares(rows)[:, [k]]
    squares = [row.units[k, d].scale_squares for row in rows if row.has_squares]
    return np.stack([row.units[k, d].scale for row in rows]), np.stack(squares)


def _is_partly_invariant(
    k: int,
    d: int,
    codes: NDArray[np.int64],
    sums: _Sums,
    thresholds: Thresholds,
    evidence: Evidence,
    draft: DraftVerdicts,
) -> bool:
    """Return whether only some units (or blocks of units) of ``d`` are invariant, and record them."""
    alone = codes == _Reading.INVARIANT
    blocks = sums.blocks(thresholds)
    mask = alone.copy()
    for a, b in blocks:
        mask[a:b] = True
    if not mask.any() or mask.all():
        return False
    evidence.dim, evidence.units = d, len(mask)
    evidence.invariant_units, evidence.unseen_units = int(mask.sum()), int((codes == _Reading.UNSEEN).sum())
    evidence.blocks = [(a, b) for a, b in blocks if not alone[a:b].all()]
    ranges = blocks or [(int(i), int(i) + 1) for i in np.flatnonzero(alone)]
    evidence.residual, evidence.residual_real_eps = (
        float(
            np.nanmax(
                [
                    residual(scale[:, a:b].sum(1, keepdims=True), squares[:, a:b].sum(1, keepdims=True))[0]
                    for a, b in ranges
                ]
            )
        )
        for scale, squares in (sums.shrunk, sums.real)
    )
    draft.masks[k] = torch.from_numpy(mask)
    return True


def _shift_sums(units: list[UnitSums]) -> Pair:
    """Return Σg and Σg² of passes that have them, passes × units."""
    shifts = [u.shift for u in units if u.shift is not None]
    squares = [u.shift_squares for u in units if u.shift_squares is not None]
    return np.stack(shifts), np.stack(squares)


def _shift(
    k: int, shape: torch.Size, rows: list[ScaleGradients], thresholds: Thresholds
) -> tuple[int | None, float]:
    """Return the dimension whose units can be shifted, and the residual; it is large if none can be."""
    choices: list[tuple[int | None, Array]] = []
    for d in range(min(2, len(shape))):
        units = [row.units[k, d] for row in rows if row.reached[k]]
        units = [u for u in units if u.shift is not None]
        if not units:
            return None, float("nan")
        sums, squares = _shift_sums(units)
        of_unit = squares.sum(0)
        seen = of_unit > thresholds.silent**2 * of_unit.max()
        choices.insert(d, (d, residual(sums, squares)[seen]))
        if d == 0:
            choices.append((None, residual(sums.sum(1)[:, None], squares.sum(1)[:, None])))
    for dim, residuals in choices:
        if len(residuals) and residuals.max() <= thresholds.invariant:
            return dim, float(residuals.max())
    return None, min((float(r.max()) for _, r in choices if len(r)), default=float("nan"))


def residual(sums: Array, squares: Array) -> Array:
    """Return |Σ|/√Σ(²), pooled over passes (axis 0): 0 by cancellation, else about 1, NaN if all is zero.

    The squares may be known of fewer passes than the sums.

    Example:
        >>> residual(np.array([[3.0, 0.0], [-4.0, 0.0]]), np.array([[12.5, 0.0], [12.5, 0.0]]))
        array([ 1., nan])
    """
    if not len(sums) or not len(squares):
        return np.full(sums.shape[1], np.nan)
    size = squares.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt((sums**2).mean(0) / np.where(size > 0, size, np.nan)))


def invariant_blocks(sums: Array, squares: Array, threshold: float, silent: float) -> list[tuple[int, int]]:
    """Return the shortest disjoint ranges [a, b) of units whose sums vanish together in every pass.

    These are the groups of a group norm, or the heads of a packed projection. The cumulative sums are equal
    at both ends of such a range, so sorting brings the ends together.

    Args:
        sums: Σ wg of each unit, passes × units.
        squares: Σ (wg)² of each unit, passes × units; they may be known of fewer passes.
        threshold: The residual up to which a range is invariant.
        silent: Units whose √Σ(wg)² is below this fraction of the largest are no evidence.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=(8, 6))
        >>> a[:, 1] = -a[:, 0]
        >>> a[:, 3] = -a[:, 2]
        >>> invariant_blocks(a, a**2, 1e-6, 1e-9)
        [(0, 2), (2, 4)]
    """
    sizes = squares.mean(0) * len(sums)
    visible = np.flatnonzero(sizes > silent**2 * sizes.max(initial=0.0))
    if not len(visible):
        return []
    sums, sizes = sums[:, visible], sizes[visible]
    count = sums.shape[1]
    cumulative = np.concatenate([np.zeros((len(sums), 1)), np.cumsum(sums, axis=1)], axis=1)
    cumulative_squares = np.concatenate([[0.0], np.cumsum(sizes)])
    direction = np.random.default_rng(0).normal(size=len(sums)) / np.sqrt(len(sums))
    line = direction @ cumulative
    order = np.argsort(line, kind="stable")
    near = 4 * threshold * np.sqrt(cumulative_squares[-1])
    cluster = np.zeros(count + 1, dtype=np.int64)
    cluster[order[1:]] = np.cumsum(np.diff(line[order]) > near)
    # Places in order of their cluster, so that those which may end one range are neighbours.
    places = np.lexsort((np.arange(count + 1), cluster))
    begun = np.zeros(len(places), dtype=bool)
    ranges: list[tuple[int, int]] = []
    for offset in range(1, min(5, len(places))):
        candidates = np.flatnonzero(
            ~begun[:-offset] & (cluster[places[:-offset]] == cluster[places[offset:]])
        )
        a, b = places[candidates], places[candidates + offset]
        change = ((cumulative[:, b] - cumulative[:, a]) ** 2).sum(0)
        of_range = cumulative_squares[b] - cumulative_squares[a]
        found = change <= threshold**2 * of_range
        begun[candidates[found]] = True
        ranges += [(int(i), int(j)) for i, j in zip(a[found], b[found], strict=True)]
    taken = np.zeros(count, dtype=bool)
    disjoint = []
    for start, stop in sorted(ranges, key=lambda ends: (ends[1] - ends[0], ends[0])):
        if not taken[start:stop].any():
            taken[start:stop] = True
            disjoint.append((start, stop))
    return [(int(visible[start]), int(visible[stop - 1]) + 1) for start, stop in sorted(disjoint)]
