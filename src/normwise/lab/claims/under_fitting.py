"""Claim: without decay, networks of the weight-normalisation family under-fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.arms import AWS, L2, NONE, scaled, with_arm
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.settings import Settings, TrainSettings
from normwise.lab.statistics import mean_with_interval, paired_difference

SCALES = (1e-2, 1.0, 1e1)
RATES = (0.025, 0.1, 0.4)
SEVERE = 5.0  # points of training accuracy
COMPARED = (NONE, L2, AWS)


class UnderFitting(Claim):
    """See the texts."""

    id = "under-fitting"
    order = 2
    title = "Under-fitting without decay"
    source = "Li, Chen & Yang, AAAI 2020: without weight decay the family under-fits severely."
    question = (
        "Decay is known to prevent over-fitting. Does leaving it out make a network with normalised weights "
        "fit even its training data worse, and when?"
    )
    arms = (
        "No decay; L2; AWS. The coefficient of AWS is 3/Σlr, and L2 has the same pull at norm 1, for each "
        "learning rate anew; nothing is tuned. Initial norms 0.01, 1 and 10, learning rates 0.025, 0.1 and "
        "0.4 (SGD with momentum 0.9 and a cosine)."
    )
    statistic = (
        "Accuracy on the training images at the end of training, in points, paired by seed: L2 minus no "
        "decay, in each cell of initial norm × learning rate, with a 95 % interval by Student's t."
    )
    rule = (
        f"A cell shows severe under-fitting where the difference is at least {SEVERE:g} points with an "
        "interval above 0. Reproduced: all cells of all members do. Partly: some do. Not reproduced: none."
    )

    def runs(self, budget: Budget) -> list[Settings]:
        """Three arms in nine cells, for all members and seeds."""
        return [
            replace(self._run(budget, member, arm, scale, lr), seed=seed)
            for member in budget.members
            for arm in COMPARED
            for scale in SCALES
            for lr in RATES
            for seed in budget.seeds
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Count the cells with severe under-fitting."""
        plots, tables, cells = [], [], []
        for member in budget.members:
            family = member.replace("_", " ")
            rows: list[list[str]] = []
            curves: list[Series] = []
            for lr in RATES:
                at_rate: dict[str, list[float | None]] = {arm: [] for arm in COMPARED}
                for scale in SCALES:
                    cell = {arm: self._run(budget, member, arm, scale, lr) for arm in COMPARED}
                    accuracy = {
                        arm: [
                            None if v is None else 100 * v
                            for v in runs.values("train_accuracy", run, budget.seeds)
                        ]
                        for arm, run in cell.items()
                    }
                    losses = {
                        arm: mean_with_interval(runs.values("train_loss", run, budget.seeds)).mean
                        for arm, run in cell.items()
                    }
                    means = {arm: mean_with_interval(values).mean for arm, values in accuracy.items()}
                    gain = paired_difference(accuracy[L2], accuracy[NONE])
                    severe = gain.mean >= SEVERE and gain.low > 0
                    cells.append(
                        {"member": member, "norm": scale, "lr": lr, "L2_minus_none": gain.as_dict()}
                        | {"severe": severe, "AWS_minus_none": means[AWS] - means[NONE]}
                    )
                    for arm in COMPARED:
                        at_rate[arm].append(losses[arm])
                    rows.append(
                        [f"{scale:g}", f"{lr:g}"]
                        + [f"{losses[arm]:.3f}" for arm in COMPARED]
                        + [f"{means[arm]:.1f}" for arm in COMPARED]
                        + [str(gain), "severe" if severe else "–"]
                    )
                curves += [
                    Series(
                        f"{arm}, lr {lr:g}",
                        SCALES,
                        at_rate[arm],
                        dashed=arm == NONE,
                        color=RATES.index(lr),
                    )
                    for arm in (NONE, L2)
                ]
            plots.append(
                Plot(
                    f"Training loss by initial norm ({family})",
                    "norm of every unit at the start",
                    "training loss at the end",
                    curves,
                    log_x=True,
                )
            )
            columns = ["norm", "lr", *(f"loss, {arm}" for arm in COMPARED)]
            columns += [*(f"acc., {arm}" for arm in COMPARED), "L2 − no decay (points)", "under-fitting"]
            tables.append(Table(f"Training loss and accuracy (%) at the end ({family})", columns, rows))
        severe_cells = [cell for cell in cells if cell["severe"]]
        verdict: Verdict = (
            "reproduced"
            if len(severe_cells) == len(cells)
            else "partly"
            if severe_cells
            else "not reproduced"
        )
        statistics = {"cells": cells, "severe": len(severe_cells), "of": len(cells)}
        return Finding(verdict, _answer(cells), statistics, plots, tables)

    def _run(self, budget: Budget, member: str, arm: str, scale: float, lr: float) -> TrainSettings:
        return scaled(with_arm(replace(budget.training, member=member, lr=lr), arm), scale)


def _answer(cells: list[dict[str, Any]]) -> str:
    severe = [cell for cell in cells if cell["severe"]]
    spared = [cell for cell in cells if not cell["severe"]]
    answer = f"Training accuracy is at least {SEVERE:g} points lower without decay than with L2 in "
    answer += f"{len(severe)} of {len(cells)} cells"
    if severe:
        worst = max(severe, key=lambda cell: float(cell["L2_minus_none"]["mean"]))
        answer += (
            f"; most, by {worst['L2_minus_none']['mean']:.0f} points, at initial norm {worst['norm']:g} and "
            f"learning rate {worst['lr']:g}"
        )
    if spared:
        mildest = min(spared, key=lambda cell: float(cell["L2_minus_none"]["mean"]))
        answer += (
            f". Elsewhere it is milder or absent: {mildest['L2_minus_none']['mean']:.1f} points at norm "
            f"{mildest['norm']:g} and learning rate {mildest['lr']:g}"
        )
    return answer + "."


CLAIM = UnderFitting()
