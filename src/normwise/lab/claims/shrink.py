"""Claim: AWS trains better than the other rules, each tuned with the same budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured, Verdict, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, NONE, from_equilibrium, scaled, with_arm
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
        "No decay; L2 coupled, as torch's weight_decay; L2 decoupled, as AdamW; the same with Defazio's "
        "corrected clock; the ε-shift as its authors published it; a sphere; SGDP of an installed peer "
        "package; AWS; and AWS with nothing tuned, started in equilibrium (normwise.attach). Each but the "
        "last is tuned over five coefficients (0.1 to 10 times the matched one; radii for the sphere; for no "
        "decay five learning rates), in the full budget times three learning rates, by accuracy on "
        "validation images with other seeds. Units start at norm 1, SGD with momentum 0.9 and a cosine, half "
        "of the images. Ablation: readings of AWS, tuned at norm 1, tested from the norms 0.001, 1 and 1000."
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

    def runs(self) -> list[Run]:
        """All candidates with the tuning seeds, and the arm that has nothing to tune."""
        wanted: list[Run] = []
        for member in self.budget.members:
            for arm in _tuned_arms():
                wanted += over_seeds(self._candidates(member, arm).values(), self.budget.tuning_seeds)
            wanted += over_seeds([self._free(member)], self._seeds)
        for reading in READINGS:
            wanted += over_seeds(self._reading_candidates(reading).values(), self.budget.tuning_seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The chosen settings, with the seeds of the comparison."""
        wanted: list[Run] = []
        for member in self.budget.members:
            wanted += over_seeds(self._compared(runs, member).values(), self._seeds)
        for reading in READINGS:
            wanted += over_seeds(self._reading(runs, reading).values(), self.budget.seeds)
        return wanted

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare AWS with every other arm, and the readings with each other."""
        measured = Measured({})
        for member in self.budget.members:
            compared = self._compared(runs, member)
            accuracy = runs.accuracy(compared, self._seeds)
            measured.statistics[member] = {
                "test_accuracy": {arm: mean_with_interval(values) for arm, values in accuracy.items()},
                "AWS_minus": {
                    arm: paired_difference(accuracy[AWS], values)
                    for arm, values in accuracy.items()
                    if arm != AWS
                },
                "chosen": {arm: _tuned_values(run) for arm, run in compared.items()},
            }
        measured.statistics["readings"] = {
            reading: {
                f"norm {scale:g}": mean_with_interval(values)
                for scale, values in runs.accuracy(self._reading(runs, reading), self.budget.seeds).items()
            }
            for reading in READINGS
        }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is ahead of every tuned arm; or ahead of no decay and near coupled L2."""
        ahead, near = [], []
        for member in self.budget.members:
            gains = measured.statistics[member]["AWS_minus"]
            ahead.append(all(gain.low > 0 for arm, gain in gains.items() if arm != FREE))
            near.append(gains[NONE].low > 0 and gains[COUPLED].low > -NEAR)
        return verdict_of(all(ahead), all(near))

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences, all arms and the readings."""
        series, tables, sentences = [], [], []
        for k, member in enumerate(self.budget.members):
            statistics = measured.statistics[member]
            gains = statistics["AWS_minus"]
            mean, low, high = ([gain[part] for gain in gains.values()] for part in range(3))
            places = list(range(1, len(gains) + 1))
            series.append(Series(family(member), places, mean, low, high, color=k))
            tables.append(self._table(runs, member, statistics))
            best, of_best = max(statistics["test_accuracy"].items(), key=lambda item: float(item[1].mean))
            labels = {COUPLED: "a tuned L2", NONE: "no decay", FREE: "AWS with nothing tuned"}
            differences = [f"{gains[arm]:+.1f} points from {label}" for arm, label in labels.items()]
            sentences.append(
                f"With {family(member)}, the tuned AWS is {', '.join(differences)}; the best is {best} "
                f"with {of_best.mean:.1f} %."
            )
        numbered = "; ".join(f"{k}: {arm}" for k, arm in enumerate(gains, start=1))
        plot = Plot("Test accuracy of AWS minus that of each other arm", numbered, "points", series)
        rows = [
            [reading, *map(str, by_scale.values()), _tuned_values(self._chosen_reading(runs, reading))]
            for reading, by_scale in measured.statistics["readings"].items()
        ]
        columns = ["reading", *(f"norm {scale:g}" for scale in READING_SCALES), "chosen"]
        title = f"Test accuracy (%) of readings of AWS by initial norm ({family(self.first)})"
        tables.append(Table(title, columns, rows))
        notes = [] if peer_is_installed() else [f"{PEER} was left out: pip install normwise[peers]"]
        return Exhibits(" ".join(sentences), [plot], tables, notes)

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.budget.at_least(SEEDS[self.budget.name])

    def _candidates(self, member: str, arm: str) -> dict[str, TrainRun]:
        """Return the settings that an arm is tuned over: the same number for every arm."""
        base = replace(self.budget.small, member=member)
        rates = RATES[self.budget.name]
        if arm == NONE:
            count = len(rates) * len(MULTIPLES)
            halvings = 2 if self.budget.full else 1
            runs = [replace(base, lr=0.1 * 2 ** ((k - count // 2) / halvings)) for k in range(count)]
        else:
            runs = [_with_arm(replace(base, lr=lr), arm, m) for lr in rates for m in MULTIPLES]
        return {_tuned_values(run): run for run in runs}

    def _compared(self, runs: FinishedRuns, member: str) -> dict[str, TrainRun]:
        """Return the chosen settings of every arm."""
        compared = {}
        for arm in _tuned_arms():
            candidates = self._candidates(member, arm)
            compared[arm] = candidates[runs.best(candidates, self.budget.tuning_seeds)]
        return compared | {FREE: self._free(member)}

    def _free(self, member: str) -> TrainRun:
        return from_equilibrium(replace(self.budget.small, member=member))

    def _reading_candidates(self, reading: str) -> dict[float, TrainRun]:
        base = with_arm(replace(self.budget.small, member=self.first), AWS)
        return {multiple: _read(base, reading, multiple) for multiple in MULTIPLES}

    def _chosen_reading(self, runs: FinishedRuns, reading: str) -> TrainRun:
        candidates = self._reading_candidates(reading)
        return candidates[runs.best(candidates, self.budget.tuning_seeds)]

    def _reading(self, runs: FinishedRuns, reading: str) -> dict[float, TrainRun]:
        """Return the chosen settings of a reading by initial norm."""
        chosen = self._chosen_reading(runs, reading)
        return {scale: scaled(chosen, scale) for scale in READING_SCALES}

    def _table(self, runs: FinishedRuns, member: str, statistics: dict[str, Any]) -> Table:
        rows = []
        for arm, run in self._compared(runs, member).items():
            loss, seconds = (
                mean_with_interval(runs.values(key, run, self._seeds)).mean
                for key in ("test_loss", "seconds")
            )
            sensitivity = None
            if arm != FREE:
                scores = runs.mean_scores(self._candidates(member, arm), self.budget.tuning_seeds).values()
                means = [100 * (score or 0.0) for score in scores]
                sensitivity = f"{max(means) - sum(means) / len(means):.1f}"
            rows.append(
                [
                    arm,
                    str(statistics["test_accuracy"][arm]),
                    str(statistics["AWS_minus"].get(arm, "–")),
                    f"{loss:.3f}",
                    sensitivity,
                    statistics["chosen"][arm],
                    f"{seconds:.1f}",
                ]
            )
        columns = ["rule", "test accuracy (%)", "AWS minus it (points)", "test loss"]
        columns += ["lost over the grid (points)", "chosen", "seconds a run, this time"]
        return Table(f"Each rule at its best, {len(self._seeds)} seeds ({family(member)})", columns, rows)


def _tuned_arms() -> tuple[str, ...]:
    peers = (PEER,) if peer_is_installed() else ()
    return (NONE, COUPLED, DECOUPLED, CORRECTED, PUBLISHED, SPHERE, *peers, AWS)


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
    raise ValueError(f"arm {arm!r} is not known: choose from {', '.join(_tuned_arms())}")


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
