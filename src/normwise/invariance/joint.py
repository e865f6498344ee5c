"""All joint rescaling symmetries: add backward passes until the rank stops growing, solve, confirm."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.parts import Part, UnitRecord, merge_parts, propose_parts
from normwise.invariance.probe import NonFiniteOutputsError, Probe, ProbeMode
from normwise.invariance.rescale_check import RescaleCheck, exponents_of_two
from normwise.invariance.result import Invariances
from normwise.invariance.scale_gradients import (
    Array,
    ScaleGradients,
    batched_scale_gradients,
    scale_gradients,
)
from normwise.invariance.symmetries import (
    Integers,
    integer_basis,
    jointly_invariant_groups,
    null_space,
    numerical_rank,
)
from normwise.invariance.verdicts import EpsPasses, Thresholds

__all__ = ["find_joint"]

_WITHOUT_GROWTH = 8  # backward passes without a higher rank, after which the rank is final
_COTANGENTS, _FEW_COTANGENTS = 8, 2  # backward passes that share a forward pass
_LEAST_BATCHED, _MOST_BATCHED = 16, 64  # the same where many are needed and they are batched
_BATCHED_VALUES = 1 << 26  # batched gradients have at most so many values
_FAINT_PART = 1e-6  # a part with a smaller share of its parameter's √Σ(wg)² has no visible effect
_SAME = 1e-6  # sums that are equal up to rounding
_FIRST_SEED, _FAR_SEED = 16, 1 << 20  # the verdicts use lower seeds
_MOST_REFUTATIONS = 3  # how often more passes are added because rescaling has refuted a symmetry
_RECORDED_AT_LEAST = 1 << 24  # the number of sums over units that are recorded in any case


@dataclass(frozen=True)
class _Column:
    """A parameter, or a part of one, that is rescaled with one exponent."""

    index: int
    part: Part | None = None

    def sum_of(self, row: ScaleGradients) -> float:
        """Return Σwg of a part in one backward pass."""
        assert self.part is not None
        units = row.units.get((self.index, self.part.dim))
        return 0.0 if units is None else float(self._of_part(units.scale).sum())

    def squares_of(self, row: ScaleGradients) -> float:
        """Return Σ(wg)² in one backward pass."""
        if self.part is None:
            return float(row.squares[self.index])
        units = row.units.get((self.index, self.part.dim))
        return 0.0 if units is None else float(self._of_part(units.scale_squares).sum())

    def has_own_scale(self, record: UnitRecord, thresholds: Thresholds) -> bool:
        """Return whether a part has an effect and is not invariant alone."""
        assert self.part is not None
        divisors = np.linalg.norm(np.stack(record.wholes), axis=1).clip(np.finfo(float).tiny)
        squares = record.squares((self.index, self.part.dim), divisors)
        of_part = float(self._of_part(squares).sum())
        if of_part <= max(_FAINT_PART, thresholds.silent) ** 2 * float(squares.sum()):
            return False  # a nearly dead channel, say: its rounding errors would blur all symmetries
        size = np.mean((record.sums_of(self.part) / divisors) ** 2)
        return bool(size > thresholds.invariant**2 * of_part)

    def values(self, record: UnitRecord) -> Array:
        """Return Σwg in each recorded pass."""
        if self.part is not None:
            return record.sums_of(self.part)
        return np.array([sums[self.index] for sums in record.wholes])

    def tensor(self, probe: Probe) -> Tensor:
        """Return the stand-in, or the view of its part."""
        whole = probe.parameters[self.index]
        return whole if self.part is None else self.part.of(whole.detach())

    def key(self, names: Sequence[str]) -> str:
        """Return the key of a symmetry that refers to this column."""
        name = names[self.index]
        return name if self.part is None else self.part.key(name)

    def _of_part(self, sums: Array) -> Array:
        assert self.part is not None
        return sums.reshape(-1, self.part.period)[:, self.part.start : self.part.stop]


class _Passes:
    """Backward passes at nearby points: where memory allows it, one for several cotangents.

    Args:
        probe: The probe.
        members: The parameters that move, and whose sums are wanted.
        per_unit: The parameters whose units are summed.
        check: Its outputs are forgotten if the stand-ins are stored in another way.
    """

    def __init__(self, probe: Probe, members: Sequence[int], per_unit: set[int], check: RescaleCheck) -> None:
        self._probe, self._members, self._per_unit = probe, members, per_unit
        weights = sum(probe.parameters[k].numel() for k in members)
        # many activations and their gradients live at once, each for all cotangents
        room = _BATCHED_VALUES // max(weights, 16 * probe.largest_result, 1)
        self._batched, self._checked = room >= _LEAST_BATCHED, False
        self._most_batched = min(room, _MOST_BATCHED)
        if self._batched:
            probe.widen()
            check.forget()

    @property
    def most(self) -> int:
        """The number of cotangents at one point that pay off."""
        many = self._batched and len(self._members) > 4 * _LEAST_BATCHED
        return min(self._most_batched, len(self._members) // 4) if many else _COTANGENTS

    def rows(self, seed: int, cotangents: int) -> list[ScaleGradients]:
        """Return the sums of so many cotangents at the point with the number ``seed``."""
        if self._batched:
            try:
                rows = batched_scale_gradients(self._probe, seed, cotangents, self._per_unit, self._members)
                self._check_first(rows, seed)
                if self._batched:
                    return rows
            except RuntimeError:  # some operation cannot be batched
                self._batched = False
        return self._one_by_one(seed, cotangents)

    def _one_by_one(self, seed: int, cotangents: int) -> list[ScaleGradients]:
        return list(
            scale_gradients(self._probe, seed, cotangents, self._per_unit, moved=self._members, squares=0)
        )

    def _check_first(self, rows: list[ScaleGradients], seed: int) -> None:
        """Compare the first batch with single passes: a model's own derivative may not allow batches."""
        if self._checked:
            return
        self._checked = True
        for row, single in zip(rows, self._one_by_one(seed, _FEW_COTANGENTS), strict=False):
            pairs = [(row.sums[self._members], single.sums[self._members])]
            if row.units.keys() != single.units.keys():
                self._batched = False
                return
            pairs += [(sums.scale, single.units[place].scale) for place, sums in row.units.items()]
            if any(np.abs(a - b).max(initial=0.0) > _SAME * np.abs(b).max(initial=0.0) for a, b in pairs):
                self._batched = False


