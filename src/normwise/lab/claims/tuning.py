"""Choosing a setting by several tuning seeds, and what that choice adds to the uncertainty of a comparison.

The rule, the same for every arm: the candidate with the best mean over the tuning seeds, on validation data;
a run that did not finish scores what guessing scores; of several equal ones, that nearest to the middle of
the grid. The choice is repeated with every resample of the tuning seeds. A comparison has two standard
errors: that of the mean over the compared seeds, at the setting that was chosen, and the deviation of that
mean over the choices. Their squares are added, and the degrees of freedom are those of Welch (1947) and
Satterthwaite (1946). Where every resample chooses the same, the interval is Student's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Generic, TypeVar

import numpy as np

from normwise.lab.claims.statistics import Estimate, interval, mean_with_interval

__all__ = ["Choice", "TunedValues", "choose", "mean_of_tuned", "mean_over_cells"]

K = TypeVar("K", bound=Hashable)
_EQUAL = 1e-9  # scores closer than that are equal


@dataclass(frozen=True)
class Choice(Generic[K]):
    """What was chosen.

    Attributes:
        best: The candidate that all tuning seeds together choose.
        resampled: The candidates that the resamples of the tuning seeds choose.
    """

    best: K
    resampled: tuple[K, ...]

    @property
    def needed(self) -> list[K]:
        """The distinct candidates, the best first: a comparison needs their runs."""
        return list(dict.fromkeys((self.best, *self.resampled)))

    def values(self, by_candidate: Mapping[K, Sequence[float]]) -> TunedValues:
        """Return the scores of the compared seeds, given those of each needed candidate."""
        return TunedValues(
            tuple(by_candidate[self.best]), tuple(tuple(by_candidate[name]) for name in self.resampled)
        )


@dataclass(frozen=True)
class TunedValues:
    """Scores of the compared seeds at the setting that was chosen, and at those that resamples choose.

    Attributes:
        chosen: A score for each seed.
        resampled: The same for each resample of the tuning seeds; empty for an arm with nothing to tune.
    """

    chosen: tuple[float, ...]
    resampled: tuple[tuple[float, ...], ...] = ()

    def minus(self, other: TunedValues) -> TunedValues:
        """Return the paired difference; both arms are tuned by the same seeds, and resampled together."""
        count = max(len(self.resampled), len(other.resampled))
        pairs = zip(self.repeated(count), other.repeated(count), strict=True)
        return TunedValues(
            _minus(self.chosen, other.chosen), tuple(_minus(mine, theirs) for mine, theirs in pairs)
        )

    def repeated(self, count: int) -> tuple[tuple[float, ...], ...]:
        """Return the scores of ``count`` resamples; an arm with nothing to tune has the same in all."""
        return self.resampled or (self.chosen,) * count


def mean_of_tuned(
    values: TunedValues, level: float = 0.95, pooled: tuple[float, int] | None = None
) -> Estimate:
    """Return the mean over the compared seeds, with an interval that carries the choice by tuning seeds.

    Args:
        values: Scores, or differences, of the compared seeds.
        level: Of the interval.
        pooled: A standard deviation between seeds that many cells share, and its degrees of freedom
            (:func:`normwise.lab.claims.statistics.pooled_deviation`); None: that of these values.

    Example:
        >>> stable = TunedValues((1.0, 2.0, 3.0), ((1.0, 2.0, 3.0),) * 27)
        >>> print(mean_of_tuned(stable))
        2.0 [-0.5, 4.5]
    """
    n = len(values.chosen)
    if n < 2 or (not values.resampled and pooled is None):
        return mean_with_interval(values.chosen, level)
    deviation, freedom = pooled or (float(np.std(values.chosen, ddof=1)), n - 1)
    square = deviation**2 / n
    tuning, tuning_freedom = _tuning_square(values.resampled)
    whole = square + tuning
    terms = square**2 / freedom + (tuning**2 / tuning_freedom if tuning else 0.0)
    welch = whole**2 / terms if terms else float(freedom)
    return interval(float(np.mean(values.chosen)), math.sqrt(whole), welch, n, level)


def mean_over_cells(cells: Sequence[TunedValues]) -> TunedValues:
    """Return the mean over the cells for each seed: the same cells for every seed."""
    count = max(len(cell.resampled) for cell in cells)
    repeated = [cell.repeated(count) for cell in cells]
    return TunedValues(
        _means([cell.chosen for cell in cells]),
        tuple(_means(of_resample) for of_resample in zip(*repeated, strict=True)),
    )


def choose(scores: Mapping[K, Sequence[float]]) -> Choice[K]:
    """Choose by the rule of this module.

    Args:
        scores: For each candidate, in the order of the grid, the score of each tuning seed; larger is better.

    Example:
        >>> choose({"low": [0.7, 0.8, 0.6], "middle": [0.7, 0.8, 0.6], "high": [0.1, 0.2, 0.3]}).best
        'middle'
    """
    names = list(scores)
    by_seed = np.array([scores[name] for name in names])  # candidates × seeds
    means = by_seed @ _resamples(by_seed.shape[1]).T / by_seed.shape[1]
    return Choice(
        names[_best(by_seed.mean(1))], tuple(names[_best(means[:, k])] for k in range(means.shape[1]))
    )


def _best(means: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> int:
    tied = np.flatnonzero(means >= means.max() - _EQUAL)
    return int(min(tied, key=lambda k: abs(k - (len(means) - 1) / 2)))


@lru_cache
def _resamples(seeds: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return how often each seed occurs in each of the draws with replacement: all of them, in order."""
    draws = [[draw.count(k) for k in range(seeds)] for draw in product(range(seeds), repeat=seeds)]
    return np.array(draws, dtype=float)


def _tuning_square(resampled: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the square of the standard error that comes from the choice, and its degrees of freedom."""
    if not resampled:
        return 0.0, 1
    seeds = next(m for m in range(1, 10) if m**m >= len(resampled))
    if seeds == 1:
        return 0.0, 1
    means = np.mean(np.asarray(resampled, dtype=float), axis=1)
    return float(np.var(means)) * seeds / (seeds - 1), seeds - 1


def _minus(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(first, second, strict=True))


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(of_seed) / len(of_seed) for of_seed in zip(*rows, strict=True))
