"""Where a packed parameter divides into parts that scale differently, found from the sums of its units.

A symmetry is a sum of elasticities that is zero in every row. The cumulative sums C of the units of one
parameter (with those of its bias) show two kinds of it that are hidden within a tensor:

- Two adjacent ranges against each other, as queries against keys: 2·C(b) = C(c), also where the heads are
  interleaved (q₁k₁v₁ q₂k₂v₂ …), and then in every period.
- A range against another parameter, as values against the output projection, or the linear half of a gated
  unit against what reads it: C(b) − C(a) = ±e.

Both are equations between vectors with one entry per row, so eight rows leave nothing to chance. What is
found here is only proposed: the null space of all rows, and rescaling, decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from normwise.invariance.elasticity import Array, Row
from normwise.invariance.parts import Part
from normwise.invariance.thresholds import Thresholds

__all__ = ["propose_splits"]

_RESOLVED = 100.0  # times the tolerance: how large a sum must be for its equality to say something
_NEIGHBOURS = 4  # values on a sorted line that are compared, to each side
Places = NDArray[np.int64]


def propose_splits(
    rows: Sequence[Row],
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    taken: Sequence[int],
    at: Thresholds,
) -> list[list[Part]]:
    """Return parameters that divide into parts, each as its parts in order.

    Args:
        rows: The rows of the verdicts, with the sums over units.
        names: The name of each parameter.
        shapes: The shape of each parameter.
        taken: The parameters that have an effect and are not invariant, not even in part.
        at: The thresholds.
    """
    rows = [row for row in rows if row.reached[taken].all()]
    if not taken or len(rows) < 4:  # random draws left too much out to compare
        return []
    partners = _Partners(rows, names, taken)
    found: list[list[Part]] = []
    done: set[int] = set()
    for k in taken:
        if len(shapes[k]) < 2 or k in done:
            continue
        for dim in (0, 1):
            size = shapes[k][dim]
            module = names[k].rpartition(".")[0]
            beside = [
                j
                for j in taken
                if names[j].rpartition(".")[0] == module and tuple(shapes[j]) == (size,) and j not in done
            ]
            sums = _Cumulative(rows, [(k, dim), *((j, 0) for j in beside)], at)
            ends, period = _division(sums, partners.without([k, *beside]))
            if len(ends) > 2:
                for j, d in [(k, dim), *((j, 0) for j in beside)]:
                    found.append([Part(j, d, a, b, period, size) for a, b in itertools.pairwise(ends)])
                    done.add(j)
                break
    return found


def _division(sums: _Cumulative, partners: tuple[Array, Array]) -> tuple[list[int], int]:
    """Return the ends of the parts within a period, and the period."""
    size = sums.size
    ends, period = {0, size}, size
    pair = sums.equal_neighbours()
    if pair is not None:
        period = sums.period(*pair)
        ends = {0, *pair, period}
    if period == size:
        ends |= set(sums.against(sorted(ends), *partners))
    return sorted(ends), period


class _Partners:
    """What a range may be balanced by: a parameter, or a weight with its bias."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str], taken: Sequence[int]) -> None:
        elasticity, squares = np.stack([r.elasticity for r in rows]), np.stack([r.squares for r in rows])
        modules: dict[str, list[int]] = {}
        for k in taken:
            modules.setdefault(names[k].rpartition(".")[0], []).append(k)
        self._members = [[k] for k in taken] + [own for own in modules.values() if len(own) == 2]
        self._sums = np.stack([elasticity[:, own].sum(1) for own in self._members])
        self._mass = np.array([squares[:, own].sum() for own in self._members])

    def without(self, indices: Sequence[int]) -> tuple[Array, Array]:
        """Return elasticities (partners × rows) and Σ(wg)² of the partners without these parameters."""
        kept = [not set(own) & set(indices) for own in self._members]
        return self._sums[kept], self._mass[kept]


