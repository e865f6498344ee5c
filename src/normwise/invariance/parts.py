"""Parts of packed parameters (q, k and v in one projection): how to name them, and how to detect them.

A symmetry is a sum of scale gradients that vanishes in every backward pass. The cumulative sums C of the
units of one parameter (plus those of its bias) reveal two kinds of symmetries between parts of a tensor:

- Two ranges against each other, as queries against keys: 2·C(b) = C(c) in the order q k v,
  C(b) + C(c) = C(end) in the order q v k, and 2·C(c) = C(b) + C(end) in the order v q k. If heads are
  interleaved (q₁k₁v₁ q₂k₂v₂ …), the equation holds in every period.
- A range against another parameter, as values against the output projection, or the linear half of a gated
  unit against the layer that reads it: C(b) − C(a) = ±e.

These equations are between vectors with one entry per backward pass, so eight passes exclude coincidences.
These divisions are proposals: the null space of all passes, and rescaling, decide.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.scale_gradients import Array, ScaleGradients
from normwise.invariance.verdicts import Thresholds

__all__ = ["Part", "expand_parts", "merge_parts", "parameter_of", "propose_parts"]

_KEY = re.compile(r"(?P<name>.+?)(\.unflatten\(\d+, \(-1, \d+\)\))?\[(:, )*\d+:\d+\]")
_RESOLVED = 100.0  # a sum must be this many tolerances large for its equality to be evidence
_NEIGHBOURS = 4  # how many values on a sorted line are compared, on each side
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


def propose_parts(
    gradients: Sequence[ScaleGradients],
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    candidates: Sequence[int],
    thresholds: Thresholds,
) -> list[list[Part]]:
    """Return the parameters that may divide into parts, each as its parts in order.

    Args:
        gradients: The backward passes of the verdicts, with the sums over units.
        names: The name of each parameter.
        shapes: The shape of each parameter.
        candidates: The parameters that have an effect and are not invariant, not even partly.
        thresholds: The thresholds.
    """
    gradients = [row for row in gradients if row.reached[candidates].all()]
    if not candidates or len(gradients) < 4:  # random draws left out too much for a comparison
        return []
    balances = _Balances(gradients, names, candidates)
    divided: list[list[Part]] = []
    done: set[int] = set()
    for k in sorted(candidates, key=lambda k: len(shapes[k]) < 2):  # a bias divides with its weight
        if k in done or not shapes[k]:
            continue
        for dim, biases in _units_to_divide(k, names, shapes, [j for j in candidates if j not in done]):
            sums = _CumulativeSums(gradients, [(k, dim), *((j, 0) for j in biases)], thresholds)
            ends, period = _division(sums, balances.without([k, *biases]))
            if len(ends) > 2:
                size = sums.size
                for j, d in [(k, dim), *((j, 0) for j in biases)]:
                    divided.append([Part(j, d, a, b, period, size) for a, b in itertools.pairwise(ends)])
                    done.add(j)
                break
    return divided


def _units_to_divide(
    k: int, names: Sequence[str], shapes: Sequence[Sequence[int]], candidates: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield (dimension, biases that divide with it): with the biases of the module first, then without."""
    module = names[k].rpartition(".")[0]
    dims = range(min(2, len(shapes[k])))
    biases = {
        dim: [
            j
            for j in candidates
            if j != k and names[j].rpartition(".")[0] == module and tuple(shapes[j]) == (shapes[k][dim],)
        ]
        for dim in dims
        if len(shapes[k]) > 1
    }
    for dim in dims:
        yield dim, biases.get(dim, [])
    for dim, of_dim in biases.items():
        if of_dim:
            yield dim, []


def _division(sums: _CumulativeSums, balances: tuple[Array, Array]) -> tuple[list[int], int]:
    """Return the ends of the parts within a period, and the period."""
    size = sums.size
    ends, period = {0, size}, size
    pair = sums.equal_neighbours()
    if pair is not None:
        period = sums.period(*pair)
        ends = {0, *pair, period}
    else:
        for shorter in (p for p in range(3, size + 1) if size % p == 0):
            pair = sums.equal_apart(shorter)
            if pair is not None:
                ends, period = {0, *pair, shorter}, shorter
                break
    if period == size:
        ends |= set(sums.balanced_ends(sorted(ends), *balances))
    return sorted(ends), period


class _Balances:
    """The sums that may balance a range of units: those of a parameter, or of a weight with its bias."""

    def __init__(
        self, gradients: Sequence[ScaleGradients], names: Sequence[str], candidates: Sequence[int]
    ) -> None:
        sums, squares = np.stack([r.sums for r in gradients]), np.stack([r.squares for r in gradients])
        modules: dict[str, list[int]] = {}
        for k in candidates:
            modules.setdefault(names[k].rpartition(".")[0], []).append(k)
        self._members = [[k] for k in candidates] + [pair for pair in modules.values() if len(pair) == 2]
        self._sums = np.stack([sums[:, members].sum(1) for members in self._members])
        self._squares = np.array([squares[:, members].sum() for members in self._members])

    def without(self, indices: Sequence[int]) -> tuple[Array, Array]:
        """Return Σwg (balances × passes) and Σ(wg)² of those that do not contain these parameters."""
        kept = [not set(members) & set(indices) for members in self._members]
        return self._sums[kept], self._squares[kept]


