"""What a claim is: a question with its rule of judgement, written down before the runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.data.text import BIBLE, FINGERPRINTS, NUMBERS
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store
from normwise.lab.runs.replay import ReplayRun
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

__all__ = ["BUDGETS", "Budget", "Claim", "Finding", "HeatMap", "Plot", "Runs", "Series", "Table", "Verdict"]

Verdict = Literal["reproduced", "partly", "not reproduced"]
BUDGETS = ("quick", "full")
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Budget:
    """How much is spent on the claims, the same for all of them.

    Attributes:
        name: "quick" or "full".
        members: Which members of the weight-normalisation family are looked at.
        seeds: Seeds of the runs; every arm has the same ones, so that differences are paired.
        tuning_seeds: Seeds of the runs by which hyper-parameters are chosen; none of ``seeds``.
        training: A training run, except for arm and seed.
        small: The same for sweeps over many cells: half of the images.
        replaying: A replay, except for arm and seed.
        text: A run of the language model, except for arm and seed.
    """

    name: str
    members: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    training: TrainRun
    small: TrainRun
    replaying: ReplayRun
    text: TextRun

    @property
    def many_seeds(self) -> tuple[int, ...]:
        """Seeds enough to show that two arms are equivalent: 8, in the full budget 20."""
        return tuple(range(max(len(self.seeds), 20 if self.full else 8)))

    @property
    def full(self) -> bool:
        """Whether this is the full budget."""
        return self.name == "full"

    @classmethod
    def of(cls, name: str, data: str, fingerprint: str, seeds: int | None = None) -> Budget:
        """Return the budget of this name for a data set; ``seeds`` replaces its number of seeds.

        Raises:
            ValueError: An unknown name, or fewer than 2 seeds (an interval needs two).
        """
        if name not in BUDGETS:
            raise ValueError(f"--budget {name} is not known: choose from {', '.join(BUDGETS)}")
        if seeds is not None and not 2 <= seeds <= FIRST_TUNING_SEED:
            raise ValueError(
                f"--seeds {seeds} is not possible: give 2 (an interval needs two) to {FIRST_TUNING_SEED}"
            )
        quick = name == "quick"
        digits = data == "digits"  # 1437 training images of 8×8
        training = TrainRun(
            data=data,
            fingerprint=fingerprint,
            train_size=1100 if digits else 4000,
            validation_size=300 if digits else 2000,
            image_size=8 if digits else 7,
            batch_size=50 if digits else 100,
        )
        replaying = ReplayRun(
            data=data, fingerprint=fingerprint, train_size=1000, image_size=training.image_size, batch_size=50
        )
        members = ("weight_norm", "centered_weight_norm", "weight_standardization", "plain")
        return cls(
            name=name,
            members=members[:1] if quick else members,
            seeds=tuple(range(seeds or (3 if quick else 5))),
            tuning_seeds=(FIRST_TUNING_SEED,),
            training=training,
            small=replace(training, train_size=training.train_size // 2),
            replaying=replaying,
            text=_text_settings(name, NUMBERS if digits else BIBLE),
        )


def _text_settings(budget: str, text: str) -> TextRun:
    depth, length = (1, 160) if budget == "quick" else (2, 360)
    return TextRun(
        data=text,
        fingerprint=FINGERPRINTS[text],
        depth=depth,
        lr=0.01,
        length=length,
        warmup=length // 10,
    )


@dataclass(frozen=True)
class Series:
    """A curve: points with the interval that belongs to each (None where a run did not finish).

    Curves of the same ``color``, an index into the report's palette, belong together; None: each its own.
    ``by_seed`` has the values of each seed, one sequence as long as ``x`` for each.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False
    color: int | None = None
    by_seed: Sequence[Sequence[float | None]] | None = None

    @classmethod
    def over(
        cls,
        label: str,
        at: Mapping[float, Sequence[float | None]],
        dashed: bool = False,
        color: int | None = None,
    ) -> Series:
        """Return the means over seeds with 95 % intervals, of the values of all seeds at each place."""
        estimates = [mean_with_interval(values) for values in at.values()]
        return cls(
            label,
            list(at),
            [e.mean if e.n else None for e in estimates],
            [e.low if e.n > 1 else None for e in estimates],
            [e.high if e.n > 1 else None for e in estimates],
            dashed=dashed,
            color=color,
            by_seed=list(zip(*at.values(), strict=True)),
        )


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
class HeatMap:
    """A number for each pair of two settings, as a map in colours: ``values[j][i]`` is at ``x[i], y[j]``.

    The labels of the axes are text. None: there is no number. ``low`` and ``high`` are the ends of the
    scale of colours, by default those of the values; maps that are to be compared share them.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    low: float | None = None
    high: float | None = None


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
        maps: Heat maps.
        traces: What went on during training: norms, effective learning rates, rotations.
    """

    verdict: Verdict
    answer: str
    statistics: dict[str, Any]
    plots: Sequence[Plot]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=tuple)
    maps: Sequence[HeatMap] = field(default_factory=tuple)
    traces: Sequence[Plot] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, None for numbers that are not finite, which JSON has not."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


class Runs:
    """Finished runs, looked up by their settings."""

    def __init__(self, summaries: dict[str, dict[str, Any]], store: Store) -> None:
        self._summaries = summaries
        self._store = store

    def __getitem__(self, settings: Run) -> dict[str, Any]:
        return self._summaries[settings.identity]

    def status(self, identity: str) -> str:
        """Return "finished", or how the run ended."""
        return str(self._summaries[identity]["status"])

    def metrics(self, settings: Run) -> list[dict[str, Any]]:
        """Return what a run logged."""
        return self._store.metrics(settings)

    def values(self, key: str, settings: Run, seeds: Sequence[int]) -> list[float | None]:
        """Return a number of each seed's run, None where that run did not finish."""
        summaries = [self[replace(settings, seed=seed)] for seed in seeds]
        return [summary[key] if summary["status"] == "finished" else None for summary in summaries]

    def points(self, key: str, settings: Run, seeds: Sequence[int]) -> list[float | None]:
        """Return :meth:`values` of a fraction, in points of a hundred."""
        return [None if value is None else 100 * value for value in self.values(key, settings, seeds)]

    def endings(self, wanted: Mapping[str, Sequence[Run]]) -> list[str]:
        """Say of runs, by what they are, which did not finish and why: one note for each that has such."""
        notes = []
        for what, runs in wanted.items():
            failed = [found for found in map(self.__getitem__, runs) if found["status"] != "finished"]
            if failed:
                first = failed[0]
                notes.append(
                    f"{what}: {len(failed)} of {len(runs)} runs ended at step {first['step']} "
                    f"({first['status']}): {first['reason']}"
                )
        return notes


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
    needs_text: ClassVar[bool] = False
    """Whether its runs need the text of the budget, which is then fetched."""

    @abstractmethod
    def runs(self, budget: Budget) -> list[Run]:
        """Return the runs that the claim needs."""

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """Return what is to be run once :meth:`runs` are done and known, as with chosen hyper-parameters."""
        return []

    @abstractmethod
    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Return what these runs say."""

    def texts(self) -> dict[str, str]:
        """Return the pre-registration, for the report."""
        names = ("title", "source", "question", "arms", "statistic", "rule")
        return {name: getattr(self, name) for name in names}
