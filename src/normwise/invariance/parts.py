"""Parts of packed parameters (q, k and v in one projection): how to name them, and how to detect them.

A symmetry is a sum of scale gradients Σwg that vanishes in every backward pass. So a range of units has a
scale of its own if its Σwg, as a vector with one entry per pass, is a combination of the Σwg of whole
parameters: that of the columns that read one of two branches is the sum of what writes this branch. If there
are more passes than the rank of the whole parameters, some combinations of passes remain to which no whole
parameter contributes. There, the cumulative sums C of the units of a parameter (plus those of its bias) show
its parts:

- C(b) = 0: the units before b, and those after it, balance whole parameters.
- C(a) = C(b): the units from a to b do.
- C(b) = ±C'(c): the units before b balance units of another parameter.

If heads are interleaved (q₁k₁v₁ q₂k₂v₂ …), this holds for the sums over all periods. The remaining
combinations, at least eight, exclude coincidences. These divisions are proposals: the null space of all
passes, and rescaling, decide.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.scale_gradients import Array, ScaleGradients
from normwise.invariance.symmetries import unexplained_combinations
from normwise.invariance.verdicts import Thresholds

__all__ = [
    "Part",
    "UnitRecord",
    "dimension_of",
    "expand_parts",
    "merge_parts",
    "parameter_of",
    "periods_of",
    "propose_parts",
    "widened_part",
]

_KEY = re.compile(
    r"(?P<name>.+?)(\.unflatten\(\d+, \(-1, (?P<period>\d+)\)\))?"
    r"\[(?P<before>(:, )*)(?P<start>\d+):(?P<stop>\d+)\]"
)
_RESOLVED = 100.0  # a sum must be this many tolerances large for its equality to be evidence
_CLEARLY_RESOLVED = 3000.0  # the same where signals nearly die
_SILENT = 1e-18  # ranges with less than this share of Σ(wg)² are no parts
_NEIGHBOURS = 3  # how many values on a sorted line are compared
_MOST_PLACES = 1 << 22  # beyond so many places, only ranges are compared between parameters, not periods
Place = tuple[int, int]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """The rows or columns u of one parameter with start ≤ u mod period < stop.

    Attributes:
        index: The number of the parameter.
        dim: The dimension that counts the units: 0 for rows, 1 for columns.
        start: The first unit within a period.
        stop: The unit after the last within a period.
        period: The length of a period; equal to ``size`` if the part is a single range.
        size: The number of units of the whole parameter.
    """

    index: int
    dim: int
    start: int
    stop: int
    period: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this part of ``tensor``."""
        if self.period == self.size:
            return tensor.narrow(self.dim, self.start, self.stop - self.start)
        folded: Tensor = tensor.unflatten(self.dim, (-1, self.period))
        part: Tensor = folded.narrow(self.dim + 1, self.start, self.stop - self.start)
        return part

    def key(self, name: str) -> str:
        """Return the part of the parameter ``name`` as a torch expression.

        Example:
            >>> Part(0, 1, 0, 768, 2304, 2304).key("h.0.attn.c_attn.weight")
            'h.0.attn.c_attn.weight[:, 0:768]'
            >>> Part(0, 0, 8, 16, 24, 96).key("query_key_value.bias")
            'query_key_value.bias.unflatten(0, (-1, 24))[:, 8:16]'
        """
        place, view = self.dim, ""
        if self.period != self.size:
            place, view = self.dim + 1, f".unflatten({self.dim}, (-1, {self.period}))"
        return f"{name}{view}[{':, ' * place}{self.start}:{self.stop}]"


@functools.lru_cache(1 << 16)
def parameter_of(key: str) -> str:
    """Return the name of the parameter that a key of a symmetry refers to, as a whole or in part.

    Example:
        >>> parameter_of("h.0.attn.c_attn.weight[:, 0:768]"), parameter_of("fc.weight")
        ('h.0.attn.c_attn.weight', 'fc.weight')
        >>> parameter_of("query_key_value.bias.unflatten(0, (-1, 24))[:, 8:16]")
        'query_key_value.bias'
    """
    match = _KEY.fullmatch(key)
    return match["name"] if match else key


