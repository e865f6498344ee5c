"""Claim: without decay, networks of the weight-normalisation family under-fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_some_none
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, Values, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import Estimate, mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, NONE, scaled, with_arm
from normwise.lab.runs.train import TrainRun

SCALES = (1e-2, 1.0, 1e1)
RATES = (0.025, 0.1, 0.4)
CENTRE = 0.1  # of the rates
SEVERE = 5.0  # points of training accuracy
_WORDS = {True: "severe", False: "–", None: "undecided"}
COMPARED = {"quick": (NONE, L2), "full": (NONE, L2, AWS)}
LENGTHS = (2, 8, 16, 32)  # epochs; full budget
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
        "learning rates 0.025, 0.1 and 0.4 (SGD with momentum 0.9 and a cosine); quick: the norms at the "
        "rate 0.1, and the rates at norm 1; full: all nine cells, 5 seeds for the first member and 3 for the "
        "others. And by length (full budget): no decay and L2 for 2 to 32 epochs from the norms 1 and 10 at "
        "learning rate 0.1, for the first member."
    )
    statistic = (
        "Accuracy on the training images at the end of training, in points, paired by seed: L2 minus no "
        "decay, in each cell of initial norm × learning rate, with a 95 % interval by Student's t. A run "
        "that does not finish scores what guessing scores. The lengths are reported and not judged."
    )
    rule = (
        f"A cell shows severe under-fitting where the difference is above {SEVERE:g} points with its "
        "interval, none where the interval lies below; else it is undecided. Reproduced: all cells of all "
        "members show it. Partly: some do, and some do not. Not reproduced: none does. Else undecided."
    )

    def runs(self) -> list[Run]:
        """The arms in all cells, for all members and seeds, and the lengths."""
        lengths = [run for by_length in self._lengths().values() for run in by_length.values()]
        wanted = over_seeds(lengths, self.budget.seeds)
        for member in self.budget.members:
            for arms in self._cells(member).values():
                wanted += over_seeds(arms.values(), self.budget.seeds_for(member))
        return wanted

    def measure(self, runs: FinishedRuns) -> Measured:
        """Count the cells with severe under-fitting, and compare lengths of training."""
        cells: list[dict[str, Any]] = []
        losses: dict[tuple[str, float, float], dict[str, Values]] = {}
        for member in self.budget.members:
            seeds = self.budget.seeds_for(member)
            for (lr, scale), arms in self._cells(member).items():
                accuracy = runs.accuracy(arms, seeds, part="train")
                gain = paired_difference(accuracy[L2], accuracy[NONE])
                cell: dict[str, Any] = {"member": member, "norm": scale, "lr": lr, "L2_minus_none": gain}
                cell["severe"] = above(gain, SEVERE)
                cell["accuracy"] = {arm: mean_with_interval(values) for arm, values in accuracy.items()}
                cell["did_not_finish"] = {arm: runs.unfinished_count(run, seeds) for arm, run in arms.items()}
                if AWS in accuracy:
                    cell["AWS_minus_none"] = paired_difference(accuracy[AWS], accuracy[NONE])
                cells.append(cell)
                losses[member, lr, scale] = {
                    arm: runs.values("train_loss", run, seeds) for arm, run in arms.items()
                }
        lengths = {  # by initial norm, then by arm and length
            scale: runs.accuracy(settings, self.budget.seeds, part="train")
            for scale, settings in self._lengths().items()
        }
        by_length = {
            f"norm {scale:g}": {
                f"{epochs} epochs": paired_difference(accuracy[L2, epochs], accuracy[NONE, epochs])
                for epochs in LENGTHS
            }
            for scale, accuracy in lengths.items()
        }
        counts = Counter(cell["severe"] for cell in cells)
        statistics = {
            "cells": cells,
            "severe": counts[True],
            "undecided": counts[None],
            "of": len(cells),
            "by_length": by_length,
        }
        return Measured(statistics, {"losses": losses, "lengths": lengths})

    def judge(self, measured: Measured) -> Verdict:
        """All, some or no cells show severe under-fitting."""
        return all_some_none(cell["severe"] for cell in measured.statistics["cells"])

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        return {f"cells / {k} / L2_minus_none": (SEVERE,) for k in range(len(measured.statistics["cells"]))}

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        counts = measured.statistics
        most = max(float(cell["L2_minus_none"].mean) for cell in counts["cells"])
        cells = f"severe in {counts['severe']} of {counts['of']} cells, open in {counts['undecided']}"
        return f"{cells}; up to {most:.1f} points"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the cells of each member, and the lengths of training."""
        plots, tables = [], []
        cells = measured.statistics["cells"]
        compared = COMPARED[self.budget.name]
        columns = ["norm", "lr", *(f"loss (nats), {arm}" for arm in compared)]
        columns += [*(f"accuracy, {arm}" for arm in compared)]
        columns += ["L2 − no decay (points)", "under-fitting", "did not finish"]
        for member in self.budget.members:
            losses = {
                (lr, scale): by_arm
                for (of, lr, scale), by_arm in measured.details["losses"].items()
                if of == member
            }
            curves = [
                Series.over_seeds(
                    f"{arm}, lr {lr:g}",
                    {scale: losses[lr, scale][arm] for scale in SCALES if (lr, scale) in losses},
                    dashed=arm == NONE,
                    color=color,
                )
                for color, lr in enumerate(RATES)
                for arm in (NONE, L2)
            ]
            rows: list[list[str | int]] = []
            for cell in cells:
                if cell["member"] == member:
                    at = losses[cell["lr"], cell["norm"]]
                    rows.append(
                        [f"{cell['norm']:g}", f"{cell['lr']:g}"]
                        + [f"{mean_with_interval(at[arm]):.3f}" for arm in compared]
                        + [str(cell["accuracy"][arm]) for arm in compared]
                        + [str(cell["L2_minus_none"]), _WORDS[cell["severe"]]]
                        + [sum(cell["did_not_finish"].values())]
                    )
            title = f"Training loss by initial norm ({family(member)})"
            x_label = "norm of every unit at the start"
            plots.append(Plot(title, x_label, "training loss at the end (nats)", curves, log_x=True))
            tables.append(
                Table(f"Training loss and accuracy (%) at the end ({family(member)})", columns, rows)
            )
        if lengths := measured.details["lengths"]:
            plot, table = self._by_length(measured.statistics["by_length"], lengths)
            plots.append(plot)
            tables.append(table)
        far = self._cells(self.first)[CENTRE, 10.0]
        traced = {arm: replace(far[arm], seed=self.budget.seeds[0]) for arm in (NONE, L2)}
        return Exhibits(
            answer(cells, [self._where(cell) for cell in cells]),
            plots,
            tables,
            traces=layer_curves(runs, traced, f"{family(self.first)}, from norm 10"),
        )

    def _where(self, cell: dict[str, Any]) -> str:
        member = f"with {family(cell['member'])} " if len(self.budget.members) > 1 else ""
        return f"{member}at initial norm {cell['norm']:g} and learning rate {cell['lr']:g}"

    def _by_length(
        self, gains: dict[str, dict[str, Estimate]], lengths: dict[float, dict[tuple[str, int], list[float]]]
    ) -> tuple[Plot, Table]:
        series = [
            Series.over_seeds(
                f"{arm}, norm {scale:g}",
                {float(epochs): accuracy[arm, epochs] for epochs in LENGTHS},
                dashed=arm == NONE,
                color=k,
            )
            for k, (scale, accuracy) in enumerate(lengths.items())
            for arm in (NONE, L2)
        ]
        title = f"Training accuracy by length of training ({family(self.first)})"
        plot = Plot(title, "epochs", "training accuracy (%)", series, log_x=True)
        rows = [
            [norm.removeprefix("norm "), *map(str, by_length.values())] for norm, by_length in gains.items()
        ]
        title = f"Training accuracy, L2 minus no decay (points), by length of training ({family(self.first)})"
        return plot, Table(title, ["norm", *(f"{epochs} epochs" for epochs in LENGTHS)], rows)

    def _lengths(self) -> dict[float, dict[tuple[str, int], TrainRun]]:
        """Return the settings by initial norm, then by arm and length."""
        return {
            scale: {
                (arm, epochs): self._length(arm, scale, epochs) for arm in (NONE, L2) for epochs in LENGTHS
            }
            for scale in (LENGTH_SCALES if self.budget.full else ())
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
            if self.budget.full or lr == CENTRE or scale == 1  # the others decide nothing
        }


def answer(cells: list[dict[str, Any]], where: list[str]) -> str:
    """Return what was found in these cells, in a sentence.

    Args:
        cells: What was measured in each.
        where: What tells each cell from the others, with its preposition.
    """
    counts = Counter(cell["severe"] for cell in cells)
    text = f"Training accuracy is more than {SEVERE:g} points lower without decay than with L2 in "
    text += f"{counts[True]} of {len(cells)} cells (in {counts[None]} undecided)"
    by_gain = sorted(zip(cells, where, strict=True), key=lambda pair: float(pair[0]["L2_minus_none"].mean))
    for words, (cell, place) in (("most", by_gain[-1]), ("least", by_gain[0])):
        text += f"; {words}, by {cell['L2_minus_none']:.1f} points, {place}"
    return text + "."


CLAIM = UnderFitting
