"""Claim: AWS with nothing tuned does what a tuned L2 does, over learning rates and initial scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, HeatMap, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.coefficient import times
from normwise.lab.claims.statistics import Equivalence, equivalence, mean_with_interval, paired_difference
from normwise.lab.claims.tuning import chosen
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, scaled, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.train import TrainRun

MULTIPLES = tuple(10 ** (k / 2) for k in range(-3, 4))  # of the matched coefficient: seven
FACTORS = (0.25, 1.0, 4.0)
SCALES = (1e-3, 1.0, 1e3)
CENTRE = (1.0, 1.0)
MARGIN = 0.5  # points
SHARE = 0.75
CENTRED = "L2, tuned in the centre"
TUNED = "L2, tuned in the cell"

COLUMNS = (
    "learning rate ×",
    "norm",
    "AWS, nothing tuned",
    TUNED,
    "AWS − tuned L2 (points)",
    "outcome",
    "centred − tuned L2 (points)",
)

Cell = tuple[float, float]  # factor of the learning rate, initial norm


class Setup(NamedTuple):
    """A network with its optimizer."""

    name: str
    changes: dict[str, Any]


SETUPS = {
    "quick": (
        Setup("weight norm, SGD", {}),
        Setup("weight norm, Adam", {"optimizer": "adam", "measure": "rms", "lr": 0.003}),
    ),
    "full": (
        Setup("weight norm, SGD", {}),
        Setup("weight norm, Adam", {"optimizer": "adam", "measure": "rms", "lr": 0.003}),
        Setup(
            "weight standardisation without batch norm, SGD",
            {"member": "weight_standardization", "batch_norm": False},
        ),
    ),
}


class NoTuning(Claim):
    """See the texts."""

    id = "no-tuning"
    order = 13
    title = "AWS with nothing tuned"
    source = (
        "Not in the paper: AdaptiveWeightShrink.for_budget, which follows from the theory of AWS "
        "(normwise's docs/theory.md and docs/decay.md)."
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

    def runs(self, budget: Budget) -> list[Run]:
        """AWS, and L2 with all coefficients and the seeds of tuning."""
        runs: list[Run] = []
        for setup in SETUPS[budget.name]:
            for cell in _cells(budget):
                aws = self._run(budget, setup, cell, AWS)
                runs += [replace(aws, seed=seed) for seed in _seeds(budget)]
                runs += [
                    replace(run, seed=seed)
                    for run in self._candidates(budget, setup, cell).values()
                    for seed in budget.tuning_seeds
                ]
        return runs

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """The L2 that was chosen in each cell, and in the centre."""
        return [
            replace(arms[arm], seed=seed)
            for setup in SETUPS[budget.name]
            for arms in self._arms(budget, runs, setup).values()
            for arm, seeds in ((TUNED, _seeds(budget)), (CENTRED, budget.seeds))
            for seed in seeds
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Count the cells."""
        statistics: dict[str, Any] = {}
        tables, plots, maps, notes = [], [], [], []
        counts = dict.fromkeys(("equivalent", "better", "worse", "undecided"), 0)
        columns: list[list[float | None]] = []  # AWS minus tuned L2, a column for each cell
        centred: list[list[float | None]] = []
        for setup in SETUPS[budget.name]:
            rows: list[list[str]] = []
            found: dict[str, Any] = {}
            means: dict[Cell, float | None] = {}
            losses: dict[Cell, float | None] = {}
            for cell, arms in self._arms(budget, runs, setup).items():
                accuracy = {
                    arm: runs.points("test_accuracy", run, _seeds(budget))
                    for arm, run in arms.items()
                    if arm != CENTRED
                }
                few = {arm: runs.points("test_accuracy", arms[arm], budget.seeds) for arm in (TUNED, CENTRED)}
                test = equivalence(accuracy[AWS], accuracy[TUNED], MARGIN)
                gain = paired_difference(accuracy[AWS], accuracy[TUNED])
                lost = paired_difference(few[CENTRED], few[TUNED])
                outcome = _outcome(test, gain.low, gain.high)
                counts[outcome] += 1
                columns.append(_minus(accuracy[AWS], accuracy[TUNED]))
                centred.append(_minus(few[CENTRED], few[TUNED]))
                means[cell], losses[cell] = _rounded(gain.mean), _rounded(lost.mean)
                name = f"lr × {cell[0]:g}, norm {cell[1]:g}"
                if not gain.n:
                    notes.append(f"{setup.name}, {name}: undecided, as no seed finished under both rules.")
                found[name] = {
                    "AWS_minus_tuned_L2": gain.as_dict(),
                    "test": test.as_dict(),
                    "outcome": outcome,
                    "centred_minus_tuned_L2": lost.as_dict(),
                }
                rows.append(
                    [f"{cell[0]:g}", f"{cell[1]:g}"]
                    + [mean_with_interval(accuracy[arm]).short for arm in (AWS, TUNED)]
                    + [str(gain), outcome, str(lost)]
                )
            statistics[setup.name] = found
            tables.append(
                Table(
                    f"Test accuracy (%) by cell: {setup.name}",
                    COLUMNS,
                    rows,
                )
            )
            plots.append(_plot(setup, means, losses))
            if budget.full:
                maps.append(
                    _map(f"AWS with nothing tuned, minus the L2 tuned in the cell: {setup.name}", means)
                )
                maps.append(
                    _map(f"L2 tuned in the centre, minus the L2 tuned in the cell: {setup.name}", losses)
                )
        overall = equivalence(_average(columns), [0.0] * len(_seeds(budget)), MARGIN)
        overall_gain = mean_with_interval(_average(columns))
        loss = mean_with_interval(_average(centred))
        statistics["overall"] = {
            "counts": counts,
            "AWS_minus_tuned_L2": overall_gain.as_dict(),
            "test": overall.as_dict(),
            "centred_minus_tuned_L2": loss.as_dict(),
        }
        total = sum(counts.values())
        verdict: Verdict = "not reproduced"
        if counts["equivalent"] + counts["better"] >= SHARE * total:
            verdict = "reproduced"
        elif overall.shown or overall_gain.low > 0:
            verdict = "partly"
        answer = (
            f"In {total} cells, AWS with nothing tuned is equivalent to the best of seven L2 within "
            f"{MARGIN:g} points in {counts['equivalent']}, better in {counts['better']}, worse in "
            f"{counts['worse']}, undecided in {counts['undecided']}; on average over all cells it is "
            f"{overall_gain.mean:+.2f} [{overall_gain.low:+.2f}, {overall_gain.high:+.2f}] points from it. "
            f"An L2 that was tuned in the centre only is {loss.mean:+.1f} [{loss.low:+.1f}, "
            f"{loss.high:+.1f}] points from it."
        )
        return Finding(verdict, answer, statistics, plots, tables, notes, maps=maps)

    def _run(self, budget: Budget, setup: Setup, cell: Cell, arm: str) -> TrainRun:
        base = replace(budget.small, **setup.changes)
        factor, scale = cell
        return scaled(with_arm(replace(base, lr=base.lr * factor), arm), scale)

    def _candidates(self, budget: Budget, setup: Setup, cell: Cell) -> dict[float, TrainRun]:
        run = self._run(budget, setup, cell, L2)
        return {m: times(run, m) for m in MULTIPLES}

    def _arms(self, budget: Budget, runs: Runs, setup: Setup) -> dict[Cell, dict[str, TrainRun]]:
        """Return AWS and the two L2 by cell."""
        tuned = {}
        for cell in _cells(budget):
            candidates = self._candidates(budget, setup, cell)
            tuned[cell] = candidates[chosen(runs, candidates, budget.tuning_seeds)]
        rule = rule_from(tuned[CENTRE].rule)
        assert isinstance(rule, nw.L2)
        return {
            cell: {
                AWS: self._run(budget, setup, cell, AWS),
                TUNED: tuned[cell],
                CENTRED: tuned[cell].with_rule(rule),
            }
            for cell in tuned
        }