class _Cumulative:
    """Cumulative sums over the units of one dimension of a weight, its bias added unit by unit."""

    def __init__(self, rows: Sequence[Row], members: Sequence[tuple[int, int]], at: Thresholds) -> None:
        scale = sum(np.stack([row.units[m].scale for row in rows]) for m in members)
        squares = sum(np.stack([row.units[m].scale_squares for row in rows]).sum(0) for m in members)
        assert isinstance(scale, np.ndarray)
        assert isinstance(squares, np.ndarray)
        self.size = int(scale.shape[1])
        self._ends: Array = np.concatenate([np.zeros((1, len(rows))), np.cumsum(scale.T, axis=0)])
        self._mass: Array = np.concatenate([[0.0], np.cumsum(squares)])
        self._at = at
        self._direction = np.random.default_rng(0).normal(size=len(rows))
        self._line = self._ends @ self._direction
        self._order = np.argsort(self._line, kind="stable")

    def equal_neighbours(self) -> tuple[int, int] | None:
        """Return the first (b, c) such that the units before b balance those from b to c."""
        whole = np.arange(2, self.size + 1)
        hits: list[tuple[int, int]] = []
        for b in self._near(self._line[whole] / 2):
            gap = np.linalg.norm(2 * self._ends[b] - self._ends[whole], axis=1)
            good = (b > 0) & (b < whole) & (gap <= self._at.invariant * np.sqrt(self._mass[whole]))
            for end, middle in zip(whole[good].tolist(), b[good].tolist(), strict=True):
                if self._speaks(0, middle) and self._speaks(middle, end):
                    hits.append((end, middle))
        return (min(hits)[1], min(hits)[0]) if hits else None

    def period(self, b: int, c: int) -> int:
        """Return the smallest period in which the units before b balance those from b to c."""
        for period in range(c, self.size):
            if self.size % period:
                continue
            first = np.arange(0, self.size, period)
            gap = np.linalg.norm(
                2 * self._ends[first + b] - self._ends[first] - self._ends[first + c], axis=1
            )
            mass = self._mass[first + c] - self._mass[first]
            if (gap <= self._at.invariant * np.sqrt(mass)).all():
                return period
        return self.size

    def against(self, anchors: Sequence[int], partners: Array, mass: Array) -> Iterator[int]:
        """Yield ends b such that the units between b and an anchor are balanced by a partner."""
        for a in anchors:
            for sign in (1, -1):
                targets = self._ends[a] + sign * partners
                for b in self._near(targets @ self._direction):
                    gap = np.linalg.norm(self._ends[b] - targets, axis=1)
                    own = np.abs(self._mass[b] - self._mass[a])
                    tolerance = self._at.invariant * np.sqrt(own + mass)
                    # a partner of much larger terms balances anything small to within its own rounding
                    seen = np.linalg.norm(self._ends[b] - self._ends[a], axis=1) > _RESOLVED * tolerance
                    for place in np.unique(b[(gap <= tolerance) & seen]).tolist():
                        low, high = min(a, place), max(a, place)
                        rest = self._mass[-1] - (self._mass[high] - self._mass[low])
                        loud = rest > self._at.honest**2 * self._mass[-1]
                        if place not in anchors and loud and self._speaks(low, high):
                            yield place

    def _speaks(self, low: int, high: int) -> bool:
        """Return whether the sum over these units is not zero by itself."""
        size = np.linalg.norm(self._ends[high] - self._ends[low])
        return bool(size > self._at.honest * np.sqrt(self._mass[high] - self._mass[low]))

    def _near(self, values: Array) -> Iterator[Places]:
        """Yield places whose cumulative sum, on the line, is nearest to each value."""
        at = np.searchsorted(self._line[self._order], values)
        for offset in range(-_NEIGHBOURS, _NEIGHBOURS):
            yield self._order[np.clip(at + offset, 0, self.size)]
