"""Claim: decay has no influence on generalisation beyond the effective learning rate."""

from __future__ import annotations

from dataclasses import replace

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured, in_short
from normwise.lab.claims.conditions import Verdict, all_of, any_of, equivalent, negated, verdict_of
from normwise.lab.claims.effective_learning_rate import EffectiveLearningRate
from normwise.lab.claims.exhibits import Table, dot_plot, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import equivalence, mean_with_interval
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import L2, NONE, scaled, with_arm
from normwise.lab.runs.train import TrainRun

MARGIN = 1.0  # points of test accuracy
START = 10.0  # where decay makes a large difference
SCHEDULED = "sphere with scheduled rate"


class Generalization(Claim):
    """The class attributes are the pre-registration."""

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
        "minus that of L2, paired by seed (6 seeds; full budget 20): two one-sided tests of equivalence "
        f"within ±{MARGIN:g} point, a margin that was fixed beforehand, with the power of the test. (3) The "
        "same for the control minus L2."
    )
    rule = (
        "Reproduced: no test image is answered differently by any replay; for every member the 90 % interval "
        "of sphere minus L2 lies within the margin, and that of the control outside it. Partly: the replays "
        "answer alike, and the rest holds for some member. Undecided: where an interval reaches over an end "
        "of the margin and that matters. Not reproduced: otherwise."
    )

    def runs(self) -> list[Run]:
        """The replays, and L2 and no decay for all members."""
        wanted = [self._settings(member, arm) for member in self.budget.members for arm in (L2, NONE)]
        return EffectiveLearningRate(self.budget).runs() + over_seeds(wanted, self.budget.many_seeds)

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The spheres, whose rates follow from the norms of the L2 runs."""
        return over_seeds(
            (self._scheduled(runs, member) for member in self.budget.members), self.budget.many_seeds
        )

    def second_cost(self) -> float:
        """The spheres."""
        return len(self.budget.members) * len(self.budget.many_seeds) * self.budget.training.cost

    def measure(self, runs: FinishedRuns) -> Measured:
        """Count the answers that differ, and test for equivalence."""
        replays = [runs[run]["replay"] for run in EffectiveLearningRate(self.budget).runs()]
        differ = max(replay["predictions_that_differ"] for replay in replays)
        measured = Measured({"replays": {"predictions_that_differ": differ, "of": len(replays)}})
        for member in self.budget.members:
            arms = {
                L2: self._settings(member, L2),
                SCHEDULED: self._scheduled(runs, member),
                NONE: self._settings(member, NONE),
            }
            accuracy = runs.accuracy(arms, self.budget.many_seeds)
            measured.statistics[member] = {
                "sphere_minus_L2": equivalence(accuracy[SCHEDULED], accuracy[L2], MARGIN),
                "control_minus_L2": equivalence(accuracy[NONE], accuracy[L2], MARGIN),
                "test_accuracy": {arm: mean_with_interval(values) for arm, values in accuracy.items()},
            }
            measured.details[member] = accuracy
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """The replays answer alike, and the tests show equivalence or leave it undecided."""
        alike = measured.statistics["replays"]["predictions_that_differ"] == 0
        shown = []
        for member in self.budget.members:
            found = measured.statistics[member]
            noticed = negated(equivalent(found["control_minus_L2"]))
            shown.append(all_of([equivalent(found["sphere_minus_L2"]), noticed]))
        return verdict_of(all_of([alike, *shown]), all_of([alike, any_of(shown)]))

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        found = {m: measured.statistics[m]["sphere_minus_L2"].difference for m in self.budget.members}
        return f"{in_short(found, '+.2f')} (90 %) points at equal rates"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show accuracy by seed, and the tests."""
        labels = {L2: "L2", SCHEDULED: "sphere, same effective learning rate", NONE: "no decay (control)"}
        seeds = self.budget.many_seeds
        rows, plots, differences = [], [], []
        for member in self.budget.members:
            statistics = measured.statistics[member]
            same, control = statistics["sphere_minus_L2"], statistics["control_minus_L2"]
            rows.append(
                [
                    family(member),
                    *(str(statistics["test_accuracy"][arm]) for arm in labels),
                    f"{same.difference:+.2f}",
                    "yes" if same.shown else "not shown",
                    f"{100 * same.power:.0f} %",
                    f"{control.difference:+.2f}",
                ]
            )
            title = f"Test accuracy at matched and at other effective learning rates ({family(member)})"
            tested = {"sphere − L2": same.difference, "no decay − L2": control.difference}
            plots.append(dot_plot(title, f"points; the margin is ±{MARGIN:g}", tested, level="90 %"))
            differences.append(
                f"with {family(member)} {same.difference.mean:+.2f} points [{same.difference.low:+.2f}, "
                f"{same.difference.high:+.2f}] (90 %), where other effective learning rates "
                f"make {control.difference:+.1f} (90 %)"
            )
        differ = measured.statistics["replays"]["predictions_that_differ"]
        replays = "answer every test image alike" if differ == 0 else f"differ on up to {differ} test images"
        answer = (
            f"Undecayed replays {replays}. A sphere with the effective learning rates of L2, over "
            f"{len(seeds)} seeds, differs in test accuracy by: {'; '.join(differences)}."
        )
        columns = ["member", "L2 (%)", "sphere (%)", "no decay (%)", "sphere − L2, 90 % interval"]
        columns += ["equivalent", "power", "control − L2, 90 % interval"]
        table = Table("Test accuracy at matched effective learning rates", columns, rows)
        traced = {
            L2: replace(self._settings(self.first, L2), seed=self.budget.seeds[0]),
            SCHEDULED: replace(self._scheduled(runs, self.first), seed=self.budget.seeds[0]),
        }
        return Exhibits(answer, plots, [table], traces=layer_curves(runs, traced, family(self.first)))

    def _settings(self, member: str, arm: str) -> TrainRun:
        return scaled(with_arm(replace(self.budget.training, member=member), arm), START)

    def _scheduled(self, runs: FinishedRuns, member: str) -> TrainRun:
        """Return the sphere whose layers have the effective learning rates of the L2 runs."""
        decayed = self._settings(member, L2)
        by_seed = [runs.metrics(run) for run in over_seeds([decayed], self.budget.many_seeds)]
        rates = []
        for layer in by_seed[0][0]["layers"]:
            means = [
                sum(float(line["layers"][layer]["effective_lr"]) / float(line["lr"]) for line in lines)
                / len(lines)
                for lines in zip(*by_seed, strict=True)
            ]
            start = 1 / decayed.init_scale**2
            rates.append(tuple(float(f"{value:.4g}") for value in (start, *means)))
        sphere = scaled(decayed, 1.0).with_rule(nw.Sphere(1.0))
        return replace(sphere, relative_lr=tuple(rates))


CLAIM = Generalization
