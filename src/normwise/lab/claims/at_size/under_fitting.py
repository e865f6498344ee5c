"""Claim, on networks of the paper's size: without decay they under-fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from normwise.lab.claims.claim import Exhibits, Measured
from normwise.lab.claims.conditions import above
from normwise.lab.claims.exhibits import Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.networks import SIZED, matched, recipe
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.under_fitting import SEVERE, UnderFitting, answer
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import L2, NONE
from normwise.lab.runs.network import NetworkRun

__all__ = ["CLAIM"]

FAR = (1e-3, 1e3)  # scales of the initial filters, on the images of the sweeps


@dataclass(frozen=True)
class _Cell:
    network: str
    scale: float
    arms: Mapping[str, NetworkRun]


class UnderFittingAtSize(UnderFitting):
    """The class attributes are the pre-registration."""

    budgets = SIZED
    arms = (
        "Large: ResNet-20 with weight norm and batch norm at full image size for 10 epochs; no decay, and L2 "
        "on the filters by its flow with the pull 3/Σlr at norm 1, nothing tuned; SGD with momentum 0.9, a "
        "cosine from 0.1, batches of 128, without augmentation. On all images with the usual initialisation; "
        "and on 4000 images, as many as the small networks have, with filters that start 1000 times smaller "
        "and larger, and with weight standardisation, and with batch norm only, from the usual ones. What "
        "was cut, to take hours and not days: all images only in the first of these five cells, learning "
        "rates, AWS. Paper: each network of the budget under no decay and under L2 with the usual "
        "coefficient (5e-4, ImageNet 1e-4) on all parameters, as published."
    )
    statistic = (
        "Accuracy at the end of training on the training images, at most 10,000 of them and as they are, in "
        "points, paired by seed (3 seeds): L2 minus no decay in each cell, with a 95 % interval by Student's "
        "t. A run that does not finish scores what guessing scores."
    )

    def runs(self) -> list[Run]:
        """Both arms in all cells, for all seeds."""
        return over_seeds((run for cell in self._named() for run in cell.arms.values()), self.budget.seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Count the cells with severe under-fitting."""
        seeds = self.budget.seeds
        cells: list[dict[str, Any]] = []
        for cell in self._named():
            accuracy = runs.accuracy(cell.arms, seeds, part="train")
            gain = paired_difference(accuracy[L2], accuracy[NONE])
            cells.append(
                {
                    "member": cell.network,
                    "norm": cell.scale,
                    "lr": cell.arms[L2].lr,
                    "L2_minus_none": gain,
                    "severe": above(gain, SEVERE),
                    "accuracy": {arm: mean_with_interval(values) for arm, values in accuracy.items()},
                    "did_not_finish": {
                        arm: runs.unfinished_count(run, seeds) for arm, run in cell.arms.items()
                    },
                }
            )
        severe = [cell["severe"] for cell in cells]
        return Measured(
            {
                "cells": cells,
                "severe": severe.count(True),
                "undecided": severe.count(None),
                "of": len(cells),
            }
        )

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the difference in each cell, and the accuracy on training and on test images."""
        cells = measured.statistics["cells"]
        names = [f"{cell['member']}, scale {cell['norm']:g}" for cell in cells]
        rows = []
        for name, found, cell in zip(names, cells, self._named(), strict=True):
            tests = runs.accuracy(cell.arms, self.budget.seeds)
            rows.append(
                [name]
                + [str(found["accuracy"][arm]) for arm in (NONE, L2)]
                + [f"{found['L2_minus_none']:+.1f}"]
                + [str(mean_with_interval(tests[arm])) for arm in (NONE, L2)]
                + [str(sum(found["did_not_finish"].values()))]
            )
        columns = ["network", f"training, {NONE}", f"training, {L2}", "L2 − no decay (points)"]
        columns += [f"test, {NONE}", f"test, {L2}", "did not finish"]
        gains = {name: cell["L2_minus_none"] for name, cell in zip(names, cells, strict=True)}
        title = "Training accuracy, L2 minus no decay"
        return Exhibits(
            answer(cells, [f"with {name}" for name in names]),
            [dot_plot(title, "points", gains)],
            [Table("Accuracy (%)", columns, rows)],
        )

    def _named(self) -> list[_Cell]:
        networks = self.budget.networks
        if self.budget.name == "paper":
            return [
                _Cell(name, 1.0, {arm: recipe(run, arm) for arm in (NONE, L2)})
                for name, run in networks.others.items()
            ]
        wanted = [("all images, weight norm", networks.whole)]
        wanted += [("weight norm", replace(networks.sweep, init_scale=scale)) for scale in FAR]
        wanted += networks.others.items()
        return [
            _Cell(name, run.init_scale, {arm: matched(run, arm) for arm in (NONE, L2)})
            for name, run in wanted
        ]


CLAIM = UnderFittingAtSize