def find_joint(
    probe: Probe,
    passes: EpsPasses,
    result: Invariances,
    thresholds: Thresholds,
    check: RescaleCheck,
    report: Callable[[str, int, int], None],
    *,
    nearby: Set[int] = frozenset(),
) -> None:
    """Record the joint symmetries of the parameters that have an effect and are not invariant alone.

    Args:
        probe: The probe.
        passes: The backward passes of the verdicts, with the sums over units.
        result: Contains the verdicts; receives the symmetries.
        thresholds: The thresholds.
        check: Confirms by rescaling.
        report: Receives the progress: (stage, passes done, passes expected).
        nearby: Parameters that are invariant near the probed points only. Their sums there are next to
            zero, so that other points tell their symmetries.
    """
    has_scale = result.not_invariant | result.partial.keys()
    with_nearby = [k for k, name in enumerate(probe.names) if name in has_scale]
    members = [k for k in with_nearby if k not in nearby]
    if not with_nearby:
        return
    shapes = [p.shape for p in probe.parameters]
    record = UnitRecord(_recorded_places(members, shapes))
    for row in passes.shrunk[passes.balanced_from or 0 :]:  # where the signal dies, sums are rounding errors
        record.add(row)
    for row in passes.shrunk:
        row.units = {}
    for row in passes.real:
        row.units = {place: sums for place, sums in row.units.items() if place in record}
    # Without the gradients of all other weights, a convolution saves half of its backward pass.
    probe.ignore_gradients(set(range(len(shapes))) - set(with_nearby))
    try:
        more = _Passes(probe, with_nearby, {k for k, _ in record.places}, check)
        balanced = passes.balanced_from is not None
        columns = [_Column(k) for k in members]
        divided: list[list[Part]] = []
        matrix = np.zeros((0, 0))
        while members:
            matrix = _matrix_of_full_rank(probe, record, columns, more, thresholds, report, balanced=balanced)
            whole = [k for k in members if k not in {parts[0].index for parts in divided}]
            found = propose_parts(
                record, matrix, probe.names, shapes, whole, thresholds, resolved_only=balanced
            )
            divided += found
            if not found:
                break
            columns = _columns(members, divided, record, thresholds)
    finally:
        probe.mode = ProbeMode()
        probe.ignore_gradients(set())
    result.stats.rows, result.stats.rank = len(matrix), numerical_rank(matrix, thresholds.null)
    if nearby:
        columns += [_Column(k) for k in sorted(nearby)]
        matrix = np.stack([column.values(record) for column in columns], axis=1)
        alone = list(np.eye(len(columns), dtype=np.int64)[-len(nearby) :])
        # Upwards: where several become small together, the shrunk eps matters again.
        far = _sums_far_away(probe, columns, alone, thresholds, balanced=balanced, inverse=False)
        matrix = np.concatenate([matrix, far])
    is_part = np.array([column.part is not None for column in columns])
    basis, unnamed = _integer_symmetries(matrix, thresholds, is_part)
    confirmed, rejected = _confirmed(probe, basis, columns, check, thresholds)
    remaining = rejected
    for _ in range(_MOST_REFUTATIONS):
        if not remaining:
            break
        far = _sums_far_away(probe, columns, remaining, thresholds, balanced=balanced, inverse=None)
        matrix = np.concatenate([matrix, far])
        basis, unnamed = _integer_symmetries(matrix, thresholds, is_part)
        confirmed, remaining = _confirmed(probe, basis, columns, check, thresholds)
    result.unnamed_joint = unnamed
    if unnamed:
        warnings.warn(
            f"{unnamed} of {len(basis) + unnamed} joint symmetries have no small integers for "
            "exponents, and are left out: either they have others, or the output tells too little about some "
            "weights, as in the first layers of a deep network whose gradients vanish",
            stacklevel=4,
        )
    result.parts = _divided_parts(confirmed, columns, probe.names)
    groups = jointly_invariant_groups(confirmed)
    for symmetries, exponent_vectors in (
        (result.joint, confirmed),
        (result.unconfirmed_joint, rejected),
        (result.groups, groups),
    ):
        symmetries += [_by_name(e, columns, result.parts, probe.names) for e in exponent_vectors]
    result.joint_residuals = _residuals(confirmed, columns, passes.real)
    result.group_residuals = _residuals(groups, columns, passes.real)


