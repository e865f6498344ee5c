"""Claim: without decay, networks of the weight-normalisation family under-fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Claim, Exhibits, Measured, Verdict, all_some_none
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, NONE, scaled, with_arm
from normwise.lab.runs.train import TrainRun

SCALES = (1e-2, 1.0, 1e1)
RATES = (0.025, 0.1, 0.4)
SEVERE = 5.0  # points of training accuracy
COMPARED = {"quick": (NONE, L2), "full": (NONE, L2, AWS)}
LENGTHS = {"quick": (2, 8), "full": (2, 8, 16, 32)}  # epochs
LENGTH_SCALES = (1.0, 1e1)


class UnderFitting(Claim):
    """The class attributes are the pre-registration."""

    id = "under-fitting"
    order = 2
    title = "Under-fitting without decay"
    source = "Li, Chen & Yang, AAAI 2020: without weight decay the family under-fits severely."
    question = (
        "Decay is known to prevent over-fitting. Does leaving it out make a network with normalised weights "
        "fit even its training data worse, and when?"
    )
    arms = (
        "No decay; L2; in the full budget also AWS. The coefficient of AWS is 3/Σlr, and L2 has the same "
        "pull at norm 1, for each learning rate anew; nothing is tuned. Initial norms 0.01, 1 and 10, "
        "learning rates 0.025, 0.1 and 0.4 (SGD with momentum 0.9 and a cosine). And by length: no decay and "
        "L2 for 2 and 8 epochs (full budget: to 32) from the norms 1 and 10 at learning rate 0.1, for the "
        "first member."
    )
    statistic = (
        "Accuracy on the training images at the end of training, in points, paired by seed: L2 minus no "
        "decay, in each cell of initial norm × learning rate, with a 95 % interval by Student's t. The "
        "lengths are reported and not judged."
    )
    rule = (
        f"A cell shows severe under-fitting where the difference is at least {SEVERE:g} points with an "
        "interval above 0. Reproduced: all cells of all members do. Partly: some do. Not reproduced: none."
    )

    def runs(self) -> list[Run]:
        """The arms in nine cells, for all members and seeds, and the lengths."""
        wanted = [run for lengths in self._lengths().values() for run in lengths.values()]
        for member in self.budget.members:
            for arms in self._cells(member).values():
                wanted += arms.values()
        return over_seeds(wanted, self.budget.seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Count the cells with severe under-fitting, and compare lengths of training."""
        cells: list[dict[str, Any]] = []
        means: dict[tuple[str, float, float], dict[str, tuple[float, float]]] = {}  # loss and accuracy by arm
        for member in self.budget.members:
            for (lr, scale), arms in self._cells(member).items():
                accuracy = runs.accuracy(arms, self.budget.seeds, part="train")
                mean = {arm: mean_with_interval(values).mean for arm, values in accuracy.items()}
                gain = paired_difference(accuracy[L2], accuracy[NONE])
                cell = {"member": member, "norm": scale, "lr": lr, "L2_minus_none": gain}
                cell["severe"] = gain.mean >= SEVERE and gain.low > 0
                if AWS in mean:
                    cell["AWS_minus_none"] = mean[AWS] - mean[NONE]
                cells.append(cell)
                means[member, lr, scale] = {
                    arm: (
                        mean_with_interval(runs.values("train_loss", run, self.budget.seeds)).mean,
                        mean[arm],
                    )
                    for arm, run in arms.items()
                }
        lengths = {  # by initial norm, then by arm and length
            scale: runs.accuracy(settings, self.budget.seeds, part="train")
            for scale, settings in self._lengths().items()
        }
        by_length = {
            f"norm {scale:g}": {
                f"{epochs} epochs": paired_difference(accuracy[L2, epochs], accuracy[NONE, epochs])
                for epochs in LENGTHS[self.budget.name]
            }
            for scale, accuracy in lengths.items()
        }
        severe = sum(cell["severe"] for cell in cells)
        return Measured(
            {"cells": cells, "severe": severe, "of": len(cells), "by_length": by_length},
            {"means": means, "lengths": lengths},
        )

    def judge(self, measured: Measured) -> Verdict:
        """All, some or no cells show severe under-fitting."""
        return all_some_none(cell["severe"] for cell in measured.statistics["cells"])

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the cells of each member, and the lengths of training."""
        plots, tables = [], []
        compared = COMPARED[self.budget.name]
        columns = ["norm", "lr", *(f"loss, {arm}" for arm in compared)]
        columns += [*(f"acc., {arm}" for arm in compared), "L2 − no decay (points)", "under-fitting"]
        for member in self.budget.members:
            means = measured.details["means"]
            curves = [
                Series(
                    f"{arm}, lr {lr:g}",
                    SCALES,
                    [means[member, lr, scale][arm][0] for scale in SCALES],
                    dashed=arm == NONE,
                    color=color,
                )
                for color, lr in enumerate(RATES)
                for arm in (NONE, L2)
            ]
            rows = []
            for cell in measured.statistics["cells"]:
                if cell["member"] == member:
                    at = means[member, cell["lr"], cell["norm"]]
                    rows.append(
                        [f"{cell['norm']:g}", f"{cell['lr']:g}"]
                        + [f"{at[arm][0]:.3f}" for arm in compared]
                        + [f"{at[arm][1]:.1f}" for arm in compared]
                        + [str(cell["L2_minus_none"]), "severe" if cell["severe"] else "–"]
                    )
            title = f"Training loss by initial norm ({family(member)})"
            x_label = "norm of every unit at the start"
            plots.append(Plot(title, x_label, "training loss at the end", curves, log_x=True))
            tables.append(
                Table(f"Training loss and accuracy (%) at the end ({family(member)})", columns, rows)
            )
        plot, table = self._by_length(measured)
        traced = {arm: replace(self._length(arm, 10.0, 8), seed=self.budget.seeds[0]) for arm in (NONE, L2)}
        return Exhibits(
            _answer(measured.statistics["cells"]),
            [*plots, plot],
            [*tables, table],
            traces=layer_curves(runs, traced, f"{family(self.first)}, from norm 10"),
        )

    def _by_length(self, measured: Measured) -> tuple[Plot, Table]:
        lengths = LENGTHS[self.budget.name]
        series = [
            Series(
                f"{arm}, norm {scale:g}",
                lengths,
                [mean_with_interval(accuracy[arm, epochs]).mean for epochs in lengths],
                dashed=arm == NONE,
                color=k,
            )
            for k, (scale, accuracy) in enumerate(measured.details["lengths"].items())
            for arm in (NONE, L2)
        ]
        title = f"Training accuracy by length of training ({family(self.first)})"
        plot = Plot(title, "epochs", "training accuracy (%)", series, log_x=True)
        rows = [
            [norm.removeprefix("norm "), *map(str, gains.values())]
            for norm, gains in measured.statistics["by_length"].items()
        ]
        title = f"Training accuracy, L2 minus no decay (points), by length of training ({family(self.first)})"
        return plot, Table(title, ["norm", *(f"{epochs} epochs" for epochs in lengths)], rows)

    def _lengths(self) -> dict[float, dict[tuple[str, int], TrainRun]]:
        """Return the settings by initial norm, then by arm and length."""
        return {
            scale: {
                (arm, epochs): self._length(arm, scale, epochs)
                for arm in (NONE, L2)
                for epochs in LENGTHS[self.budget.name]
            }
            for scale in LENGTH_SCALES
        }

    def _length(self, arm: str, scale: float, epochs: int) -> TrainRun:
        base = replace(self.budget.training, member=self.first, epochs=epochs)
        return scaled(with_arm(base, arm), scale)

    def _cells(self, member: str) -> dict[tuple[float, float], dict[str, TrainRun]]:
        """Return the settings by learning rate and initial norm, then by arm."""
        return {
            (lr, scale): {
                arm: scaled(with_arm(replace(self.budget.training, member=member, lr=lr), arm), scale)
                for arm in COMPARED[self.budget.name]
            }
            for lr in RATES
            for scale in SCALES
        }


def _answer(cells: list[dict[str, Any]]) -> str:
    severe = [cell for cell in cells if cell["severe"]]
    spared = [cell for cell in cells if not cell["severe"]]
    answer = f"Training accuracy is at least {SEVERE:g} points lower without decay than with L2 in "
    answer += f"{len(severe)} of {len(cells)} cells"
    if severe:
        worst = max(severe, key=lambda cell: float(cell["L2_minus_none"].mean))
        answer += (
            f"; most, by {worst['L2_minus_none'].mean:.0f} points, at initial norm {worst['norm']:g} and "
            f"learning rate {worst['lr']:g}"
        )
    if spared:
        mildest = min(spared, key=lambda cell: float(cell["L2_minus_none"].mean))
        answer += (
            f". Elsewhere it is milder or absent: {mildest['L2_minus_none'].mean:.1f} points at norm "
            f"{mildest['norm']:g} and learning rate {mildest['lr']:g}"
        )
    return answer + "."


CLAIM = UnderFitting
