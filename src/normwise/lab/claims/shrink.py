"""Claim: AWS trains better than the other rules, each tuned with the same budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.tuning import chosen, scores
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, NONE, scaled, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.train import TrainRun, peer_is_installed

MULTIPLES = tuple(10 ** (k / 2) for k in range(-2, 3))
RATES = {"quick": (0.1,), "full": (0.05, 0.1, 0.2)}
SEEDS = {"quick": 5, "full": 10}
NEAR = 1.0  # points

COUPLED = "L2, coupled (weight_decay of torch)"
DECOUPLED = "L2, decoupled (as AdamW)"
CORRECTED = "L2, decoupled and corrected (AdamC)"
PUBLISHED = "ε-shifted L2, as published"
SPHERE = "sphere"
PEER = "SGDP (pytorch_optimizer)"
FREE = "AWS, nothing tuned"

# The readings of "a dynamic coefficient proportional to the magnitude of the parameter".
READINGS = (AWS, "AWS on the norm of the whole tensor", "square of the norm", "AWS without learning rate")
READING_SCALES = (1e-3, 1.0, 1e3)


class ShrinkClaim(Claim):
    """See the texts."""

    id = "shrink"
    order = 10
    title = "AWS against other rules, each tuned"
    source = "Li, Chen & Yang, AAAI 2020: Adaptive Weight Shrink trains better than L2 and more stably."
    question = (
        "When every rule is tuned with the same budget, is Adaptive Weight Shrink better than the others in "
        "test accuracy? And which reading of the paper's words does best?"
    )
    arms = (
        "No decay; L2 coupled, as torch's weight_decay; L2 decoupled, as AdamW; the same with Defazio's "
        "corrected clock; the ε-shift as its authors published it; a sphere; SGDP of an installed peer "
        "package; AWS; and AWS with for_budget and nothing tuned. Each but the last is tuned over five "
        "coefficients (0.1 to 10 times the matched one; radii for the sphere; for no decay five learning "
        "rates), in the full budget times three learning rates, by accuracy on validation images with other "
        "seeds. Units start at norm 1, SGD with momentum 0.9 and a cosine, half of the images. Ablation: "
        "readings of AWS, tuned at norm 1, tested from the norms 0.001, 1 and 1000."
    )
    statistic = (
        "Test accuracy at the chosen settings, once, with 5 seeds (full budget 10): AWS minus each other "
        "arm, paired, with a 95 % interval by Student's t. Reported beside it: test loss, the mean of "
        "validation accuracy over the tuned coefficients below the best (sensitivity), and the time of a run."
    )
    rule = (
        "Reproduced: for every member AWS is ahead of every other tuned arm, each interval above 0. Partly: "
        f"for every member AWS is ahead of no decay (interval above 0) and not more than {NEAR:g} point "
        f"behind coupled L2 (interval above −{NEAR:g}). Not reproduced: otherwise."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """All candidates with the seeds of tuning, and what has nothing to tune."""
        runs: list[Run] = []
        for member in budget.members:
            tuned = [run for arm in _tuned_arms() for run in self._candidates(budget, member, arm).values()]
            runs += [replace(run, seed=seed) for run in tuned for seed in budget.tuning_seeds]
            runs += [replace(self._free(budget, member), seed=seed) for seed in _seeds(budget)]
        readings = [run for name in READINGS for run in self._reading(budget, name).values()]
        return runs + [replace(run, seed=seed) for run in readings for seed in budget.tuning_seeds]

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """What was chosen, with the seeds of the comparison."""
        compared = [run for member in budget.members for run in self._compared(budget, runs, member).values()]
        wanted: list[Run] = [replace(run, seed=seed) for run in compared for seed in _seeds(budget)]
        for name in READINGS:
            wanted += [
                replace(scaled(self._chosen_reading(budget, runs, name), scale), seed=seed)
                for scale in READING_SCALES
                for seed in budget.seeds
            ]
        return wanted

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare AWS with every other arm."""
        statistics: dict[str, Any] = {}
        tables, series = [], []
        ahead, near = [], []
        for k, member in enumerate(budget.members):
            compared = self._compared(budget, runs, member)
            accuracy = {arm: runs.points("test_accuracy", r, _seeds(budget)) for arm, r in compared.items()}
            gains = {
                arm: paired_difference(accuracy[AWS], values)
                for arm, values in accuracy.items()
                if arm != AWS
            }
            ahead.append(all(gain.low > 0 for arm, gain in gains.items() if arm != FREE))
            near.append(gains[NONE].low > 0 and gains[COUPLED].low > -NEAR)
            statistics[member] = {
                "test_accuracy": {arm: mean_with_interval(v).as_dict() for arm, v in accuracy.items()},
                "AWS_minus": {arm: gain.as_dict() for arm, gain in gains.items()},
                "chosen": {arm: _words(run) for arm, run in compared.items()},
            }
            tables.append(self._table(budget, runs, member, compared, accuracy))
            series.append(
                Series(
                    member.replace("_", " "),
                    list(range(1, len(gains) + 1)),
                    [gain.mean for gain in gains.values()],
                    [gain.low for gain in gains.values()],
                    [gain.high for gain in gains.values()],
                    color=k,
                )
            )
        names = [arm for arm in self._compared(budget, runs, budget.members[0]) if arm != AWS]
        numbered = "; ".join(f"{k}: {name}" for k, name in enumerate(names, start=1))
        plot = Plot("Test accuracy of AWS minus that of each other arm", numbered, "points", series)
        table, readings = self._ablation(budget, runs)
        statistics["readings"] = readings
        verdict: Verdict = "reproduced" if all(ahead) else "partly" if all(near) else "not reproduced"
        notes = [] if peer_is_installed() else [f"{PEER} was left out: pip install normwise[peers]"]
        return Finding(verdict, _answer(statistics, budget), statistics, [plot], [*tables, table], notes)

    def _candidates(self, budget: Budget, member: str, arm: str) -> dict[str, TrainRun]:
        """Return the settings that an arm is tuned over: the same number for every arm."""
        base = replace(budget.small, member=member)
        rates = RATES[budget.name]
        if arm == NONE:
            count = len(rates) * len(MULTIPLES)
            runs = [
                replace(base, lr=0.1 * 2 ** ((k - count // 2) / (2 if budget.full else 1)))
                for k in range(count)
            ]
        else:
            runs = [_arm(replace(base, lr=lr), arm, m) for lr in rates for m in MULTIPLES]
        return {_words(run): run for run in runs}

    def _compared(self, budget: Budget, runs: Runs, member: str) -> dict[str, TrainRun]:
        found = {}
        for arm in _tuned_arms():
            candidates = self._candidates(budget, member, arm)
            found[arm] = candidates[chosen(runs, candidates, budget.tuning_seeds)]
        return found | {FREE: self._free(budget, member)}

    def _free(self, budget: Budget, member: str) -> TrainRun:
        return with_arm(replace(budget.small, member=member), AWS)

    def _reading(self, budget: Budget, name: str) -> dict[float, TrainRun]:
        base = with_arm(replace(budget.small, member=budget.members[0]), AWS)
        return {m: _read(base, name, m) for m in MULTIPLES}

    def _chosen_reading(self, budget: Budget, runs: Runs, name: str) -> TrainRun:
        candidates = self._reading(budget, name)
        return candidates[chosen(runs, candidates, budget.tuning_seeds)]

    def _table(
        self,
        budget: Budget,
        runs: Runs,
        member: str,
        compared: dict[str, TrainRun],
        accuracy: dict[str, list[float | None]],
    ) -> Table:
        rows = []
        for arm, run in compared.items():
            losses = mean_with_interval(runs.values("test_loss", run, _seeds(budget)))
            seconds = mean_with_interval(runs.values("seconds", run, _seeds(budget)))
            if arm == FREE:
                sensitivity = None
            else:
                candidates = self._candidates(budget, member, arm)
                means = [100 * (v or 0.0) for v in scores(runs, candidates, budget.tuning_seeds).values()]
                sensitivity = f"{max(means) - sum(means) / len(means):.1f}"
            difference = "–" if arm == AWS else str(paired_difference(accuracy[AWS], accuracy[arm]))
            row = [arm, str(mean_with_interval(accuracy[arm])), difference, f"{losses.mean:.3f}"]
            rows.append([*row, sensitivity, _words(run), f"{seconds.mean:.1f}"])
        columns = ["rule", "test accuracy (%)", "AWS minus it (points)", "test loss"]
        columns += ["lost over the grid (points)", "chosen", "seconds a run, this time"]
        family = member.replace("_", " ")
        return Table(f"Each rule at its best, {len(_seeds(budget))} seeds ({family})", columns, rows)

    def _ablation(self, budget: Budget, runs: Runs) -> tuple[Table, dict[str, Any]]:
        rows, found = [], {}
        for name in READINGS:
            run = self._chosen_reading(budget, runs, name)
            at = {
                scale: mean_with_interval(runs.points("test_accuracy", scaled(run, scale), budget.seeds))
                for scale in READING_SCALES
            }
            found[name] = {f"norm {scale:g}": estimate.as_dict() for scale, estimate in at.items()}
            rows.append([name, *map(str, at.values()), _words(run)])
        columns = ["reading", *(f"norm {scale:g}" for scale in READING_SCALES), "chosen"]
        title = (
            f"Test accuracy (%) of readings of AWS by initial norm ({budget.members[0].replace('_', ' ')})"
        )
        return Table(title, columns, rows), found


def _seeds(budget: Budget) -> tuple[int, ...]:
    return tuple(range(max(SEEDS[budget.name], len(budget.seeds))))


def _tuned_arms() -> tuple[str, ...]:
    peers = (PEER,) if peer_is_installed() else ()
    return (NONE, COUPLED, DECOUPLED, CORRECTED, PUBLISHED, SPHERE, *peers, AWS)


def _arm(base: TrainRun, arm: str, multiple: float) -> TrainRun:
    """Return the run under an arm, with so many times the pull that AWS has by ``for_budget`` at norm 1."""
    pull = 3.0 / base.total_time * multiple
    coupled = pull * (1 - base.momentum)
    if arm == AWS:
        return base.with_rule(nw.AdaptiveWeightShrink(pull))
    if arm == COUPLED:
        return base.with_rule(nw.L2(coupled), mode="coupled")
    if arm == DECOUPLED:
        return base.with_rule(nw.L2(pull), mode="explicit")
    if arm == CORRECTED:
        return replace(base.with_rule(nw.L2(pull), mode="explicit"), clock="lr^2/max_lr")
    if arm == PUBLISHED:
        return base.with_rule(nw.PublishedEpsilonShift(coupled), mode="coupled")
    if arm == SPHERE:  # at the radius that has the effective learning rate of the equilibrium
        radius = float(multiple**-0.25)
        return scaled(base.with_rule(nw.Sphere(radius)), radius)
    if arm == PEER:
        return replace(base, optimizer="sgdp", weight_decay=coupled)
    raise ValueError(f"arm {arm!r} is not known: choose from {', '.join(_tuned_arms())}")


def _read(base: TrainRun, name: str, multiple: float) -> TrainRun:
    """Return AWS in another reading, with the same pull at the start of a run from norm 1."""
    rule = rule_from(base.rule)
    assert isinstance(rule, nw.AdaptiveWeightShrink)
    pull = rule.strength * multiple
    if name == READINGS[1]:  # the middle layer has 2·width units
        tensor = nw.AdaptiveWeightShrink(pull / (2 * base.width) ** 0.5)
        return replace(base.with_rule(tensor), dim=None)
    if name == READINGS[2]:
        return base.with_rule(nw.PowerShrink(pull, 2.0))
    if name == READINGS[3]:
        step = nw.AdaptiveWeightShrink(pull * base.total_time / base.steps)
        return replace(base.with_rule(step), clock="step")
    return base.with_rule(nw.AdaptiveWeightShrink(pull))


def _words(run: TrainRun) -> str:
    """Say what was tuned."""
    words = f"lr {run.lr:.3g}"
    if run.rule is not None:
        key = "radius" if run.rule["name"] == "Sphere" else "coefficient"
        words += f", {key} {run.rule[key]:.3g}"
    elif run.weight_decay:
        words += f", weight_decay {run.weight_decay:.3g}"
    return words


def _answer(statistics: dict[str, Any], budget: Budget) -> str:
    sentences = []
    for member in budget.members:
        gains = statistics[member]["AWS_minus"]
        means = statistics[member]["test_accuracy"]
        best = max(means, key=lambda arm: float(means[arm]["mean"]))
        parts = [
            f"{gains[arm]['mean']:+.1f} [{gains[arm]['low']:+.1f}, {gains[arm]['high']:+.1f}] points from "
            f"{label}"
            for arm, label in ((COUPLED, "a tuned L2"), (NONE, "no decay"), (FREE, "AWS with nothing tuned"))
        ]
        sentences.append(
            f"With {member.replace('_', ' ')}, the tuned AWS is {', '.join(parts)}; the best is {best} "
            f"with {means[best]['mean']:.1f} %."
        )
    return " ".join(sentences)


CLAIM = ShrinkClaim()
