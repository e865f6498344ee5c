"""A claim: a question with a rule of judgement, registered before the runs; then measure, judge, show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from normwise.lab.claims.budget import BUDGETS, Budget
from normwise.lab.claims.changes import Change, changes_of
from normwise.lab.claims.conditions import Verdict
from normwise.lab.claims.exhibits import HeatMap, Plot, Table, can_be_drawn
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.claims.statistics import Equivalence, Estimate
from normwise.lab.engine.run import Run

__all__ = ["Claim", "Exhibits", "Measured", "Outcome", "in_short"]


@dataclass(frozen=True)
class Measured:
    """The numbers of a claim.

    Attributes:
        statistics: The numbers that are reported, by name: plain values, estimates and equivalences.
        details: Other values that ``judge`` or ``show`` use, such as the accuracy of each seed.
    """

    statistics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exhibits:
    """What the report shows of a claim.

    Attributes:
        answer: The answer to the question, in a sentence or two.
        plots: At least one.
        tables: The numbers behind the plots.
        notes: Further observations: runs that failed and why, contradictions to the paper.
        maps: Heat maps.
        traces: Curves of what happened during training: norms, effective learning rates, rotations.
    """

    answer: str
    plots: Sequence[Plot]
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    maps: Sequence[HeatMap] = ()
    traces: Sequence[Plot] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of all three steps."""

    verdict: Verdict
    headline: str
    statistics: dict[str, Any]
    thresholds: dict[str, tuple[float, ...]]
    exhibits: Exhibits

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; numbers that no axis can show, such as infinity, become None."""
        exhibits = asdict(self.exhibits)
        answer = exhibits.pop("answer")
        merged = {
            "verdict": self.verdict,
            "headline": self.headline,
            "answer": answer,
            "statistics": self.statistics,
            "thresholds": self.thresholds,
            **exhibits,
        }
        plain: dict[str, Any] = _plain(merged)
        return plain


class Claim(ABC):
    """A claim of the paper. Each is a subclass in a file of this folder, named there as ``CLAIM``.

    The texts are the registration: they were written before the runs. What was changed after results had been
    seen stands in :mod:`normwise.lab.claims.changes`. ``budgets`` names the budgets that the claim is for.

    Args:
        budget: How much computation the claim may use.
    """

    id: ClassVar[str]
    order: ClassVar[int]
    title: ClassVar[str]
    source: ClassVar[str]
    question: ClassVar[str]
    arms: ClassVar[str]
    statistic: ClassVar[str]
    rule: ClassVar[str]
    budgets: ClassVar[tuple[str, ...]] = BUDGETS
    failures_are_the_subject: ClassVar[bool] = False  # runs that do not finish are what is asked about

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    @property
    def first(self) -> str:
        """The first member of the weight-normalisation family, for which most is shown."""
        return self.budget.members[0]

    @abstractmethod
    def runs(self) -> list[Run]:
        """Return the runs that the claim needs."""

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """Return the runs whose settings depend on the results of :meth:`runs`, such as tuned arms."""
        return []

    def second_cost(self) -> float:
        """Return roughly the cost of :meth:`second_runs`, for the time left before they are known."""
        return 0.0

    @abstractmethod
    def measure(self, runs: FinishedRuns) -> Measured:
        """Return the numbers."""

    @abstractmethod
    def judge(self, measured: Measured) -> Verdict:
        """Apply the rule of judgement."""

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the estimates are judged against, by their keys joined by " / "."""
        return {}

    @abstractmethod
    def headline(self, measured: Measured) -> str:
        """Return what was found with its number, in a line of at most 54 characters (quick budget)."""

    @abstractmethod
    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Return what the report shows; ``runs`` is for curves over the steps of training."""

    def outcome(self, runs: FinishedRuns) -> Outcome:
        """Measure, judge and show."""
        measured = self.measure(runs)
        return Outcome(
            self.judge(measured),
            self.headline(measured),
            measured.statistics,
            self.thresholds(measured),
            self.show(runs, measured),
        )

    def changes(self) -> list[Change]:
        """Return what was changed in the registration after results had been seen, for the report."""
        return changes_of(self.id) if self.budget.name in BUDGETS else []

    @classmethod
    def texts(cls) -> dict[str, str]:
        """Return the pre-registration, for the report."""
        names = ("title", "source", "question", "arms", "statistic", "rule")
        return {name: getattr(cls, name) for name in names}


def in_short(by_member: Mapping[str, Estimate], spec: str = ".1f") -> str:
    """Return an estimate in words; of several members, the range of their means.

    Example:
        >>> in_short({"weight_norm": Estimate(1.0, 0.5, 1.5, 3)}, "+.1f")
        '+1.0 [+0.5, +1.5]'
        >>> in_short({"a": Estimate(1.0, 0.5, 1.5, 3), "b": Estimate(-2.0, -3.0, -1.0, 3)}, "+.1f")
        '-2.0 … +1.0'
    """
    means = sorted(by_member.values(), key=lambda estimate: estimate.mean)
    if len(means) == 1:
        return f"{means[0]:{spec}}"
    return f"{means[0].mean:{spec}} … {means[-1].mean:{spec}}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if can_be_drawn(value) else None
    if isinstance(value, Estimate | Equivalence):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