def _integer_symmetries(
    matrix: Array, thresholds: Thresholds, is_part: NDArray[np.bool_]
) -> tuple[list[Integers], int]:
    """Return the integer symmetries of a matrix of Σwg, and how many further symmetries it has."""
    null = null_space(matrix, thresholds.null)
    basis = integer_basis(matrix, null, thresholds.null, is_part)
    if len(basis) < null.shape[1]:
        # In deep networks, singular values of what is no symmetry may be small, but are no rounding errors.
        strict = null_space(matrix, thresholds.rounding)
        if strict.shape[1] < null.shape[1]:
            null, basis = strict, integer_basis(matrix, strict, thresholds.rounding, is_part)
    return basis, null.shape[1] - len(basis)


def _residuals(
    symmetries: Sequence[Integers], columns: Sequence[_Column], rows: Sequence[ScaleGradients]
) -> list[float]:
    """Return |Σ e·Σwg| / √Σ e²·Σ(wg)² over the members of each symmetry."""
    sums = _sums(columns, rows)
    squares = np.mean([[c.squares_of(row) for c in columns] for row in rows if row.has_squares], axis=0)
    sizes = [float(squares @ e**2) for e in symmetries]
    return [
        float(np.mean((sums @ e) ** 2) / size) ** 0.5 if size else float("nan")
        for e, size in zip(symmetries, sizes, strict=True)
    ]


