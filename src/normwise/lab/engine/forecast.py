"""How long the runs that are left take, learned from those that are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from normwise.lab.engine.run import Run

__all__ = ["Forecast"]

_PRIOR = 20.0  # seconds: how much the costs that the runs state count


class Forecast:
    """The seconds that runs still need on one core.

    A run states its rough cost in seconds. How far that is off on this machine is learned for each class of
    runs, towards the average of all classes where few are done.

    Args:
        later: The cost of runs that are not known yet.

    Example:
        >>> from normwise.lab.runs.dead_units import DeadUnitsRun
        >>> runs = [DeadUnitsRun(rule={}, dtype="float32", seed=seed) for seed in range(2)]
        >>> forecast = Forecast()
        >>> forecast.begin(runs)
        >>> forecast.seconds == sum(run.cost for run in runs)
        True
    """

    def __init__(self, later: float = 0.0) -> None:
        self.later = later
        self._left: Counter[str] = Counter()
        self._cost: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()

    def begin(self, runs: Iterable[Run]) -> None:
        """Set the runs that are to be executed."""
        self._left.clear()
        for run in runs:
            self._left[type(run).__name__] += run.cost  # type: ignore[assignment]

    def finish(self, run: Run, seconds: float) -> None:
        """Take note of a run that is done, and of the seconds that it took."""
        kind = type(run).__name__
        self._left[kind] -= run.cost  # type: ignore[assignment]
        self._cost[kind] += run.cost  # type: ignore[assignment]
        self._spent[kind] += seconds  # type: ignore[assignment]

    @property
    def seconds(self) -> float:
        """The seconds that the runs still need on one core."""
        average = (sum(self._spent.values()) + _PRIOR) / (sum(self._cost.values()) + _PRIOR)
        known = sum(
            max(0.0, left) * (self._spent[kind] + _PRIOR * average) / (self._cost[kind] + _PRIOR)
            for kind, left in self._left.items()
        )
        return known + self.later * average
