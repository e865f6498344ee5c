"""Claim: with L2 on scale-invariant weights the objective has no global minimum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, EPSILON, L2
from normwise.lab.runs.descent import DescentRun

EPS = 0.3
RULES: dict[str, nw.Rule] = {
    L2: nw.L2(0.3),
    AWS: nw.AdaptiveWeightShrink(0.3),
    EPSILON: nw.EpsilonShiftedL2(0.3, epsilon=EPS),
}
SCALES = tuple(sorted([*(10.0**k for k in range(-12, 4)), EPS]))
ROUNDING = 1e-14  # relative: at the smallest scales the penalty is lost beside the loss
CONSTANT = 1e-9  # relative change of the loss along a ray
FALLING = 0.95  # norm at the end over the norm half-way, at most
SETTLED = 0.02  # relative change of the norm in the second half, and distance from ε

Summary = dict[str, Any]


class GlobalMinimum(Claim):
    """The class attributes are the pre-registration."""

    id = "global-minimum"
    order = 5
    title = "The objective has no global minimum"
    source = (
        "Li, Chen & Yang, AAAI 2020: with L2 the objective falls all the way as W → 0, where it is not "
        "defined. Their earlier version (arXiv 1911.05920) proposes the ε-shift, whose penalty is least at ε."
    )
    question = (
        "Does loss plus penalty have a minimum in the scale of the weights: with L2, with the ε-shift, and "
        "with AWS? And where does descent lead?"
    )
    arms = (
        f"The penalties of L2, AWS and the ε-shift (ε = {EPS:g}), each with λ = 0.3 (by a pilot with seed "
        "5000, so that descent converges), on the convolutions of a network with weight norm and without "
        "batch norm; all else has a plain L2 of 0.001, so that its own optimum is finite. 100 images, all in "
        "each step, float64. Along the ray through the initial weights from 10⁻¹² to 1000 times their norm "
        "of 1; and 600 steps of gradient descent whose step size is such that the objective falls in every "
        "step (Armijo)."
    )
    statistic = (
        "Along the ray: the largest relative change of the loss, the scale at which the objective is least, "
        "and the norm of the loss's gradient times the scale. Under descent: the median norm of the units at "
        "the end over that half-way, and at the end."
    )
    rule = (
        f"L2 has no minimum where its loss is constant along the ray to {CONSTANT:g}, its objective least at "
        f"the smallest scale, and its norms still fall in the second half of descent, to at most {FALLING:g} "
        "of what they were. The ε-shift has one where its objective is least at ε, and descent ends within "
        f"{100 * SETTLED:g} % of ε and changes by less in its second half. Reproduced: both, for all members "
        "and seeds. Partly: one. Not reproduced: none. What AWS has is reported and not judged: the paper "
        "does not say."
    )

    def runs(self) -> list[Run]:
        """Each penalty with all seeds, for all members that are invariant without batch norm."""
        return [
            run
            for member in self._members
            for run in over_seeds(self._settings(member).values(), self._seeds)
        ]

    def measure(self, runs: FinishedRuns) -> Measured:
        """Look for minima along the ray and under descent."""
        found = {
            member: {rule: runs.summaries(run, self._seeds) for rule, run in self._settings(member).items()}
            for member in self._members
        }
        return Measured(
            {m: {rule: _statistics(seeds) for rule, seeds in rules.items()} for m, rules in found.items()},
            {
                "L2_has_none": [_has_no_minimum(seed) for rules in found.values() for seed in rules[L2]],
                "shift_has_one": [_has_minimum(seed) for rules in found.values() for seed in rules[EPSILON]],
            },
        )

    def judge(self, measured: Measured) -> Verdict:
        """L2 has no minimum and the ε-shift has one, or one of the two."""
        none, one = (all(measured.details[key]) for key in ("L2_has_none", "shift_has_one"))
        return verdict_of(none and one, none or one)

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        least = [found["least_at"] for found in measured.statistics[self.first].values()]
        return "least at scale {:g} (L2), {:g} (AWS), {:g} (ε-shift)".format(*least)

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the objective along the ray, and descent."""
        l2, aws, shift = (measured.statistics[self.first][rule] for rule in RULES)
        ends = [found["norm_at_end"].mean for found in (l2, aws, shift)]
        factors = [found["norm_end_over_half"].mean for found in (l2, aws, shift)]
        answer = (
            "Along the ray the loss does not change, so with L2 the objective is least at the smallest scale "
            f"that was tried, {l2['least_at']:g}, and with AWS at {aws['least_at']:g}: neither "
            f"has a minimum. With the ε-shift it is least at {shift['least_at']:g}. Under descent "
            f"the norms end at {ends[0]:.2f} (L2), {ends[1]:.2f} (AWS) and {ends[2]:.2f} (ε-shift); in the "
            f"second half they change by the factors {factors[0]:.2f}, {factors[1]:.2f} and {factors[2]:.2f}."
        )
        notes = [
            "AWS has no global minimum either: its penalty λ‖w‖³/3 falls to 0 with the norm. What it has "
            "over L2 is that the pull fades on the way: in Σlr the norm falls as 1/t and not as e^(−t).",
            "At W = 0 itself the plain formula w/‖w‖ is NaN. normwise maps a zero unit to zero, which is no "
            "limit of the rays: the objective stays undefined there in any useful sense.",
        ]
        columns = ["member", "penalty", "loss changes by", "objective least at", "‖∇L‖·scale varies by"]
        columns += ["descent: norm, end over half-way", "norm at the end"]
        rows = [
            [
                family(member),
                rule,
                f"{found['loss_changes_by']:.0e}",
                f"{found['least_at']:g}",
                f"{found['gradient_times_scale_varies_by']:.0e}",
                *(f"{found[key].mean:.3f}" for key in ("norm_end_over_half", "norm_at_end")),
            ]
            for member, rules in measured.statistics.items()
            for rule, found in rules.items()
        ]
        table = Table("Along the ray, and under descent", columns, rows)
        return Exhibits(answer, self._plots(runs), [table], notes)

    @property
    def _members(self) -> tuple[str, ...]:
        return tuple(member for member in self.budget.members if member != "plain")

    @property
    def _seeds(self) -> tuple[int, ...]:
        """One seed, in the full budget three: little varies with it."""
        return self.budget.seeds[: 3 if self.budget.full else 1]

    def _settings(self, member: str) -> dict[str, DescentRun]:
        base = self.budget.images(
            DescentRun, train_size=100, width=4, batch_norm=False, member=member, scales=SCALES
        )
        return {name: base.with_rule(rule) for name, rule in RULES.items()}

    def _plots(self, runs: FinishedRuns) -> list[Plot]:
        first = {
            name: replace(run, seed=self.budget.seeds[0]) for name, run in self._settings(self.first).items()
        }
        rays = {name: runs[run]["ray"] for name, run in first.items()}
        least = {name: min(at["objective"] for at in ray) for name, ray in rays.items()}
        along = [
            Series(name, SCALES, [at["objective"] - least[name] or None for at in ray])
            for name, ray in rays.items()
        ]
        gradient = [Series("‖∇L‖", SCALES, [at["gradient"] for at in rays[L2]])]
        norms, objectives = (
            [Series.over_steps(name, runs.metrics(run), key) for name, run in first.items()]
            for key in ("norm", "objective")
        )
        scale = "scale of the directions"
        above = "objective above its least value (nats)"
        return [
            Plot("The objective along a ray", scale, above, along, log_x=True, log_y=True),
            Plot("The gradient of the loss along a ray", scale, "‖∇L‖", gradient, log_x=True, log_y=True),
            Plot("Norms under descent", "step", "median norm of the units", norms, log_y=True),
            Plot("The objective under descent", "step", "objective (nats)", objectives, log_y=True),
        ]


