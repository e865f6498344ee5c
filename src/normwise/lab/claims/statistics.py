"""The statistics of the claims: means with intervals over paired seeds, and tests of equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Equivalence", "Estimate", "equivalence", "mean_with_interval", "paired_difference"]


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


def mean_with_interval(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Return the mean of the values that are not None, with its confidence interval.

    ``scipy.stats.ttest_1samp(...).confidence_interval()`` gives the same numbers, but warns of precision loss
    where all values are equal, which is an ordinary case here.

    Example:
        >>> print(mean_with_interval([1.0, 2.0, 3.0]))
        2.0 [-0.5, 4.5]
    """
    from scipy.stats import t  # takes a second to import

    known = np.array([value for value in values if value is not None], dtype=float)
    n = len(known)
    if n < 2:
        return Estimate(float(known[0]) if n else math.nan, math.nan, math.nan, n)
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(known.std(ddof=1)) / math.sqrt(n)
    mean = float(known.mean())
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(
    first: Sequence[float | None], second: Sequence[float | None], level: float = 0.95
) -> Estimate:
    """Return the mean of first − second over the seeds for which both have a value.

    Example:
        >>> print(paired_difference([3.0, 5.0, None], [1.0, 2.0, 0.0]))
        2.5 [-3.9, 8.9]
    """
    pairs = zip(first, second, strict=True)
    return mean_with_interval([a - b for a, b in pairs if a is not None and b is not None], level)


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
    from scipy.stats import norm, t

    difference = paired_difference(first, second, level=0.9)
    if difference.n < 2:
        return Equivalence(difference, margin, math.nan)
    half = difference.high - difference.mean
    error = half / float(t.ppf(0.95, difference.n - 1))
    room = (margin - half) / error if error > 0 else math.inf
    power = max(0.0, 2 * float(norm.cdf(room)) - 1)
    return Equivalence(difference, margin, power)
