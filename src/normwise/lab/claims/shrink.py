"""Claim: AWS trains better than the other rules, each tuned with the same budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured, in_short
from normwise.lab.claims.conditions import Verdict, above, all_of, verdict_of
from normwise.lab.claims.exhibits import Table, dot_plot, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.claims.tuning import Choice, TunedValues, mean_of_tuned
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, NONE, from_equilibrium, scaled, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.train import TrainRun, peer_is_installed

MULTIPLES = {"quick": (0.1, 1.0, 10.0), "full": tuple(10 ** (k / 2) for k in range(-2, 3))}
RATES = {"quick": (0.1,), "full": (0.05, 0.1, 0.2)}
SEEDS = {"quick": 4, "full": 10}
AHEAD = 0.5  # points: a smaller lead is none
NEAR = 1.0  # points

COUPLED = "L2, coupled (weight_decay of torch)"
DECOUPLED = "L2, decoupled (as AdamW)"
CORRECTED = "L2, decoupled and corrected (AdamC)"
PUBLISHED = "ε-shifted L2, as published"
SPHERE = "sphere"
PEER = "SGDP (pytorch_optimizer)"
FREE = "AWS, nothing tuned"
_WORDS = {
    NONE: "no decay",
    COUPLED: "L2 coupled, as in torch",
    DECOUPLED: "L2 decoupled",
    CORRECTED: "L2 decoupled and corrected",
    PUBLISHED: "the published ε-shift",
    SPHERE: "a sphere",
    PEER: "SGDP",
    FREE: "AWS with nothing tuned",
}

# The readings of "a dynamic coefficient proportional to the magnitude of the parameter".
WHOLE_TENSOR, SQUARED, BY_STEP = (
    "AWS on the norm of the whole tensor",
    "square of the norm",
    "AWS without learning rate",
)
READINGS = (AWS, WHOLE_TENSOR, SQUARED, BY_STEP)
READING_SCALES = (1e-3, 1.0, 1e3)


class Shrink(Claim):
    """The class attributes are the pre-registration."""

    id = "shrink"
    order = 10
    title = "AWS against other rules, each tuned"
    source = "Li, Chen & Yang, AAAI 2020: Adaptive Weight Shrink trains better than L2 and more stably."
    question = (
        "When every rule is tuned with the same budget, is Adaptive Weight Shrink better than the others in "
        "test accuracy? And which reading of the paper's words does best?"
    )
    arms = (
        "No decay; L2 coupled, as torch's weight_decay; L2 decoupled, as AdamW; the ε-shift as its authors "
        "published it; AWS; AWS with nothing tuned, started in equilibrium (normwise.attach); and in the "
        "full budget, for the first member, also L2 with Defazio's corrected clock, a sphere, and SGDP of an "
        "installed peer package. Each arm but that with nothing tuned is tuned over three coefficients "
        "(0.1, 1 and 10 times the matched one; for no decay three learning rates), in the full budget five "
        "(radii for the sphere) times three learning rates, by the mean accuracy on validation images of "
        "three other seeds, ties to the middle of the grid. Units start at norm 1, SGD with momentum 0.9 "
        "and a cosine, half of the images. Ablation (full budget): readings of AWS, tuned at norm 1, tested "
        "from the norms 0.001, 1 and 1000."
    )
    statistic = (
        "Test accuracy at the chosen settings with 4 seeds (full budget 10), where a run that does not "
        "finish scores what guessing scores: AWS minus each other arm, paired, with a 95 % interval that "
        "carries the choice of both arms (the tuning seeds are resampled for them together). Reported "
        "beside it: test loss, the mean of validation accuracy over the tuned settings below the best "
        "(sensitivity), and the time of a run."
    )
    rule = (
        f"AWS is ahead of an arm where its lead is above {AHEAD:g} points with the whole interval, and not "
        "ahead where the interval lies below. Reproduced: for every member AWS is ahead of every other "
        f"tuned arm. Partly: for every member it is ahead of no decay and not more than {NEAR:g} point "
        f"behind coupled L2 (interval above −{NEAR:g}). Undecided: where an interval contains its threshold "
        "and that matters. Not reproduced: otherwise."
    )

    def runs(self) -> list[Run]:
        """All candidates with the tuning seeds, and the arm that has nothing to tune."""
        wanted: list[Run] = []
        for member in self.budget.members:
            for arm in self._tuned_arms(member):
                wanted += over_seeds(self._candidates(member, arm).values(), self.budget.tuning_seeds)
            wanted += over_seeds([self._free(member)], self._seeds)
        for reading in self._readings:
            wanted += over_seeds(self._reading_candidates(reading).values(), self.budget.tuning_seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The chosen settings, with the seeds of the comparison."""
        wanted: list[Run] = []
        for member in self.budget.members:
            for arm in self._tuned_arms(member):
                candidates = self._candidates(member, arm)
                choice = runs.choice(candidates, self.budget.tuning_seeds)
                wanted += over_seeds((candidates[name] for name in choice.needed), self._seeds)
        for reading in self._readings:
            for by_scale in self._reading(runs, reading)[1].values():
                wanted += over_seeds(by_scale.values(), self.budget.seeds)
        return wanted

    def second_cost(self) -> float:
        """Each tuned arm, with one or two settings."""
        count = sum(len(self._tuned_arms(member)) for member in self.budget.members) * len(self._seeds)
        count += len(self._readings) * len(READING_SCALES) * len(self.budget.seeds)
        return 1.5 * count * self.budget.small.cost

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare AWS with every other arm, and the readings with each other."""
        measured = Measured({})
        for member in self.budget.members:
            chosen = {FREE: "nothing tuned"}
            accuracy = {FREE: TunedValues(tuple(runs.scores(self._free(member), self._seeds)))}
            for arm in self._tuned_arms(member):
                candidates = self._candidates(member, arm)
                choice = runs.choice(candidates, self.budget.tuning_seeds)
                chosen[arm] = "; or ".join(choice.needed)
                accuracy[arm] = choice.values(
                    runs.accuracy({name: candidates[name] for name in choice.needed}, self._seeds)
                )
            measured.statistics[member] = {
                "test_accuracy": {arm: mean_of_tuned(values) for arm, values in accuracy.items()},
                "AWS_minus": {
                    arm: mean_of_tuned(accuracy[AWS].minus(values))
                    for arm, values in accuracy.items()
                    if arm != AWS
                },
                "chosen": chosen,
            }
        if self._readings:
            measured.statistics["readings"] = {
                reading: {
                    f"norm {scale:g}": mean_of_tuned(
                        choice.values(runs.accuracy(by_multiple, self.budget.seeds))
                    )
                    for scale, by_multiple in settings.items()
                }
                for reading in self._readings
                for choice, settings in (self._reading(runs, reading),)
            }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is ahead of every tuned arm; or ahead of no decay and near coupled L2."""
        ahead, near = [], []
        for member in self.budget.members:
            gains = measured.statistics[member]["AWS_minus"]
            ahead += [above(gain, AHEAD) for arm, gain in gains.items() if arm != FREE]
            near += [above(gains[NONE], AHEAD), above(gains[COUPLED], -NEAR)]
        return verdict_of(all_of(ahead), all_of(near))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        return {
            f"{member} / AWS_minus / {arm}": (AHEAD, -NEAR) if arm == COUPLED else (AHEAD,)
            for member in self.budget.members
            for arm in measured.statistics[member]["AWS_minus"]
            if arm != FREE
        }

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        gains = {m: measured.statistics[m]["AWS_minus"][COUPLED] for m in self.budget.members}
        return f"{in_short(gains, '+.1f')} points from a tuned L2"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences, all arms and the readings."""
        plots, tables, sentences = [], [], []
        for member in self.budget.members:
            statistics = measured.statistics[member]
            gains = statistics["AWS_minus"]
            title = f"Test accuracy of AWS minus that of each other arm ({family(member)})"
            plots.append(dot_plot(title, "points", gains))
            tables.append(self._table(runs, member, statistics))
            differences = [f"{gain:+.1f} points from {_WORDS[arm]}" for arm, gain in gains.items()]
            sentences.append(f"With {family(member)}, the tuned AWS is {', '.join(differences)}.")
        if self._readings:
            rows = [
                [
                    reading,
                    *map(str, by_scale.values()),
                    "; or ".join(
                        _tuned_values(self._reading_candidates(reading)[multiple])
                        for multiple in self._reading(runs, reading)[0].needed
                    ),
                ]
                for reading, by_scale in measured.statistics["readings"].items()
            ]
            columns = ["reading", *(f"norm {scale:g}" for scale in READING_SCALES), "chosen"]
            title = f"Test accuracy (%) of readings of AWS by initial norm ({family(self.first)})"
            tables.append(Table(title, columns, rows))
        missing = self.budget.full and not peer_is_installed()
        notes = [f"{PEER} was left out: pip install normwise[peers]"] if missing else []
        return Exhibits(" ".join(sentences), plots, tables, notes)

    def _tuned_arms(self, member: str) -> tuple[str, ...]:
        peers = (PEER,) if peer_is_installed() else ()
        more = (CORRECTED, SPHERE, *peers) if self.budget.full and member == self.first else ()
        return (NONE, COUPLED, DECOUPLED, PUBLISHED, *more, AWS)

    @property
    def _readings(self) -> tuple[str, ...]:
        """The readings, in the full budget only: they decide nothing."""
        return READINGS if self.budget.full else ()

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.budget.at_least(SEEDS[self.budget.name])

    def _candidates(self, member: str, arm: str) -> dict[str, TrainRun]:
        """Return the settings that an arm is tuned over: the same number for every arm."""
        base = replace(self.budget.small, member=member)
        rates, multiples = RATES[self.budget.name], MULTIPLES[self.budget.name]
        if arm == NONE:
            count = len(rates) * len(multiples)
            halvings = 2 if self.budget.full else 1
            runs = [replace(base, lr=0.1 * 2 ** ((k - count // 2) / halvings)) for k in range(count)]
        else:
            runs = [_with_arm(replace(base, lr=lr), arm, m) for lr in rates for m in multiples]
        return {_tuned_values(run): run for run in runs}

    def _free(self, member: str) -> TrainRun:
        return from_equilibrium(replace(self.budget.small, member=member))

    def _reading_candidates(self, reading: str) -> dict[float, TrainRun]:
        base = with_arm(replace(self.budget.small, member=self.first), AWS)
        return {multiple: _read(base, reading, multiple) for multiple in MULTIPLES[self.budget.name]}

    def _reading(
        self, runs: FinishedRuns, reading: str
    ) -> tuple[Choice[float], dict[float, dict[float, TrainRun]]]:
        """Return what was chosen, and the settings that it needs by initial norm and multiple."""
        candidates = self._reading_candidates(reading)
        choice = runs.choice(candidates, self.budget.tuning_seeds)
        settings = {
            scale: {multiple: scaled(candidates[multiple], scale) for multiple in choice.needed}
            for scale in READING_SCALES
        }
        return choice, settings

    def _table(self, runs: FinishedRuns, member: str, statistics: dict[str, Any]) -> Table:
        rows: list[list[str | int]] = []
        for arm in (*self._tuned_arms(member), FREE):
            run, sensitivity = self._free(member), "–"
            if arm != FREE:
                candidates = self._candidates(member, arm)
                run = candidates[runs.choice(candidates, self.budget.tuning_seeds).best]
                means = [
                    float(np.mean(runs.scores(one, self.budget.tuning_seeds, "validation_accuracy")))
                    for one in candidates.values()
                ]
                sensitivity = f"{max(means) - sum(means) / len(means):.1f}"
            loss, seconds = (
                mean_with_interval(runs.values(key, run, self._seeds)) for key in ("test_loss", "seconds")
            )
            rows.append(
                [
                    arm,
                    str(statistics["test_accuracy"][arm]),
                    str(statistics["AWS_minus"].get(arm, "–")),
                    f"{loss:.3f}",
                    runs.unfinished_count(run, self._seeds),
                    sensitivity,
                    statistics["chosen"][arm],
                    seconds.short,
                ]
            )
        columns = ["rule", "test accuracy (%)", "AWS minus it (points)", "test loss (nats)"]
        columns += ["did not finish", "lost over the grid (points)", "chosen; or, by a resample"]
        columns += ["seconds a run, this time"]
        return Table(f"Each rule at its best, {len(self._seeds)} seeds ({family(member)})", columns, rows)


def _with_arm(base: TrainRun, arm: str, multiple: float) -> TrainRun:
    """Return the run under an arm with a multiple of the pull that AWS has by ``for_budget`` at norm 1."""
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
    if arm == SPHERE:  # at the radius whose effective learning rate is that of the equilibrium
        radius = float(multiple**-0.25)
        return scaled(base.with_rule(nw.Sphere(radius)), radius)
    if arm == PEER:
        return replace(base, optimizer="sgdp", weight_decay=coupled)
    raise ValueError(f"arm {arm!r} is not known: choose from {', '.join(_WORDS)}")


def _read(base: TrainRun, reading: str, multiple: float) -> TrainRun:
    """Return AWS in another reading, with the same pull at the start of a run from norm 1."""
    rule = rule_from(base.rule)
    assert isinstance(rule, nw.AdaptiveWeightShrink)
    pull = rule.strength * multiple
    if reading == WHOLE_TENSOR:  # the middle layer has 2·width units
        tensor = nw.AdaptiveWeightShrink(pull / (2 * base.width) ** 0.5)
        return replace(base.with_rule(tensor), dim=None)
    if reading == SQUARED:
        return base.with_rule(nw.PowerShrink(pull, 2.0))
    if reading == BY_STEP:
        step = nw.AdaptiveWeightShrink(pull * base.total_time / base.steps)
        return replace(base.with_rule(step), clock="step")
    return base.with_rule(nw.AdaptiveWeightShrink(pull))


def _tuned_values(run: TrainRun) -> str:
    """Return the values that were tuned, in words."""
    words = f"lr {run.lr:.3g}"
    if run.rule is not None:
        key = "radius" if run.rule["name"] == "Sphere" else "coefficient"
        words += f", {key} {run.rule[key]:.3g}"
    elif run.weight_decay:
        words += f", weight_decay {run.weight_decay:.3g}"
    return words


CLAIM = Shrink
