"""Claim: L2 makes training sensitive to the initial norm, and AWS does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import Estimate, mean_with_interval, paired_difference
from normwise.lab.claims.traces import traces
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import ARMS, AWS, EPSILON, EXPLICIT_AWS, L2, NONE, SPHERE, scaled, with_arm
from normwise.lab.runs.train import TrainRun

# The ε-shift and explicit AWS are what L2 and AWS are where they go well, and a sphere forgets its start:
# they are run at fewer norms, the sphere so in the quick budget only.
SCALES = {
    "quick": (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3),
    "full": tuple(10.0**k for k in range(-6, 7)),
}
STARTS = {
    "quick": ("layers",),
    "full": ("layers", "torch", "kaiming_normal", "xavier_uniform", "orthogonal", "normal_0.02"),
}
FLAT = 2.0  # points of accuracy: as flat as a prototype with another network was
LOSS = 3.0  # points: five standard errors of one test accuracy
_START_NAMES = {"layers": "each layer at a scale of its own, 0.001 … 1000", "torch": "torch's default"}


class Initialization(Claim):
    """See the texts."""

    id = "initialization"
    order = 7
    title = "Sensitivity to initialisation"
    source = "Li, Chen & Yang, AAAI 2020: L2 makes training sensitive to initialisation; AWS is robust to it."
    question = (
        "The norm of the initial weights does not change what the network computes. Does it change what "
        "training arrives at, and does Adaptive Weight Shrink remove the dependence that L2 leaves?"
    )
    arms = (
        "No decay; L2; ε-shifted L2 (ε = 0.001); a sphere of radius 1; AWS explicit; AWS (its exact flow). "
        "Nothing is tuned: the coefficient of AWS is 3/Σlr (AdaptiveWeightShrink.for_budget), and L2 and the "
        "ε-shift have the same pull at norm 1. Every unit of every convolution starts with the norm 0.001 … "
        "1000 (full budget: 10⁻⁶ … 10⁶; there the other members with its ends and middle, without the "
        "ε-shift and explicit AWS); the head is plain and is never decayed. SGD with momentum 0.9 and a "
        "cosine from 0.1. Beside that, no decay, L2 and AWS from other starts: each layer at a power of ten "
        "of its own, drawn by seed from 0.001 … 1000, and (full budget) the usual initialisers."
    )
    statistic = (
        "Test accuracy in points, paired by seed. The spread of an arm: the largest minus the smallest mean "
        "over the initial norms. The advantage at an end (the smallest or the largest norm): AWS minus L2, "
        "with a 95 % interval by Student's t over the seeds. The other starts are reported and not judged."
    )
    rule = (
        f"Reproduced: for every member of the family, the spread of AWS is at most {FLAT:g} points, and at "
        f"one end or more its advantage over L2 is at least {LOSS:g} points with an interval above 0. "
        "Partly: one of the two holds for some member. Not reproduced: neither holds for any."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """All arms at all scales, and the other starts, for all members and seeds."""
        wanted = [
            run
            for member in budget.members
            for arm in _arms(budget, member)
            for run in self._runs(budget, member, arm).values()
        ]
        wanted += [run for runs in self._starts(budget).values() for run in runs.values()]
        return [replace(run, seed=seed) for run in wanted for seed in _seeds(budget, run.member)]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare the spreads, and AWS with L2 at the ends."""
        plots, tables, notes, conditions = [], [], [], []
        statistics: dict[str, Any] = {}
        for member in budget.members:
            wanted = {arm: self._runs(budget, member, arm) for arm in _arms(budget, member)}
            accuracy = {
                arm: {
                    scale: runs.points("test_accuracy", run, _seeds(budget, member))
                    for scale, run in at_scales.items()
                }
                for arm, at_scales in wanted.items()
            }
            means = {
                arm: {scale: mean_with_interval(values) for scale, values in at_scales.items()}
                for arm, at_scales in accuracy.items()
            }
            spreads = {arm: _spread(list(estimates.values())) for arm, estimates in means.items()}
            ends = [scale for scale in accuracy[AWS] if scale in (min(accuracy[AWS]), max(accuracy[AWS]))]
            advantage = {
                f"{scale:g}": paired_difference(accuracy[AWS][scale], accuracy[L2][scale]) for scale in ends
            }
            conditions += [
                spreads[AWS] <= FLAT,
                any(gain.mean >= LOSS and gain.low > 0 for gain in advantage.values()),
            ]
            statistics[member] = {
                "spread": {arm: round(spread, 2) for arm, spread in spreads.items()},
                "advantage_over_L2": {end: gain.as_dict() for end, gain in advantage.items()},
                "test_accuracy": {
                    arm: {f"{scale:g}": e.as_dict() for scale, e in estimates.items()}
                    for arm, estimates in means.items()
                },
            }
            plots.append(_plot(member, accuracy))
            tables.append(_table(member, means, spreads))
            notes += runs.endings(
                {
                    f"{member.replace('_', ' ')}, {arm}, initial norm {scale:g}": [
                        replace(run, seed=seed) for seed in _seeds(budget, member)
                    ]
                    for arm, at_scales in wanted.items()
                    for scale, run in at_scales.items()
                }
            )
        starts = self._starts(budget)
        tables.append(_starts_table(runs, starts, budget.seeds))
        verdict: Verdict = (
            "reproduced" if all(conditions) else "partly" if any(conditions) else "not reproduced"
        )
        over_time = {
            f"{arm} from {scale:g}": replace(
                self._runs(budget, budget.members[0], arm)[scale], seed=budget.seeds[0]
            )
            for arm in (L2, AWS)
            for scale in (1e-2, 1e2)
        }
        return Finding(
            verdict,
            self._answer(statistics),
            statistics,
            plots,
            tables,
            notes,
            traces=traces(runs, over_time, budget.members[0].replace("_", " ")),
        )

    def _runs(self, budget: Budget, member: str, arm: str) -> dict[float, TrainRun]:
        base = with_arm(replace(budget.training, member=member), arm)
        scales: Sequence[float] = SCALES[budget.name]
        if budget.full and member != budget.members[0]:
            scales = scales[::6]
        elif arm in (EPSILON, EXPLICIT_AWS) or (arm == SPHERE and not budget.full):
            scales = [scale for scale in scales if scale in (scales[0], 1e-3, 1.0, 1e3, scales[-1])]
        return {scale: scaled(base, scale) for scale in scales}

    def _starts(self, budget: Budget) -> dict[str, dict[str, TrainRun]]:
        return {
            start: {
                arm: with_arm(replace(budget.training, initialiser=start), arm) for arm in (NONE, L2, AWS)
            }
            for start in STARTS[budget.name]
        }

    def _answer(self, statistics: dict[str, Any]) -> str:
        sentences = []
        for member, found in statistics.items():
            gains = found["advantage_over_L2"]
            norms = [float(norm) for norm in found["test_accuracy"][AWS]]
            decades = round(math.log10(max(norms) / min(norms)))
            ends = " and ".join(f"{gain['mean']:.1f} points at norm {end}" for end, gain in gains.items())
            spread = found["spread"]
            sentences.append(
                f"With {member.replace('_', ' ')}, over {decades} decades of initial norms test "
                f"accuracy moves by "
                f"{spread[AWS]:.1f} points under AWS and by {spread[L2]:.1f} under L2 with the same pull; "
                f"AWS is ahead of L2 by {ends}."
            )
        return " ".join(sentences)


