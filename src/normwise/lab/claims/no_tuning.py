"""Claim: AWS with nothing tuned does what a tuned L2 does, over learning rates and initial scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from normwise.lab.claims.claim import Claim, Exhibits, Measured, Verdict, verdict_of
from normwise.lab.claims.exhibits import HeatMap, Plot, Series, Table
from normwise.lab.claims.finished_runs import FinishedRuns, Values, over_seeds
from normwise.lab.claims.statistics import Estimate, equivalence, mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, scaled, times, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.train import TrainRun

MULTIPLES = tuple(10 ** (k / 2) for k in range(-3, 4))  # of the matched coefficient: seven
FACTORS = (0.25, 1.0, 4.0)
SCALES = (1e-3, 1.0, 1e3)
MARGIN = 0.5  # points
SHARE = 0.75
CENTRED = "L2, tuned in the centre"
TUNED = "L2, tuned in the cell"
OUTCOMES = ("equivalent", "better", "worse", "undecided")


class Cell(NamedTuple):
    """A learning rate, as a factor of the usual one, and an initial norm."""

    factor: float
    scale: float

    def __str__(self) -> str:
        return f"lr × {self.factor:g}, norm {self.scale:g}"


CENTRE = Cell(1.0, 1.0)

SETUPS: dict[str, dict[str, Any]] = {  # what a network and its optimizer differ in from the budget's
    "weight norm, SGD": {},
    "weight norm, Adam": {"optimizer": "adam", "measure": "rms", "lr": 0.003},
    "weight standardisation without batch norm, SGD": {
        "member": "weight_standardization",
        "batch_norm": False,
    },
}


class NoTuning(Claim):
    """The class attributes are the pre-registration."""

    id = "no-tuning"
    order = 13
    title = "AWS with nothing tuned"
    source = (
        "Not in the paper: AdaptiveWeightShrink.for_budget, which follows from the theory of AWS (normwise's "
        "docs/theory.md and docs/decay.md)."
    )
    question = (
        "Is AWS with the coefficient that follows from the schedule alone as good as L2 with a coefficient "
        "that was tuned anew for each learning rate and initial scale? And what does an L2 that was tuned "
        "once lose?"
    )
    arms = (
        "In each cell of learning rate (1/4, 1 and 4 times 0.1 under SGD, 0.003 under Adam) × initial norm "
        "of the units (0.001, 1, 1000): AWS with for_budget (strength 3; under Adam on the RMS, with √Σlr²); "
        "the best of seven L2 coefficients (1/32 to 32 times the matched one), chosen in that cell on "
        "validation images by other seeds; and the L2 that was chosen in the central cell. Quick budget: "
        "weight norm, the centre and the four cells beside it. Full: also weight standardisation without "
        "batch norm, all nine. Half of the images, a cosine."
    )
    statistic = (
        "Test accuracy of AWS minus that of the L2 tuned in the cell, paired by seed (quick 3, full 8): "
        f"equivalent where two one-sided tests show it to lie within ±{MARGIN:g} points; better or worse "
        "where a 95 % interval lies on one side of 0; else undecided. The same for the mean over all cells."
    )
    rule = (
        f"Reproduced: in at least {100 * SHARE:.0f} % of the cells AWS is equivalent or better. Partly: the "
        "mean over all cells is equivalent or better. Not reproduced: otherwise. (Three seeds can hardly "
        "show an equivalence in one cell: the quick budget may say partly where the full says reproduced.)"
    )

    def runs(self) -> list[Run]:
        """AWS, and L2 with all coefficients and the tuning seeds."""
        wanted: list[Run] = []
        for setup in self._setups:
            for cell in self._cells:
                wanted += over_seeds([self._settings(setup, cell, AWS)], self._seeds)
                wanted += over_seeds(self._candidates(setup, cell).values(), self.budget.tuning_seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The L2 that was chosen in each cell, and in the centre."""
        wanted: list[Run] = []
        for setup in self._setups:
            for arms in self._arms(runs, setup).values():
                wanted += over_seeds([arms[TUNED]], self._seeds)
                wanted += over_seeds([arms[CENTRED]], self.budget.seeds)
        return wanted

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare AWS and the centred L2 with the tuned L2 in each cell, and on average."""
        measured = Measured({})
        gains: list[Values] = []  # of AWS over the tuned L2, for each cell
        losses: list[Values] = []  # of the L2 tuned in the centre
        for setup in self._setups:
            measured.statistics[setup], measured.details[setup] = {}, {}
            for cell, arms in self._arms(runs, setup).items():
                accuracy = runs.accuracy({arm: arms[arm] for arm in (AWS, TUNED)}, self._seeds)
                few = runs.accuracy({arm: arms[arm] for arm in (TUNED, CENTRED)}, self.budget.seeds)
                test = equivalence(accuracy[AWS], accuracy[TUNED], MARGIN)
                gain = paired_difference(accuracy[AWS], accuracy[TUNED])
                undecided = "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided"
                measured.statistics[setup][str(cell)] = {
                    "AWS_minus_tuned_L2": gain,
                    "test": test,
                    "outcome": "equivalent" if test.shown else undecided,
                    "centred_minus_tuned_L2": paired_difference(few[CENTRED], few[TUNED]),
                }
                measured.details[setup][cell] = accuracy
                gains.append(_minus(accuracy[AWS], accuracy[TUNED]))
                losses.append(_minus(few[CENTRED], few[TUNED]))
        counts = Counter(
            found["outcome"] for cells in measured.statistics.values() for found in cells.values()
        )
        measured.statistics["overall"] = {
            "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
            "AWS_minus_tuned_L2": mean_with_interval(_mean_over_cells(gains)),
            "test": equivalence(_mean_over_cells(gains), [0.0] * len(self._seeds), MARGIN),
            "centred_minus_tuned_L2": mean_with_interval(_mean_over_cells(losses)),
        }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is equivalent or better in most cells, or at least on average."""
        overall = measured.statistics["overall"]
        counts = overall["counts"]
        return verdict_of(
            counts["equivalent"] + counts["better"] >= SHARE * sum(counts.values()),
            overall["test"].shown or overall["AWS_minus_tuned_L2"].low > 0,
        )

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences in all cells."""
        tables, plots, maps, notes = [], [], [], []
        columns = ["learning rate ×", "norm", "AWS, nothing tuned", TUNED, "AWS − tuned L2 (points)"]
        columns += ["outcome", "centred − tuned L2 (points)"]
        for setup, by_cell in measured.details.items():
            rows: list[list[str]] = []
            means: dict[Cell, float | None] = {}
            losses: dict[Cell, float | None] = {}
            for cell, accuracy in by_cell.items():
                found = measured.statistics[setup][str(cell)]
                gain, lost = found["AWS_minus_tuned_L2"], found["centred_minus_tuned_L2"]
                means[cell], losses[cell] = _rounded(gain), _rounded(lost)
                if not gain.n:
                    notes.append(f"{setup}, {cell}: undecided, as no seed finished under both rules.")
                rows.append(
                    [f"{cell.factor:g}", f"{cell.scale:g}"]
                    + [mean_with_interval(accuracy[arm]).short for arm in (AWS, TUNED)]
                    + [str(gain), found["outcome"], str(lost)]
                )
            tables.append(Table(f"Test accuracy (%) by cell: {setup}", columns, rows))
            plots.append(_plot(setup, means, losses))
            if self.budget.full:
                centred = "L2 tuned in the centre"
                for arm, values in (("AWS with nothing tuned", means), (centred, losses)):
                    maps.append(_map(f"{arm}, minus the L2 tuned in the cell: {setup}", values))
        return Exhibits(_answer(measured.statistics["overall"]), plots, tables, notes, maps=maps)

    @property
    def _setups(self) -> list[str]:
        return list(SETUPS) if self.budget.full else list(SETUPS)[:2]

    @property
    def _cells(self) -> list[Cell]:
        cells = [Cell(factor, scale) for factor in FACTORS for scale in SCALES]
        return cells if self.budget.full else [cell for cell in cells if 1.0 in cell]

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.budget.at_least(8) if self.budget.full else self.budget.seeds

    def _settings(self, setup: str, cell: Cell, arm: str) -> TrainRun:
        base = replace(self.budget.small, **SETUPS[setup])
        return scaled(with_arm(replace(base, lr=base.lr * cell.factor), arm), cell.scale)

    def _candidates(self, setup: str, cell: Cell) -> dict[float, TrainRun]:
        run = self._settings(setup, cell, L2)
        return {multiple: times(run, multiple) for multiple in MULTIPLES}

    def _arms(self, runs: FinishedRuns, setup: str) -> dict[Cell, dict[str, TrainRun]]:
        """Return AWS and the two L2 by cell."""
        tuned = {}
        for cell in self._cells:
            candidates = self._candidates(setup, cell)
            tuned[cell] = candidates[runs.best(candidates, self.budget.tuning_seeds)]
        rule = rule_from(tuned[CENTRE].rule)
        return {
            cell: {AWS: self._settings(setup, cell, AWS), TUNED: run, CENTRED: run.with_rule(rule)}
            for cell, run in tuned.items()
        }


def _minus(first: Values, second: Values) -> Values:
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


def _mean_over_cells(cells: Sequence[Values]) -> Values:
    """Return the mean over the cells for each seed."""
    return [mean_with_interval(values).mean for values in zip(*cells, strict=True)]


def _rounded(estimate: Estimate) -> float | None:
    return round(estimate.mean, 2) if estimate.n else None


def _plot(setup: str, means: dict[Cell, float | None], losses: dict[Cell, float | None]) -> Plot:
    series = [
        Series(
            f"{label}, learning rate × {factor:g}",
            [cell.scale for cell in values if cell.factor == factor],
            [value for cell, value in values.items() if cell.factor == factor],
            dashed=dashed,
            color=k,
        )
        for label, values, dashed in (("AWS", means, False), (CENTRED, losses, True))
        for k, factor in enumerate(FACTORS)
    ]
    title = f"Test accuracy against that of the L2 tuned in the cell: {setup}"
    return Plot(title, "norm of every unit at the start", "difference (points)", series, log_x=True)


def _map(title: str, values: dict[Cell, float | None]) -> HeatMap:
    return HeatMap(
        title,
        "factor of the learning rate",
        "norm at the start",
        [f"{factor:g}" for factor in FACTORS],
        [f"{scale:g}" for scale in SCALES],
        [[values[Cell(factor, scale)] for factor in FACTORS] for scale in SCALES],
        "points",
    )


def _answer(overall: dict[str, Any]) -> str:
    counts, gain, loss = (overall[key] for key in ("counts", "AWS_minus_tuned_L2", "centred_minus_tuned_L2"))
    return (
        f"In {sum(counts.values())} cells, AWS with nothing tuned is equivalent to the best of seven L2 "
        f"within {MARGIN:g} points in {counts['equivalent']}, better in {counts['better']}, worse in "
        f"{counts['worse']}, undecided in {counts['undecided']}; on average over all cells it is "
        f"{gain:+.2f} points from it. An L2 that was tuned in the centre only is {loss:+.1f} points from it."
    )


CLAIM = NoTuning
