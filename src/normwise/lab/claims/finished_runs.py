"""Finished runs, looked up by their settings."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from normwise.lab.claims.tuning import Choice, choose
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import MisfitError, Store

__all__ = ["GUESSING_ACCURACY", "GUESSING_LOSS", "FinishedRuns", "StoredRuns", "over_seeds"]

K = TypeVar("K", bound=Hashable)
Summary = dict[str, Any]
Values = list[float | None]

CLASSES = 10  # of Fashion-MNIST and of the digits
GUESSING_ACCURACY = 100 / CLASSES  # per cent
GUESSING_LOSS = math.log(30)  # nats a character: guessing among the letters


def over_seeds(wanted: Iterable[Run], seeds: Sequence[int]) -> list[Run]:
    """Return each of the settings with each of the seeds."""
    return [replace(settings, seed=seed) for settings in wanted for seed in seeds]


class FinishedRuns:
    """The summaries and metrics of runs.

    Args:
        summaries: The summary of each run, by identity.
        store: Holds the metrics.
        classes: Number of classes of the images, for what guessing scores.
    """

    def __init__(self, summaries: dict[str, Summary], store: Store, classes: int = CLASSES) -> None:
        self._summaries = summaries
        self._store = store
        self._classes = classes

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

    def scores(
        self, settings: Run, seeds: Sequence[int], key: str = "test_accuracy", factor: float = 100.0
    ) -> list[float]:
        """Return an accuracy or a loss of each seed; a run that did not finish scores what guessing scores.

        Args:
            settings: The run.
            seeds: Of the runs.
            key: An entry of the summaries that ends in "accuracy" or "loss".
            factor: What it is multiplied by: 100 gives an accuracy in per cent, −1 makes a loss a score.
        """
        guess = GUESSING_LOSS if key.endswith("loss") else 1 / self._classes
        return [factor * (guess if value is None else value) for value in self.values(key, settings, seeds)]

    def losses(self, settings: Run, seeds: Sequence[int]) -> list[float]:
        """Return the test loss of each seed in nats; a run that did not finish scores see :meth:`scores`."""
        return self.scores(settings, seeds, "test_loss", 1.0)

    def accuracy(
        self, cells: Mapping[K, Run], seeds: Sequence[int], part: str = "test"
    ) -> dict[K, list[float]]:
        """Return the accuracy (%) of each seed for each of several settings, as :meth:`scores`."""
        return {cell: self.scores(settings, seeds, f"{part}_accuracy") for cell, settings in cells.items()}

    def choice(
        self, candidates: Mapping[K, Run], seeds: Sequence[int], key: str = "validation_accuracy"
    ) -> Choice[K]:
        """Return the candidate that the tuning seeds choose (:mod:`normwise.lab.claims.tuning`).

        Args:
            candidates: Settings by name, in the order of the grid.
            seeds: The tuning seeds, disjoint from the seeds of the comparison.
            key: Entry of the summaries that is compared; of a loss the smallest is best.
        """
        factor = -1.0 if key.endswith("loss") else 1.0
        return choose({name: self.scores(run, seeds, key, factor) for name, run in candidates.items()})

    def unfinished_count(self, settings: Run, seeds: Sequence[int]) -> int:
        """Return how many of the seeds did not finish."""
        return sum(summary["status"] != "finished" for summary in self.summaries(settings, seeds))

    def unfinished(self, groups: Mapping[str, Sequence[Run]]) -> list[str]:
        """Return a note for each named group of runs in which some did not finish."""
        notes = []
        for name, runs in groups.items():
            failed = [self[run] for run in runs if self.status(run) != "finished"]
            if failed:
                first = failed[0]
                notes.append(
                    f"{name}: {len(failed)} of {len(runs)} runs ended at step {first['step']} "
                    f"({first['status']}): {_readable(first['reason'])}"
                )
        return notes


class StoredRuns(FinishedRuns):
    """Finished runs that are read from a store one at a time, while others are still missing.

    Looking up a run that the store does not hold raises KeyError.
    """

    def __init__(self, store: Store) -> None:
        super().__init__({}, store)

    def __getitem__(self, settings: Run) -> Summary:
        try:
            summary = self._store.summary(settings)
        except MisfitError:
            summary = None
        if summary is None:
            raise KeyError(settings.identity)
        return summary

    def __contains__(self, settings: Run) -> bool:
        try:
            return bool(self[settings])
        except KeyError:
            return False

    def metrics(self, settings: Run) -> list[dict[str, Any]]:
        """Return what a run logged, a dict for each logged step."""
        self[settings]  # a KeyError if the run is missing
        return super().metrics(settings)


def _readable(reason: str) -> str:
    """Return why a run ended, with layers for groups of parameters and with rounded numbers.

    Example:
        >>> _readable("param_groups[1]['params'][0]: 0.18691588773600612 is too large")
        'the weights of layer 1: 0.1869 is too large'
    """
    reason = re.sub(r"param_groups\[(\d+)\]\['params'\]\[0\]", r"the weights of layer \1", reason)
    return re.sub(r"\d+\.\d{5,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.4g}", reason)