def _sums(columns: Sequence[_Column], rows: Sequence[ScaleGradients]) -> Array:
    """Return Σwg, passes × columns."""
    sums = np.stack([row.sums for row in rows])[:, [column.index for column in columns]]
    for place, column in enumerate(columns):
        if column.part is not None:
            sums[:, place] = [column.sum_of(row) for row in rows]
    return sums


def _recorded_places(members: Sequence[int], shapes: Sequence[torch.Size]) -> list[tuple[int, int]]:
    """Return (parameter, dimension) of the units to record: without huge dimensions, to save memory."""
    places = [(k, d) for k in members for d in range(min(2, len(shapes[k])))]
    budget = max(_RECORDED_AT_LEAST, sum(shape.numel() for shape in shapes) // 2)
    passes = len(members) + 2 * _WITHOUT_GROWTH
    kept = []
    for k, d in sorted(places, key=lambda place: shapes[place[0]][place[1]]):
        budget -= passes * shapes[k][d]
        if budget >= 0:
            kept.append((k, d))
    return sorted(kept)


def _columns(
    members: Sequence[int], divided: list[list[Part]], record: UnitRecord, thresholds: Thresholds
) -> list[_Column]:
    """Return a column for each parameter or part, except for parts without effect or invariant alone."""
    parts_of = {parts[0].index: parts for parts in divided}
    columns = []
    for k in members:
        parts = [
            c for part in parts_of.get(k, ()) if (c := _Column(k, part)).has_own_scale(record, thresholds)
        ]
        columns += parts if len(parts) > 1 else [_Column(k)]
    return columns


def _matrix_of_full_rank(
    probe: Probe,
    record: UnitRecord,
    columns: Sequence[_Column],
    more: _Passes,
    thresholds: Thresholds,
    report: Callable[[str, int, int], None],
    *,
    balanced: bool,
) -> Array:
    """Return Σwg, passes × columns, with passes added until eight at new points did not increase the rank."""
    matrix = np.stack([column.values(record) for column in columns], axis=1)
    earlier = matrix[:-_WITHOUT_GROWTH]
    # Where the signal nearly dies, small singular values grow out of the rounding errors last.
    zero = thresholds.rounding if balanced else thresholds.null
    if len(earlier) and numerical_rank(earlier, zero) == numerical_rank(matrix, zero):
        return matrix
    # Where the signal nearly dies, other units are alive at each point: points tell more than cotangents.
    most = _FEW_COTANGENTS if balanced else more.most
    cotangents, without_growth, rank = most, 0, -1
    while True:
        before, rank = rank, numerical_rank(matrix, zero)
        if rank > before:
            without_growth = 0
            # Where outputs say little, a new point tells more than another cotangent.
            cotangents = most if rank - before > cotangents // 2 else _FEW_COTANGENTS
        else:
            without_growth += cotangents
            cotangents = _FEW_COTANGENTS
        if without_growth >= _WITHOUT_GROWTH:
            return matrix
        seed = _FIRST_SEED + len(matrix)
        probe.mode = ProbeMode(balanced=balanced)
        if probe.seed < _FIRST_SEED:
            probe.move_to(_FIRST_SEED)
        # with and without random draws in turn
        draws = probe.fixes_draws and seed // cotangents % 2
        probe.mode = ProbeMode(keep_branches=not draws, balanced=balanced)
        rows = more.rows(seed, cotangents)
        for row in rows:
            record.add(row)
        matrix = np.concatenate([matrix, _sums(columns, rows)])
        report("joint symmetries", len(record.wholes), len(columns) + _WITHOUT_GROWTH)


def _divided_parts(
    basis: list[Integers], columns: Sequence[_Column], names: Sequence[str]
) -> dict[str, list[str]]:
    """Return {parameter: its parts} if the parts have different exponents in some symmetry."""
    divided: dict[str, list[str]] = {}
    for k in sorted({column.index for column in columns if column.part is not None}):
        places = [i for i, column in enumerate(columns) if column.index == k]
        if any(len({int(e[i]) for i in places}) > 1 for e in basis):
            divided[names[k]] = [columns[i].key(names) for i in places]
    return divided


def _by_name(
    exponents: Integers, columns: Sequence[_Column], parts: dict[str, list[str]], names: Sequence[str]
) -> dict[str, int]:
    named: dict[str, int] = {}
    for column, e in zip(columns, exponents, strict=True):
        if e:
            name = names[column.index]
            named[column.key(names) if name in parts else name] = int(e)
    return merge_parts(named, parts)


def _confirmed(
    probe: Probe,
    basis: list[Integers],
    columns: Sequence[_Column],
    check: RescaleCheck,
    thresholds: Thresholds,
) -> tuple[list[Integers], list[Integers]]:
    """Return the symmetries that rescaling confirms, and the others."""

    def touched(exponents: Integers) -> list[int]:
        return [column.index for column, e in zip(columns, exponents, strict=True) if e]

    def rescale(exponents: Integers, generator: torch.Generator, inverse: bool, *, doublings: int) -> None:
        _rescale(probe, columns, exponents, generator, doublings, inverse)

    far = functools.partial(rescale, doublings=thresholds.doublings)
    failed = set(check.refuted(basis, far, touched, thresholds.unchanged))
    if probe.shrinks_constants:
        left = [i for i in range(len(basis)) if i not in failed]
        double = functools.partial(rescale, doublings=1)
        refuted = check.refuted(
            [basis[i] for i in left], double, touched, thresholds.real_constants, real_constants=True
        )
        failed |= {left[position] for position in refuted}
    confirmed = [e for i, e in enumerate(basis) if i not in failed]
    return confirmed, [e for i, e in enumerate(basis) if i in failed]


def _rescale(
    probe: Probe,
    columns: Sequence[_Column],
    exponents: Integers,
    generator: torch.Generator,
    doublings: int,
    inverse: bool | None,
) -> None:
    """Move along a symmetry, or with ``inverse`` against it, by powers of two: their products are exact."""
    largest = int(np.abs(exponents).max())
    size = max(1, int(exponents_of_two(1, generator, doublings)) // largest)
    if inverse is None:
        inverse = bool(torch.rand((), generator=generator) < 0.5)
    for column, e in zip(columns, exponents, strict=True):
        if e:
            column.tensor(probe).mul_(2.0 ** ((-size if inverse else size) * int(e)))


def _sums_far_away(
    probe: Probe,
    columns: Sequence[_Column],
    refuted: Sequence[Integers],
    thresholds: Thresholds,
    *,
    balanced: bool,
    inverse: bool | None,
) -> Array:
    """Return Σwg, passes × columns, at points far away: values are moved along the refuted symmetries.

    A refuted symmetry holds below a clamp, say. Far away the clamp is active for some units or for all, so
    the null space of these passes keeps only what holds on both sides of it. The difference of two refuted
    symmetries may be such a symmetry.

    Args:
        probe: The probe.
        columns: The columns of the result.
        refuted: What rescaling has refuted.
        thresholds: How far to move.
        balanced: Whether the points have balanced weights.
        inverse: Whether to move against the symmetries; None: in random directions.
    """
    per_unit = {column.index for column in columns if column.part is not None}
    generator = torch.Generator().manual_seed(_FAR_SEED)
    rows: list[ScaleGradients] = []
    for seed in range(_FAR_SEED, _FAR_SEED + len(refuted) + _WITHOUT_GROWTH):
        probe.mode = ProbeMode(balanced=balanced)
        probe.move_to(seed)
        with torch.no_grad():
            for exponents in refuted:
                doublings = int(torch.randint(1, thresholds.doublings + 1, (), generator=generator))
                _rescale(probe, columns, exponents, generator, doublings, inverse)
        try:
            rows += scale_gradients(probe, seed, _FEW_COTANGENTS, per_unit, moved=(), squares=0)
        except NonFiniteOutputsError:  # too far
            continue
    probe.mode = ProbeMode()
    return _sums(columns, rows) if rows else np.zeros((0, len(columns)))