def _cells(budget: Budget) -> list[Cell]:
    cells = [(factor, scale) for factor in FACTORS for scale in SCALES]
    return cells if budget.full else [cell for cell in cells if 1.0 in cell]


def _seeds(budget: Budget) -> tuple[int, ...]:
    return budget.many_seeds[: max(8, len(budget.seeds))] if budget.full else budget.seeds


def _outcome(test: Equivalence, low: float, high: float) -> str:
    if test.shown:
        return "equivalent"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def _minus(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


def _average(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean over the cells of each seed."""
    return [mean_with_interval(values).mean for values in zip(*columns, strict=True)]


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 2)


def _plot(setup: Setup, means: dict[Cell, float | None], losses: dict[Cell, float | None]) -> Plot:
    series = [
        Series(
            f"{label}, learning rate × {factor:g}",
            [scale for f, scale in values if f == factor],
            [value for (f, _), value in values.items() if f == factor],
            dashed=dashed,
            color=k,
        )
        for label, values, dashed in (("AWS", means, False), (CENTRED, losses, True))
        for k, factor in enumerate(FACTORS)
    ]
    title = f"Test accuracy against that of the L2 tuned in the cell: {setup.name}"
    return Plot(title, "norm of every unit at the start", "difference (points)", series, log_x=True)


def _map(title: str, values: dict[Cell, float | None]) -> HeatMap:
    return HeatMap(
        title,
        "factor of the learning rate",
        "norm at the start",
        [f"{factor:g}" for factor in FACTORS],
        [f"{scale:g}" for scale in SCALES],
        [[values[factor, scale] for factor in FACTORS] for scale in SCALES],
        "points",
    )


CLAIM = NoTuning()
