"""Claim: L2 makes training sensitive to the initial norm, and AWS does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from normwise.lab.arms import ARMS, AWS, EPSILON, EXPLICIT_AWS, L2, scaled, with_arm
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.settings import Settings, TrainSettings
from normwise.lab.statistics import Estimate, mean_with_interval, paired_difference

SCALES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
FLAT = 2.0  # points of accuracy: as flat as a prototype with another network was
LOSS = 3.0  # points: five standard errors of one test accuracy


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
        "1000; the head is plain and is never decayed. SGD with momentum 0.9 and a cosine from 0.1."
    )
    statistic = (
        "Test accuracy in points, paired by seed. The spread of an arm: the largest minus the smallest mean "
        "over the initial norms. The advantage at an end (0.001 or 1000): AWS minus L2, with a 95 % interval "
        "by Student's t over the seeds."
    )
    rule = (
        f"Reproduced: for every member of the family, the spread of AWS is at most {FLAT:g} points, and at "
        f"one end or more its advantage over L2 is at least {LOSS:g} points with an interval above 0. "
        "Partly: one of the two holds for some member. Not reproduced: neither holds for any."
    )

    def runs(self, budget: Budget) -> list[Settings]:
        """All arms at all scales, for all members and seeds."""
        return [
            replace(run, seed=seed)
            for member in budget.members
            for arm in ARMS
            for run in self._runs(budget, member, arm)
            for seed in budget.seeds
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare the spreads, and AWS with L2 at the ends."""
        plots, tables, notes, conditions = [], [], [], []
        statistics: dict[str, Any] = {}
        for member in budget.members:
            accuracy = {
                arm: [
                    [None if value is None else 100 * value for value in values]
                    for values in (
                        runs.values("test_accuracy", run, budget.seeds)
                        for run in self._runs(budget, member, arm)
                    )
                ]
                for arm in ARMS
            }
            means = {arm: [mean_with_interval(values) for values in accuracy[arm]] for arm in ARMS}
            spreads = {arm: _spread(estimates) for arm, estimates in means.items()}
            advantage = {
                f"{SCALES[k]:g}": paired_difference(accuracy[AWS][k], accuracy[L2][k]) for k in (0, -1)
            }
            conditions += [
                spreads[AWS] <= FLAT,
                any(gain.mean >= LOSS and gain.low > 0 for gain in advantage.values()),
            ]
            statistics[member] = {
                "spread": {arm: round(spread, 2) for arm, spread in spreads.items()},
                "advantage_over_L2": {end: gain.as_dict() for end, gain in advantage.items()},
            }
            plots.append(_plot(member, means))
            tables.append(_table(member, means, spreads))
            notes += _failures(member, runs, {a: self._runs(budget, member, a) for a in ARMS}, budget.seeds)
        verdict: Verdict = (
            "reproduced" if all(conditions) else "partly" if any(conditions) else "not reproduced"
        )
        return Finding(verdict, self._answer(statistics), statistics, plots, tables, notes)

    def _runs(self, budget: Budget, member: str, arm: str) -> list[TrainSettings]:
        base = with_arm(replace(budget.training, member=member), arm)
        return [scaled(base, scale) for scale in SCALES]

    def _answer(self, statistics: dict[str, Any]) -> str:
        sentences = []
        for member, found in statistics.items():
            gains = found["advantage_over_L2"]
            ends = " and ".join(f"{gain['mean']:.1f} points at norm {end}" for end, gain in gains.items())
            spread = found["spread"]
            sentences.append(
                f"With {member.replace('_', ' ')}, over six decades of initial norms test accuracy moves by "
                f"{spread[AWS]:.1f} points under AWS and by {spread[L2]:.1f} under L2 with the same pull; "
                f"AWS is ahead of L2 by {ends}."
            )
        return " ".join(sentences)


def _spread(estimates: Sequence[Estimate]) -> float:
    """Largest minus smallest mean, over the scales at which any seed finished."""
    there = [estimate.mean for estimate in estimates if estimate.n]
    return max(there) - min(there)


def _plot(member: str, means: dict[str, list[Estimate]]) -> Plot:
    series = [
        Series(
            arm,
            SCALES,
            [e.mean if e.n else None for e in estimates],
            [e.low if e.n > 1 else None for e in estimates],
            [e.high if e.n > 1 else None for e in estimates],
            dashed=arm in (EPSILON, EXPLICIT_AWS),  # which lie on the curves of L2 and AWS
        )
        for arm, estimates in means.items()
    ]
    title = f"Test accuracy by initial norm ({member.replace('_', ' ')})"
    return Plot(title, "norm of every unit at the start", "test accuracy (%)", series, log_x=True)


def _table(member: str, means: dict[str, list[Estimate]], spreads: dict[str, float]) -> Table:
    rows = [
        [arm, *(f"{e.mean:.1f}" if e.n else "refused" for e in means[arm]), f"{spreads[arm]:.1f}"]
        for arm in means
    ]
    columns = ["rule", *(f"{scale:g}" for scale in SCALES), "spread"]
    return Table(f"Test accuracy (%) by initial norm ({member.replace('_', ' ')})", columns, rows)


def _failures(
    member: str, runs: Runs, wanted: dict[str, list[TrainSettings]], seeds: Sequence[int]
) -> list[str]:
    """Say which runs did not finish, where, and why: one note for each arm and scale."""
    notes = []
    for arm, at_scales in wanted.items():
        for run in at_scales:
            failed = [
                s for s in (runs[replace(run, seed=seed)] for seed in seeds) if s["status"] != "finished"
            ]
            if failed:
                notes.append(
                    f"{member.replace('_', ' ')}, {arm}, initial norm {run.init_scale:g}: {len(failed)} of "
                    f"{len(seeds)} runs ended at step {failed[0]['step']} ({failed[0]['status']}): "
                    f"{failed[0]['reason']}"
                )
    return notes


CLAIM = Initialization()