def dimension_of(key: str) -> int | None:
    """Return the dimension that a part divides, or None for a whole parameter.

    Example:
        >>> dimension_of("c_attn.weight[:, 0:8]"), dimension_of("c_attn.weight")
        (1, None)
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["before"].count(":") - (match["period"] is not None)


def periods_of(key: str, shape: Sequence[int]) -> int | None:
    """Return how often a part recurs in a parameter of this shape, or None for a whole parameter.

    Example:
        >>> periods_of("qkv.bias.unflatten(0, (-1, 24))[:, 8:16]", (96,)), periods_of("qkv.bias[0:8]", (96,))
        (4, 1)
    """
    match, dim = _KEY.fullmatch(key), dimension_of(key)
    if match is None or dim is None:
        return None
    return shape[dim] // int(match["period"] or shape[dim])


def widened_part(key: str, shape: Sequence[int], wide: Sequence[int], periods: int | None = None) -> str:
    """Return the key of the part with the same share of a wider parameter, or of each of its periods.

    Args:
        key: The key of a part.
        shape: The shape of the parameter that it belongs to.
        wide: The shape of the wider parameter.
        periods: The number of periods (interleaved heads) in the wider parameter; None: as many as in the
            narrow one.

    Raises:
        ValueError: The part would not start or end between two units.

    Example:
        >>> widened_part("qkv.weight[8:16]", (24, 8), (2304, 768))
        'qkv.weight[768:1536]'
        >>> widened_part("qkv.bias.unflatten(0, (-1, 24))[:, 8:16]", (96,), (768,), periods=8)
        'qkv.bias.unflatten(0, (-1, 96))[:, 32:64]'
    """
    match, dim = _KEY.fullmatch(key), dimension_of(key)
    if match is None or dim is None:
        return key
    period, size = int(match["period"] or shape[dim]), wide[dim]
    count = periods or shape[dim] // period
    start, stop = int(match["start"]), int(match["stop"])
    if size % count or any(place * (size // count) % period for place in (start, stop)):
        raise ValueError(f"the part {key!r} of {shape[dim]} units is no whole number of {size} units")
    length = size // count
    start, stop = (place * length // period for place in (start, stop))
    return Part(0, dim, start, stop, length, size).key(match["name"])


def expand_parts(symmetry: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return a symmetry with every divided parameter written as its parts.

    Args:
        symmetry: {parameter or part: exponent}.
        parts: {parameter: its parts}, as in ``Invariances.parts``.

    Example:
        >>> expand_parts({"w": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w[0:2]': -1, 'w[2:4]': -1, 'b': 1}
    """
    return {part: e for key, e in symmetry.items() for part in parts.get(key, [key])}


