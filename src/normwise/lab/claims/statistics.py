"""The statistics of the claims: means with intervals over paired seeds, spreads, and tests of equivalence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "Equivalence",
    "Estimate",
    "bootstrap",
    "equivalence",
    "interval",
    "mean_with_interval",
    "median",
    "paired_difference",
    "pooled_deviation",
    "within",
]

Array = NDArray[np.float64]
_DRAWS = 4000  # of the bootstrap


class Estimate(NamedTuple):
    """The mean over ``n`` seeds with its confidence interval by Student's t, at 95 % unless stated otherwise.

    The mean is NaN for ``n = 0``, the ends of the interval are NaN for ``n < 2``. A format specification
    applies to all three numbers; the interval is left out where there is none.

    Example:
        >>> f"{Estimate(1.0, 0.5, 1.5, n=3):+.2f}, {Estimate(1.0, math.nan, math.nan, n=1)}"
        '+1.00 [+0.50, +1.50], 1.0'
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return format(self, ".1f")

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        if not self.n:
            return "–"
        interval = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.n > 1 else ""
        return f"{self.mean:{spec}}{interval}"

    @property
    def short(self) -> str:
        """The mean alone, or a dash where no seed finished."""
        return f"{self.mean:.1f}" if self.n else "–"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as plain values, None for NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self._asdict().items()}


def interval(mean: float, error: float, freedom: float, n: int, level: float = 0.95) -> Estimate:
    """Return a mean with the interval that its standard error and degrees of freedom give by Student's t.

    Example:
        >>> print(interval(2.0, 1 / 3**0.5, 2, n=3))
        2.0 [-0.5, 4.5]
    """
    from scipy.stats import t  # takes a second to import

    half = float(t.ppf((1 + level) / 2, freedom)) * error
    return Estimate(mean, mean - half, mean + half, n)


def mean_with_interval(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Return the mean of the values that are not None, with its confidence interval.

    There is none if more than half of the values are None. ``scipy.stats.ttest_1samp(...)
    .confidence_interval()`` gives the same numbers, but warns of precision loss where all values are equal,
    which is an ordinary case here.

    Example:
        >>> print(mean_with_interval([1.0, 2.0, 3.0]))
        2.0 [-0.5, 4.5]
        >>> print(mean_with_interval([1.0, None, None]))
        –
    """
    known = np.array([value for value in values if value is not None], dtype=float)
    n = len(known)
    if not n or 2 * n < len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if n < 2:
        return Estimate(float(known[0]), math.nan, math.nan, n)
    return interval(float(known.mean()), float(known.std(ddof=1)) / math.sqrt(n), n - 1, n, level)


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are not None, or None under the rule of mean_with_interval.

    Example:
        >>> median([1.0, 9.0, 2.0])
        2.0
    """
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known and 2 * len(known) >= len(values) else None


def pooled_deviation(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the common standard deviation of samples with different means, and its degrees of freedom.

    It is for many cells of one design with few seeds each, as in an analysis of variance.

    Example:
        >>> pooled_deviation([[1.0, 3.0], [10.0, 12.0]])
        (1.4142135623730951, 2)
    """
    freedom = sum(len(sample) - 1 for sample in samples)
    squares = sum(float(np.var(sample)) * len(sample) for sample in samples)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def bootstrap(
    by_seed: Sequence[Sequence[float]], statistic: Callable[[Array], Array], level: float = 0.95
) -> Estimate:
    """Return a statistic of the means over seeds, such as their range, with an interval.

    Seeds are drawn with replacement, the same for all columns, so that what the columns of a seed have in
    common stays paired (Efron & Tibshirani 1993, chapter 6). The deviation of the statistic over the draws,
    times √(n/(n − 1)), is its standard error, and the interval is that of Student's t with n − 1 degrees of
    freedom: for a mean it is the interval of :func:`mean_with_interval`.

    Args:
        by_seed: A row for each seed, a column for each mean.
        statistic: From means of shape (..., columns) to shape (...).
        level: Of the interval.

    Example:
        >>> rows = [[1.0, 5.0], [2.0, 7.0], [3.0, 6.0]]
        >>> print(bootstrap(rows, lambda means: means.max(-1) - means.min(-1)))
        4.0 [1.5, 6.5]
    """
    rows = np.asarray(by_seed, dtype=float)
    n = len(rows)
    value = float(statistic(rows.mean(0)))
    if n < 2:
        return Estimate(value, math.nan, math.nan, n)
    counts = _all_draws(n) if n <= 5 else np.random.default_rng(0).multinomial(n, [1 / n] * n, size=_DRAWS)
    error = float(np.std(statistic(counts @ rows / n))) * math.sqrt(n / (n - 1))
    return interval(value, error, n - 1, n, level)


def _all_draws(n: int) -> Array:
    """Return how often each of n seeds occurs in every one of the nⁿ draws."""
    draws = np.indices((n,) * n).reshape(n, -1)
    return np.stack([(draws == k).sum(0) for k in range(n)], axis=1).astype(float)


def paired_difference(
    first: Sequence[float | None], second: Sequence[float | None], level: float = 0.95
) -> Estimate:
    """Return the mean of first − second over the seeds for which both have a value, at least half of them.

    Example:
        >>> print(paired_difference([3.0, 5.0, None], [1.0, 2.0, 0.0]))
        2.5 [-3.9, 8.9]
    """
    pairs = zip(first, second, strict=True)
    return mean_with_interval([None if a is None or b is None else a - b for a, b in pairs], level)


class Equivalence(NamedTuple):
    """Two one-sided tests (Schuirmann 1987) of whether a difference lies within ±margin, each at 5 %.

    Attributes:
        difference: The mean paired difference with its *90 %* interval: both tests reject exactly where this
            interval lies within the margin.
        margin: The largest difference that counts as equivalent, fixed before the runs.
        power: The probability that the tests show equivalence if the true difference is 0, for this number of
            seeds and this spread.
    """

    difference: Estimate
    margin: float
    power: float

    @property
    def shown(self) -> bool:
        """Whether the tests show equivalence within the margin."""
        return self.difference.low > -self.margin and self.difference.high < self.margin

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the ends are called low_90 and high_90, as other intervals are at 95 %."""
        mean, low, high, _ = self.difference.as_dict().values()
        power = None if math.isnan(self.power) else self.power
        return {
            "difference": {"mean": mean, "low_90": low, "high_90": high},
            "margin": self.margin,
            "power": power,
            "shown": self.shown,
        }


def equivalence(first: Sequence[float | None], second: Sequence[float | None], margin: float) -> Equivalence:
    """Test whether first − second, paired, lies within ±margin.

    Example:
        >>> equivalence([1.0, 2.1, 2.9, 4.0], [1.1, 2.0, 3.0, 4.1], margin=0.5).shown
        True
        >>> equivalence([1.0, 4.0], [2.0, 2.0], margin=0.5).shown
        False
    """
    return within(paired_difference(first, second, level=0.9), margin)


def within(difference: Estimate, margin: float) -> Equivalence:
    """Return the test of equivalence for a difference with its 90 % interval.

    Example:
        >>> within(Estimate(0.1, -0.2, 0.4, n=5), margin=0.5).shown
        True
    """
    from scipy.stats import norm, t

    if difference.n < 2:
        return Equivalence(difference, margin, math.nan)
    half = difference.high - difference.mean
    error = half / float(t.ppf(0.95, difference.n - 1))
    room = (margin - half) / error if error > 0 else math.inf
    power = max(0.0, 2 * float(norm.cdf(room)) - 1)
    return Equivalence(difference, margin, power)
