"""Claim: AWS with nothing tuned, started in equilibrium, beats a tuned L2 at any learning rate and scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

import normwise as nw
from normwise.lab.claims.budget import Budget
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_of, verdict_of
from normwise.lab.claims.exhibits import HeatMap, Plot, Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.statistics import Estimate, mean_with_interval, median, pooled_deviation, within
from normwise.lab.claims.tuning import Choice, TunedValues, mean_of_tuned, mean_over_cells
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, STARTED, from_equilibrium, scaled, times, with_arm
from normwise.lab.runs.base import OptimizerRun, rule_from
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

MULTIPLES = tuple(10 ** (k / 2) for k in range(-3, 4))  # of the matched coefficient: seven
FACTORS = (0.25, 1.0, 4.0)
SCALES = (1e-3, 1.0, 1e3)
STRENGTHS = (1.0, 3.0, 10.0)  # of the ablation
L2_STARTED = "L2 from equilibrium"
AS_IS = "AWS from the norms as they are"
CENTRED = "L2, tuned in the centre"
TUNED = "L2, tuned in the cell"
OUTCOMES = ("equivalent", "better", "worse", "undecided")
TEXT = "language model, AdamW"
MUON = "language model, Muon"


class Cell(NamedTuple):
    """A learning rate, as a factor of the usual one, and an initial norm."""

    factor: float
    scale: float

    def __str__(self) -> str:
        return f"lr × {self.factor:g}, norm {self.scale:g}"


CENTRE = Cell(1.0, 1.0)


class Score(NamedTuple):
    """How runs of a kind are compared: larger scores are better.

    Attributes:
        key: What is measured, after "test_" and "validation_".
        factor: What it is multiplied by.
        margin: Differences within it count as equivalent.
        floor: A cell fails where the whole interval of its difference lies below minus this number.
        unit: The unit of a score.
    """

    key: str
    factor: float
    margin: float
    floor: float
    unit: str


POINTS = Score("accuracy", 100.0, 0.5, 1.0, "points")
CENTINATS = Score("loss", -100.0, 1.0, 2.0, "0.01 nats")


@dataclass(frozen=True)
class _Arm:
    """An arm in a cell.

    Attributes:
        settings: By multiple of the coefficient: those that may be chosen; of an arm with nothing to tune
            there is one, under 0.
        choice: What the tuning seeds choose.
    """

    settings: dict[float, OptimizerRun]
    choice: Choice[float] | None = None

    @property
    def best(self) -> OptimizerRun:
        return self.settings[0.0 if self.choice is None else self.choice.best]


@dataclass(frozen=True)
class Setup:
    """A network and its optimizer.

    Attributes:
        changes: What differs from the budget's small training run, or from its run of the language model.
        score: How its runs are compared.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    score: Score = POINTS

    def run(self, budget: Budget, cell: Cell) -> OptimizerRun:
        """Return the run of a cell, without decay."""
        if self.score is CENTINATS:
            text = replace(budget.text, decayed="invariant", **self.changes)
            text = replace(text, lr=text.lr * cell.factor)
            return text if cell.scale == 1 else replace(text, scaled="stream", init_scale=cell.scale)
        base = replace(budget.small, **self.changes)
        return scaled(replace(base, lr=base.lr * cell.factor), cell.scale)


SETUPS = {
    "weight norm, SGD": Setup(),
    "weight norm, Adam": Setup({"optimizer": "adam", "measure": "rms", "lr": 0.003}),
    "weight standardisation without batch norm, SGD": Setup(
        # gains, biases and head are not normalised, and diverge at 0.1 from the usual norms too
        {"member": "weight_standardization", "batch_norm": False, "lr": 0.02}
    ),
    "batch norm only, SGD": Setup({"member": "plain"}),
    "residual network, SGD": Setup({"network": "residual"}),
    "perceptron, SGD": Setup({"network": "mlp"}),
    TEXT: Setup(score=CENTINATS),
    MUON: Setup({"optimizer": "muon"}, CENTINATS),
}
QUICK = ("weight norm, SGD", "weight norm, Adam")