def _spread(estimates: Sequence[Estimate]) -> float:
    """Largest minus smallest mean, over the scales at which any seed finished."""
    there = [estimate.mean for estimate in estimates if estimate.n]
    return max(there) - min(there)


def _seeds(budget: Budget, member: str) -> tuple[int, ...]:
    """Of members but the first three seeds."""
    return budget.seeds if member == budget.members[0] else budget.seeds[:3]


def _arms(budget: Budget, member: str) -> tuple[str, ...]:
    if budget.full and member != budget.members[0]:
        return tuple(arm for arm in ARMS if arm not in (EPSILON, EXPLICIT_AWS))
    return ARMS


def _plot(member: str, accuracy: dict[str, dict[float, list[float | None]]]) -> Plot:
    # those dashed lie on the curves of L2 and AWS
    series = [Series.over(arm, at, dashed=arm in (EPSILON, EXPLICIT_AWS)) for arm, at in accuracy.items()]
    title = f"Test accuracy by initial norm ({member.replace('_', ' ')})"
    return Plot(title, "norm of every unit at the start", "test accuracy (%)", series, log_x=True)


def _table(member: str, means: dict[str, dict[float, Estimate]], spreads: dict[str, float]) -> Table:
    scales = list(means[AWS])
    rows = []
    for arm, estimates in means.items():
        cells: list[str | None] = []
        for scale in scales:
            estimate = estimates.get(scale)
            cells.append(None if estimate is None else f"{estimate.mean:.1f}" if estimate.n else "refused")
        rows.append([arm, *cells, f"{spreads[arm]:.1f}"])
    columns = ["rule", *(f"{scale:g}" for scale in scales), "spread"]
    return Table(f"Test accuracy (%) by initial norm ({member.replace('_', ' ')})", columns, rows)


def _starts_table(runs: Runs, starts: dict[str, dict[str, TrainRun]], seeds: Sequence[int]) -> Table:
    rows = []
    for start, arms in starts.items():
        values = {arm: runs.points("test_accuracy", run, seeds) for arm, run in arms.items()}
        means = [mean_with_interval(values[arm]) for arm in arms]
        rows.append(
            [
                _START_NAMES.get(start, start),
                *map(str, means),
                str(paired_difference(values[AWS], values[L2])),
            ]
        )
    columns = ["start", *(f"{arm} (%)" for arm in (NONE, L2, AWS)), "AWS − L2 (points)"]
    return Table("Test accuracy from other starts, with 95 % intervals (weight norm)", columns, rows)


CLAIM = Initialization()
