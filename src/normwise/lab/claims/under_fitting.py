"""Claim: without decay, networks of the weight-normalisation family under-fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.traces import traces
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

    def runs(self, budget: Budget) -> list[Run]:
        """The arms in nine cells, for all members and seeds, and the lengths."""
        lengths: list[Run] = [
            replace(self._length(budget, arm, scale, epochs), seed=seed)
            for arm in (NONE, L2)
            for scale in LENGTH_SCALES
            for epochs in LENGTHS[budget.name]
            for seed in budget.seeds
        ]
        return lengths + [
            replace(self._run(budget, member, arm, scale, lr), seed=seed)
            for member in budget.members
            for arm in COMPARED[budget.name]
            for scale in SCALES
            for lr in RATES
            for seed in budget.seeds
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Count the cells with severe under-fitting."""
        plots, tables, cells = [], [], []
        compared = COMPARED[budget.name]
        for member in budget.members:
            family = member.replace("_", " ")
            rows: list[list[str]] = []
            curves: list[Series] = []
            for lr in RATES:
                at_rate: dict[str, list[float | None]] = {arm: [] for arm in compared}
                for scale in SCALES:
                    cell = {arm: self._run(budget, member, arm, scale, lr) for arm in compared}
                    accuracy = {
                        arm: runs.points("train_accuracy", run, budget.seeds) for arm, run in cell.items()
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
                        | {"severe": severe}
                        | ({"AWS_minus_none": means[AWS] - means[NONE]} if AWS in means else {})
                    )
                    for arm in compared:
                        at_rate[arm].append(losses[arm])
                    rows.append(
                        [f"{scale:g}", f"{lr:g}"]
                        + [f"{losses[arm]:.3f}" for arm in compared]
                        + [f"{means[arm]:.1f}" for arm in compared]
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
            columns = ["norm", "lr", *(f"loss, {arm}" for arm in compared)]
            columns += [*(f"acc., {arm}" for arm in compared), "L2 − no decay (points)", "under-fitting"]
            tables.append(Table(f"Training loss and accuracy (%) at the end ({family})", columns, rows))
        plot, table, by_length = self._by_length(budget, runs)
        plots.append(plot)
        tables.append(table)
        severe_cells = [cell for cell in cells if cell["severe"]]
        verdict: Verdict = (
            "reproduced"
            if len(severe_cells) == len(cells)
            else "partly"
            if severe_cells
            else "not reproduced"
        )
        statistics = {"cells": cells, "severe": len(severe_cells), "of": len(cells), "by_length": by_length}
        over_time = {
            arm: replace(self._length(budget, arm, 10.0, 8), seed=budget.seeds[0]) for arm in (NONE, L2)
        }
        what = f"{budget.members[0].replace('_', ' ')}, from norm 10"
        over = traces(runs, over_time, what)
        return Finding(verdict, _answer(cells), statistics, plots, tables, traces=over)

    def _by_length(self, budget: Budget, runs: Runs) -> tuple[Plot, Table, dict[str, Any]]:
        """Compare no decay with L2 over lengths of training."""
        lengths = LENGTHS[budget.name]
        series, rows = [], []
        found: dict[str, Any] = {}
        for k, scale in enumerate(LENGTH_SCALES):
            accuracy = {
                arm: [
                    runs.points("train_accuracy", self._length(budget, arm, scale, epochs), budget.seeds)
                    for epochs in lengths
                ]
                for arm in (NONE, L2)
            }
            for arm, values in accuracy.items():
                means = [mean_with_interval(v).mean for v in values]
                series.append(Series(f"{arm}, norm {scale:g}", lengths, means, dashed=arm == NONE, color=k))
            gains = [paired_difference(a, b) for a, b in zip(accuracy[L2], accuracy[NONE], strict=True)]
            rows.append([f"{scale:g}", *map(str, gains)])
            pairs = zip(lengths, gains, strict=True)
            found[f"norm {scale:g}"] = {f"{epochs} epochs": gain.as_dict() for epochs, gain in pairs}
        family = budget.members[0].replace("_", " ")
        plot = Plot(
            f"Training accuracy by length of training ({family})",
            "epochs",
            "training accuracy (%)",
            series,
            log_x=True,
        )
        columns = ["norm", *(f"{epochs} epochs" for epochs in lengths)]
        title = f"Training accuracy, L2 minus no decay (points), by length of training ({family})"
        return plot, Table(title, columns, rows), found

    def _length(self, budget: Budget, arm: str, scale: float, epochs: int) -> TrainRun:
        base = replace(budget.training, member=budget.members[0], epochs=epochs)
        return scaled(with_arm(base, arm), scale)

    def _run(self, budget: Budget, member: str, arm: str, scale: float, lr: float) -> TrainRun:
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
