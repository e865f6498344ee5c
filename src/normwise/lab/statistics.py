"""The statistics of the claims: means with intervals, over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "mean_with_interval", "paired_difference"]


class Estimate(NamedTuple):
    """A mean with its 95 % interval by Student's t, over n seeds; NaN where n is too small."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return plain values, None for NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self._asdict().items()}


def mean_with_interval(values: Sequence[float | None]) -> Estimate:
    """Return the mean of the values that are there.

    Example:
        >>> print(mean_with_interval([1.0, 2.0, 3.0]))
        2.0 [-0.5, 4.5]
    """
    from scipy.stats import t  # takes a second to import

    there = np.array([value for value in values if value is not None], dtype=float)
    n = len(there)
    if n < 2:
        return Estimate(float(there[0]) if n else math.nan, math.nan, math.nan, n)
    half = float(t.ppf(0.975, n - 1)) * float(there.std(ddof=1)) / math.sqrt(n)
    mean = float(there.mean())
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(first: Sequence[float | None], second: Sequence[float | None]) -> Estimate:
    """Return the mean of first − second over the seeds that both have.

    Example:
        >>> print(paired_difference([3.0, 5.0, None], [1.0, 2.0, 0.0]))
        2.5 [-3.9, 8.9]
    """
    pairs = zip(first, second, strict=True)
    return mean_with_interval([a - b for a, b in pairs if a is not None and b is not None])
