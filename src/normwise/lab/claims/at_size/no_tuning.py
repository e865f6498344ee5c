"""Claim, on ResNet-20: AWS with nothing tuned, started in equilibrium, beats a tuned L2 at any rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from normwise.lab.claims.claim import Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_of, verdict_of
from normwise.lab.claims.exhibits import Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.networks import matched
from normwise.lab.claims.no_tuning import OUTCOMES, POINTS, TUNED, NoTuning
from normwise.lab.claims.statistics import within
from normwise.lab.claims.tuning import TunedValues, mean_of_tuned, mean_over_cells
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import L2, NONE, STARTED
from normwise.lab.runs.network import NetworkRun

__all__ = ["CLAIM"]

MULTIPLES = (0.1, 1.0, 10.0)
FACTORS = (0.25, 1.0, 4.0)
WHOLE = "all images, lr × 1"


@dataclass(frozen=True)
class _Cell:
    """A network: the run without a rule, and the one on which its L2 is tuned."""

    run: NetworkRun
    tuned_on: NetworkRun

    def candidates(self) -> dict[float, NetworkRun]:
        return {multiple: matched(self.tuned_on, L2, multiple) for multiple in MULTIPLES}


class NoTuningAtSize(NoTuning):
    """The class attributes are the pre-registration."""

    budgets = ("large",)
    arms = (
        "ResNet-20 with weight norm and batch norm at full image size for 10 epochs: AWS from equilibrium "
        "(normwise.attach, strength 3), and the best of three L2 by their flows (0.1, 1 and 10 times the "
        "coefficient whose pull at norm 1 is 3/Σlr), both on the filters alone. SGD with momentum 0.9, a "
        "cosine from 1/4, 1 and 4 times 0.1, without augmentation. Four cells: the three rates on 4000 "
        "images, as many as the small networks have, where L2 is chosen in each cell by the accuracy on 2000 "
        "validation images of one other seed; and all images at the rate 0.1, with the multiple that was "
        "chosen at that rate on 4000 images. Reported beside it: no decay on all images. What was cut, to "
        "take hours and not days: all images in only one cell, initial norms, three of the seeds, two tuning "
        "seeds, other networks."
    )
    statistic = (
        "Test accuracy in points of AWS from equilibrium minus that of the L2 tuned in the cell, paired by "
        "seed (3 seeds), with a 95 % interval by Student's t, which leaves out the choice by a single tuning "
        f"seed. A cell is equivalent where two one-sided tests show ±{POINTS.margin:g} points, better or "
        "worse where the interval lies on one side of 0, else undecided. The same for the mean over the "
        "cells. A run that does not finish scores what guessing scores."
    )
    rule = (
        "Reproduced: the mean over the cells has its interval above 0, and every cell's interval lies above "
        f"−{POINTS.floor:g} point. Partly: the interval of the mean lies above −{POINTS.margin:g} points. "
        "Not reproduced: otherwise. Undecided: where an interval contains its threshold and that matters."
    )

    def runs(self) -> list[Run]:
        """AWS, and no decay on all images, with the seeds of the claim; L2 with the tuning seed."""
        wanted: list[Run] = []
        for cell in self._named().values():
            wanted += over_seeds([matched(cell.run, STARTED)], self.budget.seeds)
            wanted += over_seeds(cell.candidates().values(), self.budget.tuning_seeds)
        return wanted + over_seeds([matched(self.budget.networks.whole, NONE)], self.budget.seeds)

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The L2 that was chosen in each cell."""
        wanted = [self._tuned(runs, cell)[1] for cell in self._named().values()]
        return over_seeds(wanted, self.budget.seeds)

    def second_cost(self) -> float:
        """In each cell the L2 that was chosen."""
        return sum(len(self.budget.seeds) * cell.run.cost for cell in self._named().values())

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare AWS with the tuned L2 in each cell, and on average."""
        seeds = self.budget.seeds
        cells: dict[str, dict[str, Any]] = {}
        gains: dict[str, TunedValues] = {}
        accuracy: dict[str, dict[str, TunedValues]] = {}
        for name, cell in self._named().items():
            multiple, tuned = self._tuned(runs, cell)
            settings = {STARTED: matched(cell.run, STARTED), TUNED: tuned}
            if name == WHOLE:
                settings[NONE] = matched(cell.run, NONE)
            accuracy[name] = {
                arm: TunedValues(tuple(runs.scores(run, seeds))) for arm, run in settings.items()
            }
            gains[name] = accuracy[name][STARTED].minus(accuracy[name][TUNED])
            gain, test = mean_of_tuned(gains[name]), within(mean_of_tuned(gains[name], 0.9), POINTS.margin)
            side = "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided"
            cells[name] = {
                f"{STARTED} minus {TUNED}": gain,
                "outcome": "equivalent" if test.shown else side,
                "unfinished": {arm: runs.unfinished_count(run, seeds) for arm, run in settings.items()},
                "multiple": multiple,
                "above_the_floor": above(gain, -POINTS.floor),
            }
            if name == WHOLE:
                others = accuracy[name][STARTED].minus(accuracy[name][NONE])
                cells[name][f"{STARTED} minus {NONE}"] = mean_of_tuned(others)
        counts = Counter(found["outcome"] for found in cells.values())
        overall = {
            "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
            "cells": len(cells),
            POINTS.unit: {STARTED: mean_of_tuned(mean_over_cells(list(gains.values())))},
        }
        return Measured({"ResNet-20, SGD": cells, "overall": overall}, accuracy)

    def judge(self, measured: Measured) -> Verdict:
        """AWS is better on average, and nowhere much worse; or at least as good on average."""
        mean = measured.statistics["overall"][POINTS.unit][STARTED]
        floors = [found["above_the_floor"] for found in measured.statistics["ResNet-20, SGD"].values()]
        return verdict_of(all_of([above(mean), *floors]), above(mean, -POINTS.margin))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {
            f"ResNet-20, SGD / {name} / {STARTED} minus {TUNED}": (-POINTS.floor,)
            for name in measured.statistics["ResNet-20, SGD"]
        }
        return found | {f"overall / {POINTS.unit} / {STARTED}": (0.0, -POINTS.margin)}

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences in all cells."""
        cells = measured.statistics["ResNet-20, SGD"]
        differences = {name: found[f"{STARTED} minus {TUNED}"] for name, found in cells.items()}
        rows = []
        for name, found in cells.items():
            values: Mapping[str, TunedValues] = measured.details[name]
            none = f"{mean_of_tuned(values[NONE]):.1f}" if NONE in values else "–"
            rows.append(
                [name, none]
                + [f"{mean_of_tuned(values[arm]):.1f}" for arm in (TUNED, STARTED)]
                + [f"{differences[name]:+.2f}", f"×{found['multiple']:g}", found["outcome"]]
                + [str(sum(found["unfinished"].values()))]
            )
        columns = [
            "cell",
            NONE,
            TUNED,
            STARTED,
            "difference (points)",
            "L2 chosen",
            "outcome",
            "did not finish",
        ]
        title = "AWS from equilibrium minus the L2 tuned in the cell"
        overall = measured.statistics["overall"]
        whole = cells[WHOLE]
        counts = ", ".join(f"{outcome} in {overall['counts'][outcome]}" for outcome in OUTCOMES)
        answer = (
            f"Of {overall['cells']} cells, AWS with nothing tuned, started in equilibrium, against the best "
            f"of the tuned L2 is {counts}; on average it is {overall[POINTS.unit][STARTED]:+.2f} points from "
            f"it. On all images it is {differences[WHOLE]:+.2f} points from L2 and "
            f"{whole[f'{STARTED} minus {NONE}']:+.2f} from no decay."
        )
        plots = [dot_plot(title, POINTS.unit, differences)]
        return Exhibits(answer, plots, [Table("Test accuracy (%)", columns, rows)])

    def _named(self) -> dict[str, _Cell]:
        networks = self.budget.networks
        sweep = networks.sweep
        cells = {}
        for factor in FACTORS:
            run = replace(sweep, lr=sweep.lr * factor)
            cells[f"{sweep.train_size} images, lr × {factor:g}"] = _Cell(run, run)
        cells[WHOLE] = _Cell(networks.whole, sweep)
        return cells

    def _tuned(self, runs: FinishedRuns, cell: _Cell) -> tuple[float, NetworkRun]:
        multiple = runs.choice(cell.candidates(), self.budget.tuning_seeds).best
        return multiple, matched(cell.run, L2, multiple)


CLAIM = NoTuningAtSize