class NoTuning(Claim):
    """The class attributes are the pre-registration."""

    id = "no-tuning"
    order = 13
    title = "AWS with nothing tuned"
    source = (
        "Not in the paper: the start in equilibrium of normwise.attach, which follows from the theory of AWS "
        "(normwise's docs/theory.md and docs/planning.md)."
    )
    question = (
        "A scale-invariant weight can start at any norm. Does AWS with nothing tuned, started at the norm "
        "where it is in balance with the optimizer's steps, do better than L2 with a coefficient that was "
        "tuned anew for each learning rate and initial scale?"
    )
    arms = (
        "In each cell of learning rate (1/4, 1 and 4 times 0.1 under SGD, 0.02 without batch norm, 0.003 "
        "under Adam, 0.01 for the language model) × initial norm of the units (0.001, 1, 1000; the "
        "language model: times its residual stream): AWS from equilibrium (normwise.attach, strength 3); "
        "the best of seven L2 coefficients (quick: four; 1/32 to 32 times the matched one), chosen in that "
        "cell by the mean over three other seeds on validation data, ties to the middle of the grid, for "
        "the language model on all matrices, as is usual; the L2 that was chosen in the central cell; "
        "full: AWS with for_budget from the norms as they are, and L2 from equilibrium. Quick budget: "
        "weight norm, the three norms under SGD and Adam, and under SGD the two other rates at norm 1. "
        "Full: also weight standardisation with a gain and without batch norm, batch norm only, a residual "
        "network, a perceptron, all nine cells; and a GPT under AdamW, and with its matrices under Muon, the "
        "three scales and at scale 1 the two other rates. Half of the images, a cosine. "
        "Ablation (full): strengths 1 and 10 for weight norm under SGD. Pilots with seeds 0 to 2 settled "
        "the rate without batch norm."
    )
    statistic = (
        "Test accuracy in points (the language model: minus test loss, in 0.01 nats) of AWS from equilibrium "
        "minus that of the L2 tuned in the cell, paired by seed (6 seeds), with a 95 % interval that "
        "carries the choice of L2 (the tuning seeds are resampled), and for which the cells of a network "
        "share their standard deviation between seeds. A "
        f"cell is equivalent where two one-sided tests show ±{POINTS.margin:g} points (±{CENTINATS.margin:g} "
        "of 0.01 nats), better or worse where the interval lies on one side of 0, else undecided. The same "
        "for the mean over all cells of the image networks, and of the language models; the median of the "
        "cells stands beside it. A run that does not finish scores what guessing scores."
    )
    rule = (
        "Reproduced: the means over the cells, of images and of text, have intervals above 0, and every "
        f"cell's interval lies above −{POINTS.floor:g} point (−{CENTINATS.floor:g} of 0.01 nats). Partly: "
        f"that of the mean over the cells of images lies above −{POINTS.margin:g} points. Not reproduced: "
        "otherwise. Undecided: where an interval contains its threshold and that matters."
    )

    def runs(self) -> list[Run]:
        """All arms but those of the tuned L2, and L2 with all coefficients and the tuning seeds."""
        wanted: list[Run] = []
        for setup in self._setups:
            for cell in self._cells_of(setup):
                arms = self._untuned(setup, cell)
                wanted += over_seeds(arms.values(), self._seeds)
                wanted += over_seeds(self._candidates(setup, cell).values(), self.budget.tuning_seeds)
        for by_strength in self._ablation().values():
            wanted += over_seeds(by_strength.values(), self._seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The L2 that was chosen in each cell, and in the centre."""
        wanted: list[Run] = []
        for setup in self._setups:
            for arms in self._arms(runs, setup).values():
                for arm in (TUNED, CENTRED):
                    wanted += over_seeds(arms[arm].settings.values(), self._seeds)
        return wanted

    def second_cost(self) -> float:
        """In each cell the L2 that was tuned there, and in the centre, with one or two settings."""
        return sum(
            2.5 * len(self._seeds) * setup.run(self.budget, cell).cost
            for name in self._setups
            for setup in (SETUPS[name],)
            for cell in self._cells_of(name)
        )

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare the arms with the tuned L2 in each cell, and on average."""
        measured = Measured({})
        gains: dict[str, dict[str, list[TunedValues]]] = {}  # by kind of score, arm and cell
        for setup in self._setups:
            score = SETUPS[setup].score
            measured.statistics[setup], measured.details[setup] = {}, {}
            values = {
                cell: {arm: self._tuned_scores(runs, one, score) for arm, one in arms.items()}
                for cell, arms in self._arms(runs, setup).items()
            }
            pooled = {
                arm: pooled_deviation([of[arm].minus(of[TUNED]).chosen for of in values.values()])
                for arm in values[CENTRE]
            }
            for cell, arms in self._arms(runs, setup).items():
                found: dict[str, Any] = {}
                for arm in values[cell]:
                    if arm != TUNED:
                        difference = values[cell][arm].minus(values[cell][TUNED])
                        found[f"{arm} minus {TUNED}"] = mean_of_tuned(difference, pooled=pooled[arm])
                        gains.setdefault(score.unit, {}).setdefault(arm, []).append(difference)
                gain = found[f"{STARTED} minus {TUNED}"]
                difference = values[cell][STARTED].minus(values[cell][TUNED])
                test = within(mean_of_tuned(difference, 0.9, pooled[STARTED]), score.margin)
                side = "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided"
                found["outcome"] = "equivalent" if test.shown else side
                found["unfinished"] = {
                    arm: runs.unfinished_count(one.best, self._seeds) for arm, one in arms.items()
                }
                found["multiples_that_resamples_choose"] = list(arms[TUNED].settings)
                found["above_the_floor"] = above(gain, -score.floor)
                measured.statistics[setup][str(cell)] = found
                measured.details[setup][cell] = values[cell]
        every = [found for cells in measured.statistics.values() for found in cells.values()]
        counts = Counter(found["outcome"] for found in every)
        measured.statistics["overall"] = {
            "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
            "cells_below_the_floor": sum(found["above_the_floor"] is False for found in every),
            "cells_perhaps_below": sum(found["above_the_floor"] is None for found in every),
            "cells": len(every),
            **{
                unit: {arm: mean_of_tuned(mean_over_cells(cells)) for arm, cells in arms.items()}
                for unit, arms in gains.items()
            },
            **{
                f"{unit}, median over the cells": {
                    arm: median([float(np.mean(cell.chosen)) for cell in cells])
                    for arm, cells in arms.items()
                }
                for unit, arms in gains.items()
            },
        }
        if ablation := self._ablation():
            measured.statistics["ablation of the strength"] = {
                str(cell): {
                    f"S = {strength:g}": mean_with_interval(self._scores(runs, run, POINTS))
                    for strength, run in by_strength.items()
                }
                for cell, by_strength in ablation.items()
            }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is better on average, and nowhere much worse; or at least as good on average."""
        overall = measured.statistics["overall"]
        means = [overall[score.unit][STARTED] for score in (POINTS, CENTINATS) if score.unit in overall]
        every = [
            found["above_the_floor"]
            for setup in self._setups
            for found in measured.statistics[setup].values()
        ]
        return verdict_of(all_of([*map(above, means), *every]), above(means[0], -POINTS.margin))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {
            f"{setup} / {cell} / {STARTED} minus {TUNED}": (-SETUPS[setup].score.floor,)
            for setup in self._setups
            for cell in measured.statistics[setup]
        }
        for unit in (POINTS.unit, CENTINATS.unit):
            found[f"overall / {unit} / {STARTED}"] = (0.0, -POINTS.margin)
        return found

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        return f"{measured.statistics['overall'][POINTS.unit][STARTED]:+.2f} points from a tuned L2"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences in all cells."""
        tables, plots, maps, notes = [], [], [], []
        for setup, by_cell in measured.details.items():
            score = SETUPS[setup].score
            arms = [arm for arm in next(iter(by_cell.values())) if arm != TUNED]
            columns = ["learning rate ×", "norm", TUNED, *(f"{arm} −" for arm in arms), "outcome"]
            columns += ["did not finish"]
            rows: list[list[str]] = []
            means: dict[str, dict[Cell, float | None]] = {arm: {} for arm in arms}
            for cell, values in by_cell.items():
                found = measured.statistics[setup][str(cell)]
                differences = {arm: found[f"{arm} minus {TUNED}"] for arm in arms}
                for arm, difference in differences.items():
                    means[arm][cell] = _rounded(difference)
                for arm, number in found["unfinished"].items():
                    if number:
                        notes.append(f"{setup}, {cell}: {number} runs of {arm} did not finish.")
                rows.append(
                    [f"{cell.factor:g}", f"{cell.scale:g}", f"{mean_of_tuned(values[TUNED]):.1f}"]
                    + [f"{difference:+.2f}" for difference in differences.values()]
                    + [found["outcome"], str(sum(found["unfinished"].values()))]
                )
            what = "Test accuracy (%)" if score is POINTS else "Minus test loss (0.01 nats)"
            title = f"{what}, and the other arms minus the {TUNED}: {setup}"
            tables.append(Table(title, columns, rows))
            plots.append(_plot(setup, score, measured.statistics[setup]))
            if self.budget.full and len(by_cell) == len(self._cells):
                for arm in (STARTED, CENTRED, AS_IS):
                    maps.append(_map(f"{arm}, minus the L2 tuned in the cell: {setup}", score, means[arm]))
        if ablation := measured.statistics.get("ablation of the strength"):
            header = ["cell", *next(iter(ablation.values()))]
            rows = [[cell, *map(str, by.values())] for cell, by in ablation.items()]
            tables.append(Table("Test accuracy (%) by strength: weight norm, SGD", header, rows))
        return Exhibits(_answer(measured.statistics["overall"]), plots, tables, notes, maps=maps)

    @property
    def _seeds(self) -> Sequence[int]:
        return self.budget.at_least(6)

    @property
    def _setups(self) -> Sequence[str]:
        return list(SETUPS) if self.budget.full else QUICK

    @property
    def _cells(self) -> list[Cell]:
        return [Cell(factor, scale) for factor in FACTORS for scale in SCALES]

    def _cells_of(self, setup: str) -> list[Cell]:
        """All nine, or the three norms and with some networks the three rates."""
        if self.budget.full and SETUPS[setup].score is POINTS:
            return self._cells
        rates = self.budget.full or setup == QUICK[0]
        return [cell for cell in self._cells if cell.factor == 1 or (rates and cell.scale == 1)]

    def _untuned(self, setup: str, cell: Cell) -> dict[str, OptimizerRun]:
        run = SETUPS[setup].run(self.budget, cell)
        more = {AS_IS: _as_is(run, AWS), L2_STARTED: from_equilibrium(run, nw.L2)}
        return {STARTED: from_equilibrium(run)} | (more if self.budget.full else {})

    def _candidates(self, setup: str, cell: Cell) -> dict[float, OptimizerRun]:
        run = _as_is(SETUPS[setup].run(self.budget, cell), L2)
        return {multiple: times(run, multiple) for multiple in MULTIPLES[:: 1 if self.budget.full else 2]}

    def _arms(self, runs: FinishedRuns, setup: str) -> dict[Cell, dict[str, _Arm]]:
        """Return all arms by cell."""
        key = f"validation_{SETUPS[setup].score.key}"
        tuned = {}
        for cell in self._cells_of(setup):
            candidates = self._candidates(setup, cell)
            choice = runs.choice(candidates, self.budget.tuning_seeds, key)
            tuned[cell] = _Arm({multiple: candidates[multiple] for multiple in choice.needed}, choice)
        centre = tuned[CENTRE]
        found: dict[Cell, dict[str, _Arm]] = {}
        for cell, arm in tuned.items():
            rules = {multiple: rule_from(run.rule) for multiple, run in centre.settings.items()}
            centred = {multiple: arm.best.with_rule(rule) for multiple, rule in rules.items()}
            found[cell] = {name: _Arm({0.0: run}) for name, run in self._untuned(setup, cell).items()}
            found[cell] |= {TUNED: arm, CENTRED: _Arm(centred, centre.choice)}
        return found

    def _ablation(self) -> dict[Cell, dict[float, OptimizerRun]]:
        if not self.budget.full:
            return {}
        setup = SETUPS["weight norm, SGD"]
        return {
            cell: {s: from_equilibrium(setup.run(self.budget, cell), strength=s) for s in STRENGTHS}
            for cell in self._cells
        }

    def _tuned_scores(self, runs: FinishedRuns, arm: _Arm, score: Score) -> TunedValues:
        by_multiple = {multiple: self._scores(runs, run, score) for multiple, run in arm.settings.items()}
        if arm.choice is None:
            return TunedValues(tuple(by_multiple[0.0]))
        return arm.choice.values(by_multiple)

    def _scores(self, runs: FinishedRuns, run: OptimizerRun, score: Score) -> list[float]:
        return runs.scores(run, self._seeds, f"test_{score.key}", score.factor)


def _as_is(run: OptimizerRun, arm: str) -> OptimizerRun:
    """Return the run under AWS with for_budget, or under the L2 with the same pull."""
    if isinstance(run, TrainRun):
        return with_arm(run, arm)
    assert isinstance(run, TextRun)
    aws = nw.AdaptiveWeightShrink.for_budget(run.total_time, norm=run.total_squares**0.5)
    if arm == AWS:
        return run.with_rule(aws)
    return replace(run, decayed="matrices").with_rule(nw.L2(3.0 / run.total_time))


def _rounded(estimate: Estimate) -> float | None:
    return round(estimate.mean, 2) if estimate.n else None


def _plot(setup: str, score: Score, found: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Show AWS from equilibrium, and the L2 tuned in the centre, against the L2 tuned in each cell."""
    series = [
        replace(
            dot_plot("", "", {cell: of[f"{arm} minus {TUNED}"] for cell, of in found.items()}).series[0],
            label=arm,
        )
        for arm in (STARTED, CENTRED)
    ]
    title = f"Compared with the L2 tuned in the cell: {setup}"
    return Plot(title, "", f"difference ({score.unit})", series, categories=list(found), reference=0.0)


def _map(title: str, score: Score, values: dict[Cell, float | None]) -> HeatMap:
    return HeatMap(
        title,
        "factor of the learning rate",
        "norm at the start",
        [f"{factor:g}" for factor in FACTORS],
        [f"{scale:g}" for scale in SCALES],
        [[values[Cell(factor, scale)] for factor in FACTORS] for scale in SCALES],
        score.unit,
    )


def _answer(overall: dict[str, Any]) -> str:
    counts, points = overall["counts"], overall[POINTS.unit]
    middle = overall[f"{POINTS.unit}, median over the cells"]
    text = ""
    if CENTINATS.unit in overall:
        nats = overall[CENTINATS.unit]
        text = f" On text it is {nats[STARTED]:+.1f} hundredths of a nat from it."
    others = [
        f"{words} is {points[arm]:+.2f} points from it (median {middle[arm]:+.1f})"
        for arm, words in (
            (CENTRED, "an L2 that was tuned in the centre only"),
            (AS_IS, "AWS from the norms as they are"),
        )
        if arm in points
    ]
    return (
        f"In {overall['cells']} cells, AWS with nothing tuned, started in equilibrium, is better than the "
        f"best of the tuned L2 in {counts['better']}, equivalent in {counts['equivalent']}, worse in "
        f"{counts['worse']} and undecided in {counts['undecided']}; on average over the image networks it is "
        f"{points[STARTED]:+.2f} points from it (median over the cells {middle[STARTED]:+.1f}).{text} Beside "
        f"it, {' and '.join(others)}."
    )


CLAIM = NoTuning
