"""Claim: decay acts through the effective learning rate and nothing else."""

from __future__ import annotations

from dataclasses import replace

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.engine.run import Run
from normwise.lab.runs.replay import ReplayRun

BAR = 1e-9  # radians
WIDE = 1e-2  # radians: the naive run must exceed this
CHAOS = 10.0  # times the drift of the twin

ADAM_LR = 0.003
RULES = ("L2, coupled", "L2, explicit", "L2", "AWS", "AdamW: L2, explicit", "AdamW: L2", "AdamW: AWS")


class EffectiveLearningRate(Claim):
    """The class attributes are the pre-registration."""

    id = "effective-learning-rate"
    order = 3
    title = "Decay is a schedule of the effective learning rate"
    source = (
        "Li, Chen & Yang, AAAI 2020: the L2 regulariser helps only because it modulates the effective "
        "learning rate η/‖W‖²."
    )
    question = (
        "Can a run with decay be repeated without any decay, only with other step sizes, so that all weights "
        "point in the same directions at every step and the final networks answer alike?"
    )
    arms = (
        "Decayed runs of 300 steps in float64 (SGD, momentum 0.9, cosine from 0.1, batches of 50 from 1000 "
        "images, weight norm and batch norm, units of norm 1): L2 coupled as in torch.optim, explicit as in "
        "AdamW, L2 and AWS by their flows; coefficient 3/Σlr (coupled: times 1 − 0.9). And under Adam (β 0.9 "
        f"and 0.999, cosine from {ADAM_LR:g}): L2 explicit, which is AdamW's own decay, L2 and AWS by their "
        "flows, coefficient 3/Σlr; coupled L2 has no replay there. Each against: the replay, without decay, "
        "with the steps of normwise.theory.without_decay; the naive run, without decay, with the same "
        "learning rates; and a twin with decay from a start that differs in one weight by one unit in the "
        "last place, which shows how far rounding alone carries runs apart."
    )
    statistic = (
        "The largest angle, over all units, steps and seeds, between the decayed run and the other, in "
        "radians; and the number of test images on which the final networks disagree."
    )
    rule = (
        f"Reproduced: for every rule and seed the angle of the replay is below {BAR:g}, that of the naive "
        f"run above {WIDE:g}, and no test image is answered differently. Partly: this holds for some rules, "
        f"or a larger angle is at most {CHAOS:g} times that of the twin. Not reproduced: otherwise."
    )

    def runs(self) -> list[Run]:
        """All rules with all seeds."""
        return over_seeds(self._settings().values(), self._seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Take the worst seed of each rule."""
        statistics = {}
        for name, run in self._settings().items():
            found = runs.summaries(run, self._seeds)
            angles, differ = (
                {other: max(seed[other][key] for seed in found) for other in ("replay", "naive", "twin")}
                for key in ("largest_angle", "predictions_that_differ")
            )
            apart = min(seed["naive"]["largest_angle"] for seed in found) > WIDE
            statistics[name] = {
                "largest_angle": angles,
                "predictions_that_differ": differ,
                "norms_end_at": found[0]["norm_change"],
                "holds": angles["replay"] < BAR and apart and differ["replay"] == 0,
                "explained_by_rounding": angles["replay"] <= CHAOS * angles["twin"] and apart,
            }
        return Measured(statistics, {"test_images": found[0]["test_images"]})

    def judge(self, measured: Measured) -> Verdict:
        """All replays hold; or some hold, or all differences are explained by rounding."""
        holds, explained = (
            [found[key] for found in measured.statistics.values()]
            for key in ("holds", "explained_by_rounding")
        )
        return verdict_of(all(holds), any(holds) or all(explained))

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        worst = max(found["largest_angle"]["replay"] for found in measured.statistics.values())
        differ = max(found["predictions_that_differ"]["replay"] for found in measured.statistics.values())
        return f"undecayed replays within {worst:.0e} rad; {differ} answers differ"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the angles over time and at their largest."""
        rows: list[list[str | int]] = []
        for name, found in measured.statistics.items():
            angles, differ = found["largest_angle"], found["predictions_that_differ"]
            rows.append(
                [
                    name,
                    *(f"{angles[other]:.1e}" for other in ("replay", "twin", "naive")),
                    differ["replay"],
                    differ["naive"],
                    f"{found['norms_end_at']:.2f}",
                ]
            )
        columns = ["rule", "replay (rad)", "twin (rad)", "naive (rad)", "replay: answers that differ"]
        columns += ["naive: answers that differ", "norms: end / start"]
        table = Table("Largest angle to the decayed run, over all units, steps and seeds", columns, rows)
        rules = measured.statistics.values()
        worst = max(found["largest_angle"]["replay"] for found in rules)
        naive = min(found["largest_angle"]["naive"] for found in rules)
        differing = max(found["predictions_that_differ"]["replay"] for found in rules)
        answer = (
            f"Over {self.budget.replaying.length} steps the undecayed replays stay within {worst:.0e} rad of "
            f"the decayed runs in every unit, and the final networks disagree on {differing} of "
            f"{measured.details['test_images']} test images. With the same learning rates instead, "
            f"directions come apart by {naive:.2g} rad or more."
        )
        angles_over_time, *traces = self._curves(runs)
        return Exhibits(answer, [angles_over_time], [table], traces=traces)

    def _curves(self, runs: FinishedRuns) -> tuple[Plot, Plot, Plot]:
        """Return the angles, the norms and the effective learning rates over the steps of the first seed."""
        angles, norms, rates = [], [], []
        for name, run in self._settings().items():
            metrics = runs.metrics(replace(run, seed=self.budget.seeds[0]))
            angles.append(Series.over_steps(f"replay of {name}", metrics, "replay"))
            if name == "AWS":
                angles.append(Series.over_steps("naive run, AWS", metrics, "naive", dashed=True))
                angles.append(Series.over_steps("twin of AWS, one ULP apart", metrics, "twin", dashed=True))
            norms.append(Series.over_steps(name, metrics, "norm"))
            degree = 1 if run.optimizer == "adam" else 2
            effective = [line["lr"] / line["norm"] ** degree for line in metrics]
            rates.append(Series(name, norms[-1].x, effective))
        seed = f"(seed {self.budget.seeds[0]})"
        largest = "Largest angle between a unit of the decayed run and of the other"
        effective_title = f"Effective learning rate of the median norm {seed}"
        return (
            Plot(f"{largest} {seed}", "step", "angle (rad)", angles, log_y=True),
            Plot(f"Median norm in the decayed runs {seed}", "step", "norm", norms),
            Plot(effective_title, "step", "lr/norm² (SGD), lr/norm (Adam)", rates, log_y=True),
        )

    @property
    def _seeds(self) -> tuple[int, ...]:
        """One in the quick budget: float64 takes long, and little varies with the seed."""
        return self.budget.seeds if self.budget.full else self.budget.seeds[:1]

    def _settings(self) -> dict[str, ReplayRun]:
        sgd = self.budget.replaying
        adam = replace(sgd, optimizer="adam", lr=ADAM_LR)
        settings = []
        for base in (sgd, adam):
            aws = nw.AdaptiveWeightShrink.for_budget(base.total_time)
            l2 = nw.theory.match(aws, nw.L2)
            if base is sgd:
                coupled = nw.theory.match(aws, nw.L2, momentum=base.momentum, to_mode="coupled")
                settings.append(base.with_rule(coupled, "coupled"))
            settings += [base.with_rule(l2, "explicit"), base.with_rule(l2), base.with_rule(aws)]
        return dict(zip(RULES, settings, strict=True))


CLAIM = EffectiveLearningRate
