"""Claim: decay has no influence on generalisation beyond the effective learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.effective_learning_rate import CLAIM as REPLAYS
from normwise.lab.claims.statistics import Equivalence, equivalence, mean_with_interval
from normwise.lab.claims.traces import traces
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import L2, NONE, scaled, with_arm
from normwise.lab.runs.train import TrainRun

MARGIN = 1.0  # points of test accuracy
START = 10.0  # where decay makes a large difference
SCHEDULED = "sphere with scheduled rate"


class Generalization(Claim):
    """See the texts."""

    id = "generalization"
    order = 4
    title = "Generalisation beyond the effective learning rate"
    source = (
        "Li, Chen & Yang, AAAI 2020: the regulariser has no influence of its own on generalisation; it helps "
        "only by modulating the effective learning rate."
    )
    question = (
        "Does a network that was trained with decay generalise better than one that was trained at the same "
        "effective learning rates by other means?"
    )
    arms = (
        "(1) The replays of the claim effective-learning-rate. (2) L2 (pull 3/Σlr) from units of norm 10, "
        "where decay matters much, against a sphere: units that are kept at norm 1, whose layers have, at "
        "each time of training, the mean of lr/‖w‖² that the L2 runs had (their mean over seeds, known from "
        "40 points in time, interpolated). No decay, and norms that never change; only the effective "
        "learning rate is the same. (3) As a control, no decay from norm 10 at the same learning rates, "
        "whose effective learning rate is another: the test must notice that."
    )
    statistic = (
        "(1) The number of test images that a replay answers differently. (2) Test accuracy of the sphere "
        "minus that of L2, paired by seed (8 seeds; full budget 20): two one-sided tests of equivalence "
        f"within ±{MARGIN:g} point, a margin that was fixed beforehand, with the power of the test. "
        "(3) The same for the control minus L2."
    )
    rule = (
        "Reproduced: no test image is answered differently by any replay; for every member the sphere is "
        "equivalent to L2 within the margin, and the control is not. Partly: the replays answer alike, and "
        "the rest holds for some member or is undecided (the 90 % interval reaches over the margin but "
        "contains 0). Not reproduced: otherwise."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """The replays, and L2 and no decay for all members."""
        runs: list[Run] = [
            replace(self._run(budget, member, arm), seed=seed)
            for member in budget.members
            for arm in (L2, NONE)
            for seed in budget.many_seeds
        ]
        return REPLAYS.runs(budget) + runs

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """The spheres, whose rates follow from the norms of the L2 runs."""
        return [
            replace(self._scheduled(budget, runs, member), seed=seed)
            for member in budget.members
            for seed in budget.many_seeds
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Count the answers that differ, and test for equivalence."""
        replays = [runs[run] for run in REPLAYS.runs(budget)]
        differ = max(found["replay"]["predictions_that_differ"] for found in replays)
        statistics: dict[str, Any] = {"replays": {"predictions_that_differ": differ, "of": len(replays)}}
        rows: list[list[str]] = []
        plots: list[Plot] = []
        shown, undecided = [], []
        for member in budget.members:
            arms = {
                L2: self._run(budget, member, L2),
                SCHEDULED: self._scheduled(budget, runs, member),
                NONE: self._run(budget, member, NONE),
            }
            accuracy = {
                arm: runs.points("test_accuracy", run, budget.many_seeds) for arm, run in arms.items()
            }
            tests = {arm: equivalence(accuracy[arm], accuracy[L2], MARGIN) for arm in (SCHEDULED, NONE)}
            same, control = tests[SCHEDULED], tests[NONE]
            shown.append(same.shown and not control.shown)
            undecided.append(_contains_zero(same) and not control.shown)
            statistics[member] = {
                "sphere_minus_L2": same.as_dict(),
                "control_minus_L2": control.as_dict(),
                "test_accuracy": {a: mean_with_interval(v).as_dict() for a, v in accuracy.items()},
            }
            rows.append(_row(member, accuracy, same, control))
            plots.append(_plot(member.replace("_", " "), accuracy, budget.many_seeds))
        verdict: Verdict = "not reproduced"
        if differ == 0 and all(shown):
            verdict = "reproduced"
        elif differ == 0 and (any(shown) or all(undecided)):
            verdict = "partly"
        first = budget.members[0]
        over_time = {L2: self._run(budget, first, L2), SCHEDULED: self._scheduled(budget, runs, first)}
        columns = ["member", "L2 (%)", "sphere (%)", "no decay (%)", "sphere − L2, 90 % interval"]
        columns += ["equivalent", "power", "control − L2, 90 % interval"]
        return Finding(
            verdict,
            _answer(statistics, budget),
            statistics,
            plots,
            [Table("Test accuracy at matched effective learning rates", columns, rows)],
            traces=traces(
                runs,
                {arm: replace(run, seed=budget.seeds[0]) for arm, run in over_time.items()},
                first.replace("_", " "),
            ),
        )

    def _run(self, budget: Budget, member: str, arm: str) -> TrainRun:
        return scaled(with_arm(replace(budget.training, member=member), arm), START)

    def _scheduled(self, budget: Budget, runs: Runs, member: str) -> TrainRun:
        """Return the sphere whose layers have the effective learning rates of the L2 runs."""
        decayed = self._run(budget, member, L2)
        courses = [runs.metrics(replace(decayed, seed=seed)) for seed in budget.many_seeds]
        rates = []
        for layer in courses[0][0]["layers"]:
            means = [
                sum(float(line["layers"][layer]["effective_lr"]) / float(line["lr"]) for line in lines)
                / len(lines)
                for lines in zip(*courses, strict=True)
            ]
            start = 1 / decayed.init_scale**2
            rates.append(tuple(float(f"{value:.4g}") for value in (start, *means)))
        sphere = scaled(decayed, 1.0).with_rule(nw.Sphere(1.0))
        return replace(sphere, relative_lr=tuple(rates))