class _CumulativeSums:
    """Cumulative sums over the units of one dimension of a weight, plus those of its bias."""

    def __init__(
        self,
        gradients: Sequence[ScaleGradients],
        members: Sequence[tuple[int, int]],
        thresholds: Thresholds,
    ) -> None:
        scale = sum(np.stack([row.units[m].scale for row in gradients]) for m in members)
        squares = sum(np.stack([row.units[m].scale_squares for row in gradients]).sum(0) for m in members)
        assert isinstance(scale, np.ndarray)
        assert isinstance(squares, np.ndarray)
        self.size = int(scale.shape[1])
        self._sums: Array = np.concatenate([np.zeros((1, len(gradients))), np.cumsum(scale.T, axis=0)])
        self._squares: Array = np.concatenate([[0.0], np.cumsum(squares)])
        self._thresholds = thresholds
        self._direction = np.random.default_rng(0).normal(size=len(gradients))
        self._line = self._sums @ self._direction
        self._order = np.argsort(self._line, kind="stable")

    def equal_neighbours(self) -> tuple[int, int] | None:
        """Return the first (b, c) such that the units before b balance those from b to c."""
        whole = np.arange(2, self.size + 1)
        hits: list[tuple[int, int]] = []
        for b in self._nearest(self._line[whole] / 2):
            gap = np.linalg.norm(2 * self._sums[b] - self._sums[whole], axis=1)
            tolerance = self._thresholds.invariant * np.sqrt(self._squares[whole])
            good = (b > 0) & (b < whole) & (gap <= tolerance)
            for end, middle in zip(whole[good].tolist(), b[good].tolist(), strict=True):
                if self._is_nonzero(0, middle) and self._is_nonzero(middle, end):
                    hits.append((end, middle))
        return (min(hits)[1], min(hits)[0]) if hits else None

    def equal_apart(self, period: int) -> tuple[int, int] | None:
        """Return (b, c) such that the last range of every period, from c, balances another range.

        That is [0, b), as in queries, values, keys, or [b, c), as in values, queries, keys.
        """
        inner = np.arange(1, period)
        starts = np.arange(0, self.size, period)
        for middle in (False, True):
            # C(b) = C(p) − C(c), or C(c) − C(b) = C(p) − C(c)
            targets = (
                (self._line[inner] + self._line[period]) / 2
                if middle
                else (self._line[period] - self._line[inner])
            )
            for nearest in self._nearest(targets):
                for first, second in zip(inner.tolist(), nearest.tolist(), strict=True):
                    b, c = first, second
                    if not 0 < b < c < period:
                        continue
                    low = self._sums[starts + (b if middle else 0)]
                    high = self._sums[starts + (c if middle else b)]
                    gap = high - low - (self._sums[starts + period] - self._sums[starts + c])
                    squares = self._squares[starts + period] - self._squares[starts]
                    tolerance = self._thresholds.invariant * np.sqrt(squares)
                    if (np.linalg.norm(gap, axis=1) <= tolerance).all() and all(
                        self._is_nonzero(x, y) for x, y in ((0, b), (b, c), (c, period))
                    ):
                        return b, c
        return None

    def period(self, b: int, c: int) -> int:
        """Return the smallest period in which the units before b balance those from b to c."""
        for period in range(c, self.size):
            if self.size % period:
                continue
            first = np.arange(0, self.size, period)
            gap = np.linalg.norm(
                2 * self._sums[first + b] - self._sums[first] - self._sums[first + c], axis=1
            )
            squares = self._squares[first + c] - self._squares[first]
            if (gap <= self._thresholds.invariant * np.sqrt(squares)).all():
                return period
        return self.size

    def balanced_ends(self, anchors: Sequence[int], sums: Array, squares: Array) -> Iterator[int]:
        """Yield places b such that one of ``sums`` balances the units between b and an anchor."""
        for a in anchors:
            for sign in (1, -1):
                targets = self._sums[a] + sign * sums
                for b in self._nearest(targets @ self._direction):
                    gap = np.linalg.norm(self._sums[b] - targets, axis=1)
                    of_range = np.abs(self._squares[b] - self._squares[a])
                    tolerance = self._thresholds.invariant * np.sqrt(of_range + squares)
                    # a balance of much larger terms equals any small sum to within its rounding error
                    seen = np.linalg.norm(self._sums[b] - self._sums[a], axis=1) > _RESOLVED * tolerance
                    for place in np.unique(b[(gap <= tolerance) & seen]).tolist():
                        low, high = min(a, place), max(a, place)
                        rest = self._squares[-1] - (self._squares[high] - self._squares[low])
                        rest_matters = rest > self._thresholds.nonzero**2 * self._squares[-1]
                        if place not in anchors and rest_matters and self._is_nonzero(low, high):
                            yield place

    def _is_nonzero(self, low: int, high: int) -> bool:
        """Return whether the sum over these units is nonzero."""
        size = np.linalg.norm(self._sums[high] - self._sums[low])
        return bool(size > self._thresholds.nonzero * np.sqrt(self._squares[high] - self._squares[low]))

    def _nearest(self, values: Array) -> Iterator[Places]:
        """Yield places whose cumulative sum, on the line, is nearest to each value."""
        at = np.searchsorted(self._line[self._order], values)
        for offset in range(-_NEIGHBOURS, _NEIGHBOURS):
            yield self._order[np.clip(at + offset, 0, self.size)]
