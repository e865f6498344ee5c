"""The statistics of the claims: means with intervals, over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Equivalence", "Estimate", "equivalence", "mean_with_interval", "paired_difference"]


class Estimate(NamedTuple):
    """A mean with its interval (95 % unless said) by Student's t, over n seeds; NaN where n is too small."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]" if self.n > 1 else self.short

    @property
    def short(self) -> str:
        """The mean alone; a dash where there is none."""
        return f"{self.mean:.1f}" if self.n else "–"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return plain values, None for NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self._asdict().items()}


def mean_with_interval(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Return the mean of the values that are there, with its interval of this level.

    Example:
        >>> print(mean_with_interval([1.0, 2.0, 3.0]))
        2.0 [-0.5, 4.5]
    """
    from scipy.stats import t  # takes a second to import

    there = np.array([value for value in values if value is not None], dtype=float)
    n = len(there)
    if n < 2:
        return Estimate(float(there[0]) if n else math.nan, math.nan, math.nan, n)
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(there.std(ddof=1)) / math.sqrt(n)
    mean = float(there.mean())
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(
    first: Sequence[float | None], second: Sequence[float | None], level: float = 0.95
) -> Estimate:
    """Return the mean of first − second over the seeds that both have.

    Example:
        >>> print(paired_difference([3.0, 5.0, None], [1.0, 2.0, 0.0]))
        2.5 [-3.9, 8.9]
    """
    pairs = zip(first, second, strict=True)
    return mean_with_interval([a - b for a, b in pairs if a is not None and b is not None], level)


class Equivalence(NamedTuple):
    """Two one-sided tests of whether a difference lies within ±margin, each at 5 %.

    Attributes:
        difference: The mean paired difference with its *90 %* interval: the two tests both reject where it
            lies within the margin (Schuirmann 1987).
        margin: What was fixed beforehand.
        power: The chance that so many seeds, with the spread that was seen, show an equivalence that is
            there, where the true difference is 0.
    """

    difference: Estimate
    margin: float
    power: float

    @property
    def shown(self) -> bool:
        """Whether the two are equivalent within the margin."""
        return self.difference.low > -self.margin and self.difference.high < self.margin

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the ends are named apart from those of a 95 % interval."""
        known = self.difference.as_dict()
        difference = {"mean": known["mean"], "low_90": known["low"], "high_90": known["high"]}
        power = None if math.isnan(self.power) else self.power
        return {"difference": difference, "margin": self.margin, "power": power, "shown": self.shown}


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