def _contains_zero(test: Equivalence) -> bool:
    return test.shown or test.difference.low <= 0 <= test.difference.high


def _row(
    member: str, accuracy: dict[str, list[float | None]], same: Equivalence, control: Equivalence
) -> list[str]:
    means = [mean_with_interval(accuracy[arm]).short for arm in (L2, SCHEDULED, NONE)]
    equivalent = "yes" if same.shown else "not shown"
    return [
        member.replace("_", " "),
        *means,
        _fine(same),
        equivalent,
        f"{100 * same.power:.0f} %",
        _fine(control),
    ]


def _fine(test: Equivalence) -> str:
    difference = test.difference
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _plot(family: str, accuracy: dict[str, list[float | None]], seeds: Sequence[int]) -> Plot:
    labels = {L2: "L2", SCHEDULED: "sphere, same effective learning rate", NONE: "no decay (control)"}
    series = [
        Series(label, list(seeds), accuracy[arm], dashed=arm == SCHEDULED) for arm, label in labels.items()
    ]
    return Plot(f"Test accuracy by seed ({family})", "seed", "test accuracy (%)", series)


def _answer(statistics: dict[str, Any], budget: Budget) -> str:
    differ = statistics["replays"]["predictions_that_differ"]
    parts = []
    for member in budget.members:
        found = statistics[member]["sphere_minus_L2"]
        difference, control = found["difference"], statistics[member]["control_minus_L2"]["difference"]
        parts.append(
            f"with {member.replace('_', ' ')} {difference['mean']:+.2f} points "
            f"[{difference['low_90']:+.2f}, {difference['high_90']:+.2f}], where other effective learning "
            f"rates cost {-control['mean']:.1f}"
        )
    replays = "answer every test image alike" if differ == 0 else f"differ on up to {differ} test images"
    return (
        f"Undecayed replays {replays}. A sphere with the effective learning rates of L2, over "
        f"{len(budget.many_seeds)} seeds, differs in test accuracy by: {'; '.join(parts)}."
    )


CLAIM = Generalization()