def _least_at(seed: Summary) -> float:
    """Return the smallest scale at which the objective is least, up to rounding."""
    least = min(float(at["objective"]) for at in seed["ray"])
    return min(float(at["scale"]) for at in seed["ray"] if at["objective"] <= least * (1 + ROUNDING))


def _relative_range(values: list[float]) -> float:
    return (max(values) - min(values)) / min(values)


def _loss_changes_by(seed: Summary) -> float:
    return _relative_range([at["loss"] for at in seed["ray"]])


def _has_no_minimum(seed: Summary) -> bool:
    constant = _loss_changes_by(seed) < CONSTANT
    return constant and _least_at(seed) == min(SCALES) and bool(seed["end"] <= FALLING * seed["at_half"])


def _has_minimum(seed: Summary) -> bool:
    settled = abs(seed["end"] / seed["at_half"] - 1) < SETTLED
    return _least_at(seed) == EPS and bool(abs(seed["end"] / EPS - 1) < SETTLED and settled)


def _statistics(seeds: list[Summary]) -> dict[str, Any]:
    return {
        "loss_changes_by": max(_loss_changes_by(seed) for seed in seeds),
        "least_at": _least_at(seeds[0]),
        "gradient_times_scale_varies_by": max(
            _relative_range([at["gradient"] * at["scale"] for at in seed["ray"]]) for seed in seeds
        ),
        "norm_end_over_half": mean_with_interval([seed["end"] / seed["at_half"] for seed in seeds]),
        "norm_at_end": mean_with_interval([seed["end"] for seed in seeds]),
    }


CLAIM = GlobalMinimum
