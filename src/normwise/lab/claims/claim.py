"""What a claim is: a question with its rule of judgement, written down before the runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from normwise.lab.settings import ReplaySettings, Settings, TrainSettings
from normwise.lab.store import Store

__all__ = ["BUDGETS", "Budget", "Claim", "Finding", "Plot", "Runs", "Series", "Table", "Verdict"]

Verdict = Literal["reproduced", "partly", "not reproduced"]
BUDGETS = ("quick", "full")


@dataclass(frozen=True)
class Budget:
    """How much is spent on the claims, the same for all of them.

    Attributes:
        name: "quick" or "full".
        members: Which members of the weight-normalisation family are looked at.
        seeds: Seeds of the runs; every arm has the same ones, so that differences are paired.
        training: Settings of a training run, but for arm and seed.
        replaying: Settings of a replay, but for arm and seed.
    """

    name: str
    members: tuple[str, ...]
    seeds: tuple[int, ...]
    training: TrainSettings
    replaying: ReplaySettings

    @classmethod
    def of(cls, name: str, data: str, fingerprint: str, seeds: int | None = None) -> Budget:
        """Return the budget of this name for a data set; ``seeds`` replaces its number of seeds.

        Raises:
            ValueError: An unknown name, or fewer than 2 seeds (an interval needs two).
        """
        if name not in BUDGETS:
            raise ValueError(f"--budget {name} is not known: choose from {', '.join(BUDGETS)}")
        if seeds is not None and seeds < 2:
            raise ValueError(f"--seeds {seeds} is too few for an interval: give 2 or more")
        quick = name == "quick"
        small = data == "digits"  # 1437 training images of 8×8
        training = TrainSettings(
            data=data,
            fingerprint=fingerprint,
            train_size=1400 if small else 4000 if quick else 16000,
            image_size=8 if small else 14,
            width=8 if quick else 16,
            batch_size=50 if small else 100,
            epochs=8 if quick else 12,
        )
        replaying = ReplaySettings(
            data=data, fingerprint=fingerprint, train_size=1000, image_size=training.image_size, batch_size=50
        )
        members = ("weight_norm", "centered_weight_norm", "weight_standardization", "plain")
        return cls(
            name=name,
            members=members[:1] if quick else members,
            seeds=tuple(range(seeds or (3 if quick else 5))),
            training=training,
            replaying=replaying,
        )


@dataclass(frozen=True)
class Series:
    """A curve: points with the interval that belongs to each (None where a run did not finish).

    Curves of the same ``color``, an index into the report's palette, belong together; None: each its own.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False
    color: int | None = None


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers. Numbers are printed as they are: round them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Finding:
    """What a claim came to.

    Attributes:
        verdict: By the claim's own rule.
        answer: The answer to its question, in a sentence or two.
        statistics: The numbers that the verdict rests on, by name.
        plots: At least one.
        tables: What is behind the plots.
        notes: What else was seen: runs that failed and why, what contradicts the paper.
    """

    verdict: Verdict
    answer: str
    statistics: dict[str, Any]
    plots: Sequence[Plot]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


class Runs:
    """Finished runs, looked up by their settings."""

    def __init__(self, summaries: dict[str, dict[str, Any]], store: Store) -> None:
        self._summaries = summaries
        self._store = store

    def __getitem__(self, settings: Settings) -> dict[str, Any]:
        return self._summaries[settings.identity]

    def status(self, identity: str) -> str:
        """Return "finished", or how the run ended."""
        return str(self._summaries[identity]["status"])

    def metrics(self, settings: Settings) -> list[dict[str, Any]]:
        """Return what a run logged."""
        return self._store.metrics(settings)

    def values(self, key: str, settings: Settings, seeds: Sequence[int]) -> list[float | None]:
        """Return a number of each seed's run, None where that run did not finish."""
        summaries = [self[replace(settings, seed=seed)] for seed in seeds]
        return [summary[key] if summary["status"] == "finished" else None for summary in summaries]


class Claim(ABC):
    """A claim of the paper. One file of this folder, one subclass, one instance named CLAIM.

    The texts are the pre-registration: they were written before the run, and a commit that changes them
    says why.
    """

    id: ClassVar[str]
    order: ClassVar[int]
    title: ClassVar[str]
    source: ClassVar[str]
    question: ClassVar[str]
    arms: ClassVar[str]
    statistic: ClassVar[str]
    rule: ClassVar[str]

    @abstractmethod
    def runs(self, budget: Budget) -> list[Settings]:
        """Return the runs that the claim needs."""

    @abstractmethod
    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Return what these runs say."""

    def texts(self) -> dict[str, str]:
        """Return the pre-registration, for the report."""
        names = ("title", "source", "question", "arms", "statistic", "rule")
        return {name: getattr(self, name) for name in names}
