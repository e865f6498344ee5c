"""Finished runs, looked up by their settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store

__all__ = ["FinishedRuns", "over_seeds"]

K = TypeVar("K")
Summary = dict[str, Any]
Values = list[float | None]


def over_seeds(wanted: Iterable[Run], seeds: Sequence[int]) -> list[Run]:
    """Return each of the settings with each of the seeds."""
    return [replace(settings, seed=seed) for settings in wanted for seed in seeds]


class FinishedRuns:
    """The summaries and metrics of runs.

    Args:
        summaries: The summary of each run, by identity.
        store: Holds the metrics.
    """

    def __init__(self, summaries: dict[str, Summary], store: Store) -> None:
        self._summaries = summaries
        self._store = store

    def __getitem__(self, settings: Run) -> Summary:
        return self._summaries[settings.identity]

    def metrics(self, settings: Run) -> list[dict[str, Any]]:
        """Return what a run logged, a dict for each logged step."""
        return self._store.metrics(settings)

    def status(self, settings: Run) -> str:
        """Return "finished", or why the run ended early."""
        return str(self[settings]["status"])

    def summaries(self, settings: Run, seeds: Sequence[int]) -> list[Summary]:
        """Return the summaries of a run with each of the seeds."""
        return [self[run] for run in over_seeds([settings], seeds)]

    def values(self, key: str, settings: Run, seeds: Sequence[int]) -> list[Any]:
        """Return an entry of each seed's summary, None where that run did not finish."""
        summaries = self.summaries(settings, seeds)
        return [summary[key] if summary["status"] == "finished" else None for summary in summaries]

    def points(self, key: str, settings: Run, seeds: Sequence[int]) -> Values:
        """Return :meth:`values` of a fraction, in percentage points."""
        return [None if value is None else 100 * value for value in self.values(key, settings, seeds)]

    def accuracy(self, cells: Mapping[K, Run], seeds: Sequence[int], part: str = "test") -> dict[K, Values]:
        """Return the accuracy (%) of each seed for each of several settings."""
        return {cell: self.points(f"{part}_accuracy", settings, seeds) for cell, settings in cells.items()}

    def mean_scores(
        self, candidates: Mapping[K, Run], seeds: Sequence[int], key: str = "validation_accuracy"
    ) -> dict[K, float | None]:
        """Return the mean over seeds for each candidate, None where a seed did not finish."""
        values = {name: self.values(key, settings, seeds) for name, settings in candidates.items()}
        return {name: None if None in of else mean_with_interval(of).mean for name, of in values.items()}

    def best(
        self,
        candidates: Mapping[K, Run],
        seeds: Sequence[int],
        key: str = "validation_accuracy",
        smallest: bool = False,
    ) -> K:
        """Return the candidate with the best mean; the first of several that are equal or did not finish.

        Args:
            candidates: Settings by name.
            seeds: The tuning seeds, disjoint from the seeds of the comparison.
            key: Entry of the summaries that is compared.
            smallest: Whether smaller is better, as with a loss.
        """
        means = self.mean_scores(candidates, seeds, key)

        def merit(name: K) -> float:
            mean = means[name]
            return -math.inf if mean is None else -mean if smallest else mean

        return max(means, key=merit)

    def unfinished(self, groups: Mapping[str, Sequence[Run]]) -> list[str]:
        """Return a note for each named group of runs in which some did not finish."""
        notes = []
        for name, runs in groups.items():
            failed = [self[run] for run in runs if self.status(run) != "finished"]
            if failed:
                first = failed[0]
                notes.append(
                    f"{name}: {len(failed)} of {len(runs)} runs ended at step {first['step']} "
                    f"({first['status']}): {first['reason']}"
                )
        return notes