def merge_parts(symmetry: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return a symmetry with a parameter written as a whole if all its parts have one exponent.

    Args:
        symmetry: {parameter or part: exponent}.
        parts: {parameter: its parts}, as in ``Invariances.parts``.

    Example:
        >>> merge_parts({"w[0:2]": -1, "w[2:4]": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w': -1, 'b': 1}
        >>> merge_parts({"w[0:2]": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w[0:2]': -1, 'b': 1}
    """
    whole = {
        part: name
        for name, keys in parts.items()
        for part in keys
        if keys[0] in symmetry and all(symmetry.get(key) == symmetry[keys[0]] for key in keys)
    }
    return {whole.get(key, key): e for key, e in symmetry.items()}


class UnitRecord:
    """Σwg of all units, in the backward passes of a search.

    Args:
        places: (parameter, dimension) of the units to record.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        self._scale: dict[Place, list[Array]] = {place: [] for place in places}
        self._squares: dict[Place, dict[int, Array]] = {place: {} for place in places}
        self.with_squares: list[int] = []
        self.wholes: list[Array] = []

    def add(self, row: ScaleGradients) -> None:
        """Add a backward pass. The size of rounding errors follows from Σ(wg)² of a few."""
        if row.has_squares:
            self.with_squares.append(len(self.wholes))
        for place, scales in self._scale.items():
            units = row.units.get(place)
            scales.append(
                np.zeros(0) if units is None else units.scale.copy()
            )  # None: no gradient reached it
            if row.has_squares and units is not None:
                self._squares[place][len(self.wholes)] = units.scale_squares.copy()
        self.wholes.append(row.sums)

    def __contains__(self, place: Place) -> bool:
        return place in self._scale

    def scale(self, place: Place) -> Array:
        """Return Σwg, units × passes."""
        scales = self._scale[place]
        size = max(len(scale) for scale in scales)
        missing = np.zeros(size)
        return np.stack([scale if len(scale) else missing for scale in scales], axis=1)

    def squares(self, place: Place, divisors: Array) -> Array:
        """Return Σ(wg)² of each unit, averaged over passes that were divided by ``divisors``."""
        total = np.zeros(1)
        for row, squares in self._squares[place].items():
            total = total + squares / divisors[row] ** 2
        return np.asarray(total / max(len(self.with_squares), 1))

    def sums_of(self, part: Part) -> Array:
        """Return Σwg of a part in each pass."""
        units = self.scale((part.index, part.dim))
        folded = units.reshape(-1, part.period, units.shape[1])
        return np.asarray(folded[:, part.start : part.stop].sum((0, 1)))


def propose_parts(
    record: UnitRecord,
    columns: Array,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    candidates: Sequence[int],
    thresholds: Thresholds,
    *,
    resolved_only: bool = False,
) -> list[list[Part]]:
    """Return the parameters that may divide into parts, each as its parts in order.

    Args:
        record: Σwg of all units, in more passes than the rank of ``columns``.
        columns: Σwg of whole parameters and known parts, passes × columns.
        names: The name of each parameter.
        shapes: The shape of each parameter.
        candidates: The parameters that may divide.
        thresholds: The thresholds.
        resolved_only: Whether only parameters divide of which single units do not vanish in the combinations,
            as they all nearly do in the first layers of deep networks, whose outputs say little about them.
    """
    projection = _Projection(record, columns, thresholds)
    divided: list[list[Part]] = []
    done: set[int] = set()
    undivided: list[_Sequence] = []
    for k in sorted(candidates, key=lambda k: len(shapes[k]) < 2):  # a bias divides with its weight
        if k in done or not shapes[k]:
            continue
        others = [j for j in candidates if j not in done]
        for members in _units_to_divide(k, names, shapes, others, record):
            sequence = _Sequence(members, projection)
            if resolved_only and not sequence.is_resolved():
                continue
            ends, period = sequence.division()
            if len(ends) > 2:
                divided += sequence.parts(ends, period)
                done |= sequence.parameters
                undivided = [s for s in undivided if not s.parameters & done]
                break
            undivided.append(sequence)
    return divided + _by_equal_sums(undivided, projection)


def _units_to_divide(
    k: int,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    candidates: Sequence[int],
    record: UnitRecord,
) -> Iterator[tuple[Place, ...]]:
    """Yield what divides together: units of ``k`` with the vectors of the module first, then without."""
    module = names[k].rpartition(".")[0]
    dims = [d for d in range(min(2, len(shapes[k]))) if (k, d) in record and shapes[k][d] > 1]
    vectors = {
        dim: [
            (j, 0)
            for j in candidates
            if j != k
            and names[j].rpartition(".")[0] == module
            and tuple(shapes[j]) == (shapes[k][dim],)
            and (j, 0) in record
        ]
        for dim in dims
    }
    for dim in dims:
        yield ((k, dim), *vectors[dim])
    for dim in dims:
        if vectors[dim]:
            yield ((k, dim),)


class _Projection:
    """The combinations of passes to which no column contributes, and the passes that they combine."""

    def __init__(self, record: UnitRecord, columns: Array, thresholds: Thresholds) -> None:
        self.record, self.thresholds = record, thresholds
        self.combinations, self.divisors = unexplained_combinations(columns, thresholds.null)
        self.directions = np.random.default_rng(0).normal(size=(self.combinations.shape[1], 3))


@dataclass
class _Sequence:
    """The units of one dimension of a parameter, plus those of its bias, in order.

    Attributes:
        members: (parameter, dimension) of the tensors.
        projection: The combinations of passes to compare.
    """

    members: tuple[Place, ...]
    projection: _Projection
    _units: Array = field(init=False)
    _combined: Array = field(init=False)
    _squares: Array = field(init=False)
    _first: Array = field(init=False)
    _first_squares: Array = field(init=False)

    def __post_init__(self) -> None:
        record = self.projection.record
        scales = [record.scale(place) / self.projection.divisors for place in self.members]
        squares = [record.squares(place, self.projection.divisors) for place in self.members]
        self._first, self._units = scales[0], np.sum(scales, axis=0)
        self._first_squares, self._squares = (
            np.broadcast_to(values, (self.size,)) for values in (squares[0], np.sum(squares, axis=0))
        )
        self._combined = self._units @ self.projection.combinations

    @property
    def size(self) -> int:
        return len(self._units)

    @property
    def parameters(self) -> set[int]:
        return {k for k, _ in self.members}

    def is_resolved(self) -> bool:
        """Return whether Σwg of single units is far from zero in the combinations."""
        size = np.linalg.norm(self._combined) / self._combined.shape[1] ** 0.5
        allowed = self.projection.thresholds.invariant * float(self._squares.sum()) ** 0.5
        return bool(size > _CLEARLY_RESOLVED * allowed)

    def parts(self, ends: Sequence[int], period: int) -> list[list[Part]]:
        """Return the parts of each tensor."""
        return [
            [Part(k, dim, a, b, period, self.size) for a, b in itertools.pairwise(ends)]
            for k, dim in self.members
        ]

    def periods(self) -> list[int]:
        """Return the lengths that periods may have, from the whole down."""
        return [p for p in range(self.size, 2, -1) if self.size % p == 0]

    def cumulative(self, period: int) -> tuple[Array, Array]:
        """Return C of the combined passes, summed over all periods, and the tolerance of an equality."""
        combined = self._combined.reshape(-1, period, self._combined.shape[1]).sum(0)
        squares = np.concatenate([[0.0], np.cumsum(self._squares.reshape(-1, period).sum(0))])
        smaller = np.minimum(squares, squares[-1] - squares)
        # the rounding error of the whole, too, however small the range
        allowed = self.projection.thresholds.invariant * np.sqrt(smaller) + 1e-10 * np.sqrt(squares[-1])
        sums = np.concatenate([np.zeros((1, combined.shape[1])), np.cumsum(combined, axis=0)])
        return sums, allowed * combined.shape[1] ** 0.5

    def shares(self, period: int) -> Array:
        """Return the cumulative Σ(wg)², from 0 to 1."""
        squares = np.concatenate([[0.0], np.cumsum(self._squares.reshape(-1, period).sum(0))])
        return np.asarray(squares / max(float(squares[-1]), np.finfo(float).tiny))

    def division(self) -> tuple[list[int], int]:
        """Return the ends of the parts within a period, and the period, where C is zero; else one part."""
        for period in self.periods():
            sums, allowed = self.cumulative(period)
            hits = np.flatnonzero(np.linalg.norm(sums, axis=1) <= allowed)
            ends = self.distinct([int(b) for b in hits if 0 < b < period], period)
            if len(ends) > 2:
                return ends, period
        return [0, self.size], self.size

    def distinct(self, places: Sequence[int], period: int) -> list[int]:
        """Return 0, those of ``places`` between which Σwg is nonzero, and the period."""
        ends = [0]
        for b in places:
            if self.is_nonzero(ends[-1], b, period) and self.is_nonzero(b, period, period):
                ends.append(b)
        return [*ends, period]

    def is_nonzero(self, low: int, high: int, period: int) -> bool:
        """Return whether Σwg over these units, with and without the biases, is no rounding error."""
        thresholds = self.projection.thresholds
        for units, squares in ((self._units, self._squares), (self._first, self._first_squares)):
            size = float(np.mean(units.reshape(-1, period, units.shape[1])[:, low:high].sum((0, 1)) ** 2))
            of_range = float(squares.reshape(-1, period)[:, low:high].sum())
            least = max(thresholds.nonzero**2 * of_range, thresholds.silent**2 * float(squares.sum()))
            if size <= least:
                return False
        return True

    def whole(self) -> tuple[Array, float]:
        """Return Σwg of all units in each pass, and the tolerance of an equality."""
        squares = float(self._squares.sum()) * self._units.shape[1]
        return self._units.sum(0), self.projection.thresholds.invariant * squares**0.5


@dataclass(frozen=True)
class _Cut:
    """Places at which sequences divide.

    Attributes:
        covered: The number of units of the range that balances another.
        places: (sequence, period, places within a period).
    """

    covered: int
    places: tuple[tuple[int, int, tuple[int, ...]], ...]


def _by_equal_sums(sequences: Sequence[_Sequence], projection: _Projection) -> list[list[Part]]:
    """Return parts that balance parts: C(b) = ±C'(c) in two parameters, or C(a) = C(b) in one."""
    divided: list[list[Part]] = []
    done: set[int] = set()
    for cut in sorted(_equalities(sequences, projection), key=lambda cut: -cut.covered):
        found = [(sequences[i], sequences[i].distinct(at, period), period) for i, period, at in cut.places]
        if any(s.parameters & done for s, _, _ in found):
            continue
        if any(len(ends) < len(at) + 2 for (_, ends, _), (_, _, at) in zip(found, cut.places, strict=True)):
            continue
        for sequence, ends, period in found:
            divided += sequence.parts(ends, period)
            done |= sequence.parameters
    return divided


def _equalities(sequences: Sequence[_Sequence], projection: _Projection) -> Iterator[_Cut]:
    """Yield the largest ranges of units that balance each other, for each pair of sequences."""
    table = _table(sequences, projection)
    order = np.argsort(np.abs(table.lines[:, 0]), kind="stable")
    tied = _ties(sequences)
    groups: dict[tuple[int, int, int, int, int], list[tuple[int, int]]] = {}
    for offset in range(1, _NEIGHBOURS + 1):
        for i, j, sign in table.equal(order[:-offset], order[offset:], tied):
            key = table.which[i], table.periods[i], table.which[j], table.periods[j], sign
            pair = int(table.places[i]), int(table.places[j])
            groups.setdefault(tuple(map(int, key)), []).append(pair)  # type: ignore[arg-type]
    for (first, period, second, other, sign), pairs in groups.items():
        sums, within = sequences[first].cumulative(period)
        others, too = sequences[second].cumulative(other)
        equal = [(b, c) for b, c in pairs if _agree(sums[b], sign * others[c], within[b], too[c])]
        if not equal:
            continue
        repeats = sequences[first].size // period
        if first == second:
            start, stop = max(equal, key=lambda bc: bc[1] - bc[0])
            yield _Cut((stop - start) * repeats, ((first, period, (start, stop)),))
            continue
        low, high = min(equal), max(equal)  # units that balance one by one give a place for each of them
        from_start = low[0] <= period - high[0]
        place, partner = high if from_start else low
        covered = (place if from_start else period - place) * repeats
        yield _Cut(covered, ((first, period, (place,)), (second, other, (partner,))))


def _agree(a: Array, b: Array, within: float, too: float) -> bool:
    """Return whether two vectors are equal, within the larger tolerance if they are comparable."""
    return bool(np.linalg.norm(a - b) <= min(max(within, too), 10 * min(within, too)))


@dataclass(frozen=True)
class _Table:
    """All nonzero C of all sequences and periods.

    Attributes:
        lines: C in three random directions.
        allowed: The tolerance of each.
        squares: The cumulative Σ(wg)², relative to the sequence.
        which: The sequence of each.
        periods: Its period.
        places: Its place within the period.
    """

    lines: Array
    allowed: Array
    squares: Array
    which: Places
    periods: Places
    places: Places

    def equal(self, a: Places, b: Places, tied: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
        """Yield the entries of ``a`` and ``b`` that are equal up to the sign, in order, and the sign."""
        lines, within = self.lines, 4 * np.maximum(self.allowed[a], self.allowed[b])
        sign = np.sign(lines[a, 0] * lines[b, 0])
        gap = np.abs(lines[a] - sign[:, None] * lines[b]).max(axis=1)
        near = np.flatnonzero(gap <= within)
        a, b, sign = a[near], b[near], sign[near]
        same = self.which[a] == self.which[b]
        one_sequence = (self.periods[a] == self.periods[b]) & (sign > 0)
        one_sequence &= np.abs(self.squares[a] - self.squares[b]) > _SILENT
        kept = np.where(same, one_sequence, ~tied[self.which[a], self.which[b]])
        for i, j, s in zip(a[kept].tolist(), b[kept].tolist(), sign[kept].tolist(), strict=True):
            ordered = (self.which[i], self.places[i]) <= (self.which[j], self.places[j])
            yield (i, j, int(s)) if ordered else (j, i, int(s))


def _table(sequences: Sequence[_Sequence], projection: _Projection) -> _Table:
    """Return the table of all nonzero C."""
    lines: list[Array] = [np.zeros((0, 3))]
    tolerances: list[Array] = [np.zeros((2, 0))]
    entries: list[Places] = [np.zeros((3, 0), dtype=np.int64)]
    count = 0
    for i, sequence in enumerate(sequences):
        for period in sequence.periods() if count < _MOST_PLACES else [sequence.size]:
            sums, allowed = sequence.cumulative(period)
            places = np.arange(1, period)
            seen = np.linalg.norm(sums[places], axis=1) > _RESOLVED * allowed[places]
            places = places[seen]
            count += len(places)
            lines.append(sums[places] @ projection.directions)
            tolerances.append(np.stack([allowed[places], sequence.shares(period)[places]]))
            entries.append(np.stack([np.full(len(places), i), np.full(len(places), period), places]))
    return _Table(
        np.concatenate(lines), *np.concatenate(tolerances, axis=1), *np.concatenate(entries, axis=1)
    )


def _ties(sequences: Sequence[_Sequence]) -> NDArray[np.bool_]:
    """Return whether two sequences share a parameter, or their parameters balance each other as wholes.

    Whether with or without biases: then their units may balance one by one, but these are no parts.
    """
    firsts = np.array([sequence.members[0][0] for sequence in sequences])
    tied = np.zeros((len(sequences), len(sequences)), dtype=bool)
    for i, sequence in enumerate(sequences):
        tied[i] = np.isin(firsts, list(sequence.parameters))
    wholes = [sequence.whole() for sequence in sequences]
    lengths = np.array([float(np.linalg.norm(whole)) for whole, _ in wholes])
    order = np.argsort(lengths, kind="stable").tolist()
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            allowed = wholes[i][1] + wholes[j][1]
            if lengths[j] - lengths[i] > allowed:
                break
            first, second = wholes[i][0], wholes[j][0]
            if min(np.linalg.norm(first - second), np.linalg.norm(first + second)) <= allowed:
                tied |= np.outer(firsts == firsts[i], firsts == firsts[j])
    return tied | tied.T
