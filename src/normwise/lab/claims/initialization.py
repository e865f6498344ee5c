"""Claim: L2 makes training sensitive to the initial norm, and AWS does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from normwise.lab.claims.claim import Claim, Exhibits, Measured, in_short
from normwise.lab.claims.conditions import Verdict, above, all_some_none, any_of, below
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import Array, Estimate, bootstrap, mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import (
    ARMS,
    AWS,
    EPSILON,
    EXPLICIT_AWS,
    L2,
    NONE,
    STARTED,
    from_equilibrium,
    scaled,
    with_arm,
)
from normwise.lab.runs.base import ImageRun
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.train import TrainRun

SCALES = {
    "quick": (1e-3, 1e-2, 1.0, 1e1, 1e3),
    "full": tuple(10.0**k for k in range(-6, 7)),
}
QUICK_ARMS = (NONE, L2, AWS)  # the others decide nothing
USUAL = {
    "quick": ("torch", "kaiming_normal"),
    "full": ("torch", "kaiming_normal", "xavier_uniform", "orthogonal", "normal_0.02"),
}
LAYERS = "layers"  # each layer at a scale of its own
SHARE = 0.5  # of the spread that L2 has
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
        "L2; AWS (its exact flow); reported and not judged: no decay, AWS started in equilibrium "
        "(normwise.attach), and in the full budget ε-shifted L2 (ε = 0.001), a sphere of radius 1 and AWS "
        "explicit. Nothing is tuned: the coefficient of AWS is 3/Σlr (AdaptiveWeightShrink.for_budget), and "
        "L2 and the ε-shift have the same pull at norm 1. First the usual initialisers: torch's default and "
        "Kaiming's (full budget: also Xavier's, orthogonal and normal with deviation 0.02). Then every unit "
        "of every convolution starts with the norm 0.001, 0.01, 1, 10 or 1000 (no decay: 0.01, 1 and 10; "
        "full budget: 10⁻⁶ … 10⁶ in decades; there the other members with the ends and the middle, without "
        "the ε-shift and explicit AWS); the head is plain and is never decayed. In the full budget also each "
        "layer at a power of ten of its own, drawn by seed from 0.001 … 1000. SGD with momentum 0.9 and a "
        "cosine from 0.1."
    )
    statistic = (
        "Test accuracy in points, paired by seed; a run that does not finish scores what guessing scores. "
        "The spread of an arm: the largest minus the smallest mean over the initial norms; it grows with the "
        "number of norms, so it is judged against L2's over the same norms: the spread of AWS minus half of "
        "that of L2, with a 95 % interval by the bootstrap over seeds, drawn for all norms and both arms "
        "together. The advantage at an end (the smallest or the largest norm): AWS minus L2, with a 95 % "
        "interval by Student's t over the seeds. The usual initialisers are reported and not judged."
    )
    rule = (
        "Reproduced: for every member of the family, the spread of AWS is less than half of that of L2, and "
        f"at one end or more its advantage over L2 is above {LOSS:g} points, each with its whole interval. "
        "Partly: one of the two holds for some member. Not reproduced: neither holds for any. Undecided: "
        "where an interval contains its threshold and that matters."
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
            ends = [scale for scale in accuracy[AWS] if scale in (min(accuracy[AWS]), max(accuracy[AWS]))]
            measured.statistics[member] = {
                "spread": {arm: spread(by_scale) for arm, by_scale in accuracy.items()},
                "spread_of_AWS_minus_half_of_L2s": spread_minus_share(accuracy[AWS], accuracy[L2]),
                "advantage_over_L2": {
                    f"{scale:g}": paired_difference(accuracy[AWS][scale], accuracy[L2][scale])
                    for scale in ends
                },
                "test_accuracy": {
                    arm: {f"{scale:g}": mean_with_interval(values) for scale, values in by_scale.items()}
                    for arm, by_scale in accuracy.items()
                },
            }
            measured.details[member] = accuracy
        if self._starts():
            self._measure_starts(runs, measured)
        return measured

    def _measure_starts(self, runs: FinishedRuns, measured: Measured) -> None:
        starts = {start: runs.accuracy(arms, self.budget.seeds) for start, arms in self._starts().items()}
        differences = {
            start: _minus(accuracy[AWS], accuracy[L2])
            for start, accuracy in starts.items()
            if start != LAYERS
        }
        mean = [float(np.mean(of_seed)) for of_seed in zip(*differences.values(), strict=True)]
        measured.details["starts"] = starts
        measured.details["usual"] = {
            **{start: mean_with_interval(values) for start, values in differences.items()},
            "mean": mean_with_interval(mean),
        }
        measured.statistics[self.first]["usual_initialisers_AWS_minus_L2"] = measured.details["usual"]

    def judge(self, measured: Measured) -> Verdict:
        """AWS is flat and AWS has an advantage: both for all members, or one for some member."""
        conditions = []
        for found in measured.statistics.values():
            conditions.append(below(found["spread_of_AWS_minus_half_of_L2s"]))
            conditions.append(any_of(above(gain, LOSS) for gain in found["advantage_over_L2"].values()))
        return all_some_none(conditions)

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {}
        for member, statistics in measured.statistics.items():
            found[f"{member} / spread_of_AWS_minus_half_of_L2s"] = (0.0,)
            found |= {
                f"{member} / advantage_over_L2 / {scale}": (LOSS,)
                for scale in statistics["advantage_over_L2"]
            }
        return found

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        spread = {
            arm: in_short({m: found["spread"][arm] for m, found in measured.statistics.items()})
            for arm in (AWS, L2)
        }
        return f"spread {spread[AWS]} points, of L2 {spread[L2]}"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show accuracy by initial norm, and from the other starts."""
        plots: list[Plot] = []
        tables, notes, sentences = list[Table](), list[str](), list[str]()
        if "usual" in measured.details:
            tables.append(self._starts_table(runs, measured))
            sentences.append(
                f"From the usual initialisers ({', '.join(USUAL[self.budget.name])}) AWS and L2 are "
                f"{measured.details['usual']['mean']:+.2f} points apart."
            )
        for member, found in measured.statistics.items():
            means, spread, seeds = found["test_accuracy"], found["spread"], self.budget.seeds_for(member)
            curves = [  # the dashed curves lie on those of L2 and AWS
                Series.over_seeds(arm, by_scale, dashed=arm in (EPSILON, EXPLICIT_AWS))
                for arm, by_scale in measured.details[member].items()
            ]
            title = f"Test accuracy{{}} by initial norm ({family(member)})"
            x_label = "norm of every unit at the start"
            plots.append(Plot(title.format(""), x_label, "test accuracy (%)", curves, log_x=True))
            norms = list(means[AWS])
            settings = self._settings(member)
            rows = []
            for arm, by_scale in means.items():
                cells = [
                    None
                    if norm not in by_scale
                    else _cell(by_scale[norm], runs.unfinished_count(settings[arm][float(norm)], seeds))
                    for norm in norms
                ]
                rows.append([arm, *cells, str(spread[arm])])
            tables.append(Table(title.format(" (%)"), ["rule", *norms, "spread, 95 % interval"], rows))
            notes += runs.unfinished(
                {
                    f"{family(member)}, {arm}, initial norm {scale:g}": over_seeds([run], seeds)
                    for arm, by_scale in settings.items()
                    for scale, run in by_scale.items()
                }
            )
            decades = round(math.log10(max(map(float, norms)) / min(map(float, norms))))
            gains = found["advantage_over_L2"].items()
            sentences.append(
                f"With {family(member)}, over {decades} decades of initial norms test accuracy moves by "
                f"{spread[AWS]} points under AWS and by {spread[L2]} under L2 with the same pull "
                f"(AWS started in equilibrium: {spread[STARTED]}); "
                "AWS minus L2 is "
                f"{' and '.join(f'{gain:+.1f} points at norm {norm}' for norm, gain in gains)}."
            )
        return Exhibits(" ".join(sentences), plots, tables, notes, traces=self._traces(runs))

    def _traces(self, runs: FinishedRuns) -> list[Plot]:
        traced = {
            f"{arm} from {scale:g}": replace(
                self._settings(self.first)[arm][scale], seed=self.budget.seeds[0]
            )
            for arm in (L2, AWS)
            for scale in (1e-3, 1e3)
        }
        return layer_curves(runs, traced, family(self.first))

    def _settings(self, member: str) -> Mapping[str, Mapping[float, ImageRun | NetworkRun]]:
        """Return the settings by arm and scale."""
        fewer = self.budget.full and member != self.first
        settings: dict[str, dict[float, ImageRun | NetworkRun]] = {}
        for arm in ARMS if self.budget.full else QUICK_ARMS:
            scales: Sequence[float] = SCALES[self.budget.name]
            if fewer:
                scales = scales[::6]
            elif arm in (EPSILON, EXPLICIT_AWS):  # where they train well, they do as L2 and AWS
                scales = [scale for scale in scales if scale in (scales[0], 1e-3, 1.0, 1e3, scales[-1])]
            elif arm == NONE and not self.budget.full:
                scales = scales[1:-1]
            if not (fewer and arm in (EPSILON, EXPLICIT_AWS)):
                base = with_arm(replace(self.budget.training, member=member), arm)
                settings[arm] = {scale: scaled(base, scale) for scale in scales}
        base = from_equilibrium(replace(self.budget.training, member=member))
        scales = SCALES[self.budget.name][:: 6 if fewer else 3 if self.budget.full else 2]
        settings[STARTED] = {scale: scaled(base, scale) for scale in scales}
        return settings

    def _starts(self) -> dict[str, dict[str, TrainRun]]:
        """Return the settings by initialiser and arm."""
        starts = (*USUAL[self.budget.name], *((LAYERS,) if self.budget.full else ()))
        return {
            start: {arm: with_arm(replace(self.budget.training, initialiser=start), arm) for arm in (L2, AWS)}
            for start in starts
        }

    def _starts_table(self, runs: FinishedRuns, measured: Measured) -> Table:
        settings = self._starts()
        rows = []
        for start, accuracy in measured.details["starts"].items():
            unfinished = sum(
                runs.unfinished_count(run, self.budget.seeds) for run in settings[start].values()
            )
            means = [str(mean_with_interval(values)) for values in accuracy.values()]
            gain = paired_difference(accuracy[AWS], accuracy[L2])
            rows.append([_START_NAMES.get(start, start), *means, f"{gain:+.2f}", unfinished])
        columns = ["start", *(f"{arm} (%)" for arm in (L2, AWS)), "AWS − L2 (points)", "did not finish"]
        return Table("Test accuracy from other starts, with 95 % intervals (weight norm)", columns, rows)


def _range(means: Array) -> Array:
    return np.asarray(means.max(-1) - means.min(-1))


def spread(by_scale: Mapping[float, Sequence[float]]) -> Estimate:
    """Return the largest minus the smallest mean, with its interval."""
    return bootstrap(list(zip(*by_scale.values(), strict=True)), _range)


def spread_minus_share(
    ours: Mapping[float, Sequence[float]], theirs: Mapping[float, Sequence[float]]
) -> Estimate:
    """Return a spread minus the share of another over the same scales, with its interval."""
    count = len(ours)
    rows = list(zip(*ours.values(), *theirs.values(), strict=True))
    return bootstrap(rows, lambda means: _range(means[..., :count]) - SHARE * _range(means[..., count:]))


def _minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _cell(estimate: Estimate, unfinished: int) -> str:
    return f"{estimate.short} ({unfinished} did not finish)" if unfinished else str(estimate)


CLAIM = Initialization
