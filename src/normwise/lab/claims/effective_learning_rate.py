"""Claim: decay acts through the effective learning rate and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.engine.run import Run
from normwise.lab.runs.replay import ReplayRun

BAR = 1e-9  # radians
WIDE = 1e-2  # radians: what the naive replay must exceed
CHAOS = 10.0  # times the drift of the twin

ADAM_LR = 0.003
RULES = ("L2, coupled", "L2, explicit", "L2", "AWS", "AdamW: L2, explicit", "AdamW: L2", "AdamW: AWS")


class EffectiveLearningRate(Claim):
    """See the texts."""

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
        "flows, coefficient 3/Σlr; coupled L2 has no replay there. Each against: the "
        "replay, without decay, with the steps of normwise.theory.without_decay; the naive run, without "
        "decay, with the same learning rates; and a twin with decay from a start that differs in one weight "
        "by one unit in the last place, which shows how far rounding alone carries runs apart."
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

    def runs(self, budget: Budget) -> list[Run]:
        """All rules with all seeds."""
        return [replace(run, seed=seed) for run in self._runs(budget).values() for seed in _seeds(budget)]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Take the worst seed of each rule."""
        statistics: dict[str, Any] = {}
        rows: list[list[str | int]] = []
        for name, run in self._runs(budget).items():
            found = [runs[replace(run, seed=seed)] for seed in _seeds(budget)]
            angles = {who: max(s[who]["largest_angle"] for s in found) for who in ("replay", "naive", "twin")}
            least_naive = min(s["naive"]["largest_angle"] for s in found)
            differ = {who: max(s[who]["predictions_that_differ"] for s in found) for who in angles}
            holds = angles["replay"] < BAR and least_naive > WIDE and differ["replay"] == 0
            explained = angles["replay"] <= CHAOS * angles["twin"] and least_naive > WIDE
            statistics[name] = {
                "largest_angle": angles,
                "predictions_that_differ": differ,
                "norms_end_at": found[0]["norm_change"],
                "holds": holds,
                "explained_by_rounding": explained,
            }
            rows.append(
                [
                    name,
                    *(f"{angles[who]:.1e}" for who in ("replay", "twin", "naive")),
                    differ["replay"],
                    differ["naive"],
                    f"{found[0]['norm_change']:.2f}",
                ]
            )
        images = found[0]["test_images"]
        judged = list(statistics.values())
        verdict: Verdict = "not reproduced"
        if all(one["holds"] for one in judged):
            verdict = "reproduced"
        elif any(one["holds"] for one in judged) or all(one["explained_by_rounding"] for one in judged):
            verdict = "partly"
        worst = max(one["largest_angle"]["replay"] for one in judged)
        naive = min(one["largest_angle"]["naive"] for one in judged)
        differing = max(one["predictions_that_differ"]["replay"] for one in judged)
        answer = (
            f"Over {budget.replaying.length} steps the undecayed replays stay within {worst:.0e} rad of the "
            f"decayed runs in every unit, and the final networks disagree on {differing} of {images} test "
            f"images. With the same learning rates instead, directions come apart by {naive:.2g} rad or more."
        )
        columns = ["rule", "replay (rad)", "twin (rad)", "naive (rad)", "replay: answers that differ"]
        columns += ["naive: answers that differ", "norms: end / start"]
        table = Table("Largest angle to the decayed run, over all units, steps and seeds", columns, rows)
        return Finding(
            verdict, answer, statistics, self._plots(budget, runs), [table], traces=self._traces(budget, runs)
        )

    def _plots(self, budget: Budget, runs: Runs) -> list[Plot]:
        series = []
        for name, run in self._runs(budget).items():
            metrics = runs.metrics(replace(run, seed=budget.seeds[0]))
            steps = [line["step"] for line in metrics]
            series.append(Series(f"replay of {name}", steps, [line["replay"] or None for line in metrics]))
            if name == "AWS":
                naive = [line["naive"] or None for line in metrics]
                series.append(Series("naive run, AWS", steps, naive, dashed=True))
                twin = [line["twin"] or None for line in metrics]
                series.append(Series("twin of AWS, one ULP apart", steps, twin, dashed=True))
        title = f"Largest angle between a unit of the decayed run and of the other (seed {budget.seeds[0]})"
        return [Plot(title, "step", "angle (rad)", series, log_y=True)]

    def _traces(self, budget: Budget, runs: Runs) -> list[Plot]:
        norms, rates = [], []
        for name, run in self._runs(budget).items():
            metrics = runs.metrics(replace(run, seed=budget.seeds[0]))
            steps = [line["step"] for line in metrics]
            degree = 1 if run.optimizer == "adam" else 2
            norms.append(Series(name, steps, [line["norm"] for line in metrics]))
            rates.append(Series(name, steps, [line["lr"] / line["norm"] ** degree for line in metrics]))
        seed = f"seed {budget.seeds[0]}"
        return [
            Plot(f"Median norm in the decayed runs ({seed})", "step", "norm", norms),
            Plot(
                f"Effective learning rate of the median norm ({seed})",
                "step",
                "lr/norm² (SGD), lr/norm (Adam)",
                rates,
                log_y=True,
            ),
        ]

    def _runs(self, budget: Budget) -> dict[str, ReplayRun]:
        base = budget.replaying
        aws = nw.AdaptiveWeightShrink.for_budget(base.total_time)
        l2 = nw.theory.match(aws, nw.L2)
        coupled = nw.theory.match(aws, nw.L2, momentum=base.momentum, to_mode="coupled")
        arms: tuple[tuple[nw.Rule, str], ...] = (
            (coupled, "coupled"),
            (l2, "explicit"),
            (l2, "flow"),
            (aws, "flow"),
        )
        sgd = [base.with_rule(*arm) for arm in arms]
        adam = replace(base, optimizer="adam", lr=ADAM_LR)
        aws = nw.AdaptiveWeightShrink.for_budget(adam.total_time)
        l2 = nw.theory.match(aws, nw.L2)
        arms = ((l2, "explicit"), (l2, "flow"), (aws, "flow"))
        return dict(zip(RULES, [*sgd, *(adam.with_rule(*arm) for arm in arms)], strict=True))


def _seeds(budget: Budget) -> tuple[int, ...]:
    """One in the quick budget: float64 takes long, and there is little that varies."""
    return budget.seeds if budget.full else budget.seeds[:1]


CLAIM = EffectiveLearningRate()
