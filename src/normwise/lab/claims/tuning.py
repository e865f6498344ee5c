"""Choose hyper-parameters by the validation images, as every arm does it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from normwise.lab.claims.claim import Runs
from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.engine.run import Run

__all__ = ["chosen", "scores"]

K = TypeVar("K")


def scores(
    runs: Runs, candidates: Mapping[K, Run], seeds: Sequence[int], key: str = "validation_accuracy"
) -> dict[K, float | None]:
    """Return the mean of each candidate over the seeds, None where a seed did not finish."""
    found: dict[K, float | None] = {}
    for name, settings in candidates.items():
        values = runs.values(key, settings, seeds)
        found[name] = None if None in values else mean_with_interval(values).mean
    return found


def chosen(
    runs: Runs,
    candidates: Mapping[K, Run],
    seeds: Sequence[int],
    key: str = "validation_accuracy",
    smallest: bool = False,
) -> K:
    """Return the candidate with the best mean; the first where several are equal or none has finished.

    Args:
        runs: Where the candidates' runs are found.
        candidates: Runs by name.
        seeds: Seeds of tuning, none of which is one of the final comparison.
        key: What counts.
        smallest: Whether smaller is better, as with a loss.
    """
    means = scores(runs, candidates, seeds, key)

    def worth(name: K) -> float:
        mean = means[name]
        return -math.inf if mean is None else -mean if smallest else mean

    return max(means, key=worth)
