"""Claim: L2 makes training sensitive to the initial norm, and AWS does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from normwise.lab.claims.claim import Claim, Exhibits, Measured, Verdict, all_some_none
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import Estimate, mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import (
    ARMS,
    AWS,
    EPSILON,
    EXPLICIT_AWS,
    L2,
    NONE,
    SPHERE,
    STARTED,
    from_equilibrium,
    scaled,
    with_arm,
)
from normwise.lab.runs.train import TrainRun

# Where they train well, the ε-shift and explicit AWS do as L2 and AWS: they are run at fewer norms. So is the
# sphere, which forgets its initial norm, in the quick budget.
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
    """The class attributes are the pre-registration."""

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
        "cosine from 0.1. Reported and not judged: AWS started in equilibrium (normwise.attach), from the "
        "ends and the middle. Beside that, no decay, L2 and AWS from other starts: each layer at a power of "
        "ten of its own, drawn by seed from 0.001 … 1000, and (full budget) the usual initialisers."
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

    def runs(self) -> list[Run]:
        """All arms at all scales, and the other starts, for all members and seeds."""
        wanted = [
            run
            for member in self.budget.members
            for by_scale in self._settings(member).values()
            for run in by_scale.values()
        ]
        wanted += [run for arms in self._starts().values() for run in arms.values()]
        return [r for run in wanted for r in over_seeds([run], self.budget.seeds_for(run.member))]

    def measure(self, runs: FinishedRuns) -> Measured:
        """Measure the spreads, and compare AWS with L2 at the ends."""
        measured = Measured({})
        for member in self.budget.members:
            accuracy = {
                arm: runs.accuracy(by_scale, self.budget.seeds_for(member))
                for arm, by_scale in self._settings(member).items()
            }
            means = {
                arm: {f"{scale:g}": mean_with_interval(values) for scale, values in by_scale.items()}
                for arm, by_scale in accuracy.items()
            }
            ends = [scale for scale in accuracy[AWS] if scale in (min(accuracy[AWS]), max(accuracy[AWS]))]
            measured.statistics[member] = {
                "spread": {arm: round(_spread(by_scale.values()), 2) for arm, by_scale in means.items()},
                "advantage_over_L2": {
                    f"{scale:g}": paired_difference(accuracy[AWS][scale], accuracy[L2][scale])
                    for scale in ends
                },
                "test_accuracy": means,
            }
            measured.details[member] = accuracy
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is flat and AWS has an advantage: both for all members, or one for some member."""
        conditions = []
        for found in measured.statistics.values():
            gains = found["advantage_over_L2"].values()
            conditions.append(_spread(found["test_accuracy"][AWS].values()) <= FLAT)
            conditions.append(any(gain.mean >= LOSS and gain.low > 0 for gain in gains))
        return all_some_none(conditions)

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show accuracy by initial norm, and from the other starts."""
        plots, tables, notes, sentences = [], [], [], []
        for member, found in measured.statistics.items():
            means, spread = found["test_accuracy"], found["spread"]
            curves = [  # the dashed curves lie on those of L2 and AWS
                Series.over_seeds(arm, by_scale, dashed=arm in (EPSILON, EXPLICIT_AWS))
                for arm, by_scale in measured.details[member].items()
            ]
            title = f"Test accuracy{{}} by initial norm ({family(member)})"
            x_label = "norm of every unit at the start"
            plots.append(Plot(title.format(""), x_label, "test accuracy (%)", curves, log_x=True))
            norms = list(means[AWS])
            rows = []
            for arm, by_scale in means.items():
                cells = [None if norm not in by_scale else _cell(by_scale[norm]) for norm in norms]
                exact = _spread(by_scale.values())
                rows.append([arm, *cells, f"{exact:.1f}"])
            tables.append(Table(title.format(" (%)"), ["rule", *norms, "spread"], rows))
            notes += runs.unfinished(
                {
                    f"{family(member)}, {arm}, initial norm {scale:g}": over_seeds(
                        [run], self.budget.seeds_for(member)
                    )
                    for arm, settings in self._settings(member).items()
                    for scale, run in settings.items()
                }
            )
            decades = round(math.log10(max(map(float, norms)) / min(map(float, norms))))
            gains = found["advantage_over_L2"].items()
            sentences.append(
                f"With {family(member)}, over {decades} decades of initial norms test accuracy moves by "
                f"{spread[AWS]:.1f} points under AWS and by {spread[L2]:.1f} under L2 with the same pull "
                f"(AWS started in equilibrium: {spread[STARTED]:.1f}); "
                "AWS is ahead of L2 by "
                f"{' and '.join(f'{gain.mean:.1f} points at norm {norm}' for norm, gain in gains)}."
            )
        tables.append(self._starts_table(runs))
        traced = {
            f"{arm} from {scale:g}": replace(
                self._settings(self.first)[arm][scale], seed=self.budget.seeds[0]
            )
            for arm in (L2, AWS)
            for scale in (1e-2, 1e2)
        }
        return Exhibits(
            " ".join(sentences),
            plots,
            tables,
            notes,
            traces=layer_curves(runs, traced, family(self.first)),
        )

    def _settings(self, member: str) -> dict[str, dict[float, TrainRun]]:
        """Return the settings by arm and scale."""
        fewer = self.budget.full and member != self.first
        settings = {}
        for arm in ARMS:
            scales: Sequence[float] = SCALES[self.budget.name]
            if fewer:
                scales = scales[::6]
            elif arm in (EPSILON, EXPLICIT_AWS) or (arm == SPHERE and not self.budget.full):
                scales = [scale for scale in scales if scale in (scales[0], 1e-3, 1.0, 1e3, scales[-1])]
            if not (fewer and arm in (EPSILON, EXPLICIT_AWS)):
                base = with_arm(replace(self.budget.training, member=member), arm)
                settings[arm] = {scale: scaled(base, scale) for scale in scales}
        base = from_equilibrium(replace(self.budget.training, member=member))
        settings[STARTED] = {
            scale: scaled(base, scale) for scale in list(settings[AWS])[:: 3 if not fewer else 1]
        }
        return settings

    def _starts(self) -> dict[str, dict[str, TrainRun]]:
        """Return the settings by initialiser and arm."""
        return {
            start: {
                arm: with_arm(replace(self.budget.training, initialiser=start), arm)
                for arm in (NONE, L2, AWS)
            }
            for start in STARTS[self.budget.name]
        }

    def _starts_table(self, runs: FinishedRuns) -> Table:
        rows = []
        for start, arms in self._starts().items():
            accuracy = runs.accuracy(arms, self.budget.seeds)
            means = [str(mean_with_interval(values)) for values in accuracy.values()]
            gain = paired_difference(accuracy[AWS], accuracy[L2])
            rows.append([_START_NAMES.get(start, start), *means, str(gain)])
        columns = ["start", *(f"{arm} (%)" for arm in (NONE, L2, AWS)), "AWS − L2 (points)"]
        return Table("Test accuracy from other starts, with 95 % intervals (weight norm)", columns, rows)


def _spread(estimates: Iterable[Estimate]) -> float:
    """Return the largest minus the smallest mean, over the scales at which any seed finished."""
    means = [estimate.mean for estimate in estimates if estimate.n]
    return max(means) - min(means)


def _cell(estimate: Estimate) -> str:
    return estimate.short if estimate.n else "refused"


CLAIM = Initialization
