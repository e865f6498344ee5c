"""Claim: with L2 on scale-invariant weights the objective has no global minimum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
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


class GlobalMinimum(Claim):
    """See the texts."""

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
        f"of what they were. The ε-shift has one where its objective is least at ε, and descent ends within "
        f"{100 * SETTLED:g} % of ε and changes by less in its second half. Reproduced: both, for all members "
        "and seeds. Partly: one. Not reproduced: none. What AWS has is reported and not judged: the paper "
        "does not say."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """Each penalty with all seeds, for all members that are invariant without batch norm."""
        return [
            replace(run, seed=seed)
            for member in _members(budget)
            for run in self._runs(budget, member).values()
            for seed in _few(budget)
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Look for minima."""
        statistics: dict[str, Any] = {}
        rows: list[list[str]] = []
        none, one = [], []
        for member in _members(budget):
            family = member.replace("_", " ")
            found = {
                name: [runs[replace(run, seed=seed)] for seed in _few(budget)]
                for name, run in self._runs(budget, member).items()
            }
            statistics[member] = {name: _summed_up(seeds) for name, seeds in found.items()}
            none += [_has_none(seed) for seed in found[L2]]
            one += [_has_one(seed) for seed in found[EPSILON]]
            for name in RULES:
                known = statistics[member][name]
                rows.append(
                    [family, name, f"{known['loss_changes_by']:.0e}", f"{known['least_at']:g}"]
                    + [f"{known['gradient_times_scale_varies_by']:.0e}"]
                    + [f"{known[key]['mean']:.3f}" for key in ("norm_end_over_half", "norm_at_end")]
                )
        verdict: Verdict = "not reproduced"
        if all(none) and all(one):
            verdict = "reproduced"
        elif all(none) or all(one):
            verdict = "partly"
        first = statistics[budget.members[0]]
        answer = (
            "Along the ray the loss does not change, so with L2 the objective is least at the smallest scale "
            f"that was tried, {first[L2]['least_at']:g}, and with AWS at {first[AWS]['least_at']:g}: neither "
            f"has a minimum. With the ε-shift it is least at {first[EPSILON]['least_at']:g}. Under descent "
            f"the norms end at {first[L2]['norm_at_end']['mean']:.2f} (L2), "
            f"{first[AWS]['norm_at_end']['mean']:.2f} (AWS) and {first[EPSILON]['norm_at_end']['mean']:.2f} "
            "(ε-shift); in the second half they change by the factors "
            f"{first[L2]['norm_end_over_half']['mean']:.2f}, {first[AWS]['norm_end_over_half']['mean']:.2f} "
            f"and {first[EPSILON]['norm_end_over_half']['mean']:.2f}."
        )
        notes = [
            "AWS has no global minimum either: its penalty λ‖w‖³/3 falls to 0 with the norm. What it has "
            "over L2 is that the pull fades on the way: in Σlr the norm falls as 1/t and not as e^(−t).",
            "At W = 0 itself the plain formula w/‖w‖ is NaN. normwise maps a zero unit to zero, which is no "
            "limit of the rays: the objective stays undefined there in any useful sense.",
        ]
        columns = ["member", "penalty", "loss changes by", "objective least at", "‖∇L‖·scale varies by"]
        columns += ["descent: norm, end over half-way", "norm at the end"]
        table = Table("Along the ray, and under descent", columns, rows)
        return Finding(verdict, answer, statistics, self._plots(budget, runs), [table], notes)

    def _runs(self, budget: Budget, member: str) -> dict[str, DescentRun]:
        base = DescentRun(
            data=budget.training.data,
            fingerprint=budget.training.fingerprint,
            train_size=100,
            image_size=budget.training.image_size,
            width=4,
            batch_norm=False,
            member=member,
            scales=SCALES,
        )
        return {name: base.with_rule(rule) for name, rule in RULES.items()}

    def _plots(self, budget: Budget, runs: Runs) -> list[Plot]:
        first = {
            name: replace(run, seed=budget.seeds[0])
            for name, run in self._runs(budget, budget.members[0]).items()
        }
        rays = {name: runs[run]["ray"] for name, run in first.items()}
        least = {name: min(at["objective"] for at in ray) for name, ray in rays.items()}
        along = [
            Series(name, SCALES, [at["objective"] - least[name] or None for at in ray])
            for name, ray in rays.items()
        ]
        gradient = [Series("‖∇L‖", SCALES, [at["gradient"] for at in rays[L2]])]
        metrics = {name: runs.metrics(run) for name, run in first.items()}
        norms, objectives = (
            [
                Series(name, [line["step"] for line in lines], [line[key] for line in lines])
                for name, lines in metrics.items()
            ]
            for key in ("norm", "objective")
        )
        scale = "scale of the directions"
        above = "objective above its least value"
        return [
            Plot("The objective along a ray", scale, above, along, log_x=True, log_y=True),
            Plot("The gradient of the loss along a ray", scale, "‖∇L‖", gradient, log_x=True, log_y=True),
            Plot("Norms under descent", "step", "median norm of the units", norms, log_y=True),
            Plot("The objective under descent", "step", "objective", objectives, log_y=True),
        ]


def _members(budget: Budget) -> tuple[str, ...]:
    return tuple(member for member in budget.members if member != "plain")


def _few(budget: Budget) -> tuple[int, ...]:
    """One seed, in the full budget three: there is little that varies."""
    return budget.seeds[: 3 if budget.full else 1]


def _least_at(seed: dict[str, Any]) -> float:
    """Return the smallest scale at which the objective is least, to within its rounding."""
    least = min(float(at["objective"]) for at in seed["ray"])
    return min(float(at["scale"]) for at in seed["ray"] if at["objective"] <= least * (1 + ROUNDING))


def _loss_changes_by(seed: dict[str, Any]) -> float:
    losses = [at["loss"] for at in seed["ray"]]
    return float((max(losses) - min(losses)) / min(losses))


def _has_none(seed: dict[str, Any]) -> bool:
    constant = _loss_changes_by(seed) < CONSTANT
    return constant and _least_at(seed) == min(SCALES) and seed["end"] <= FALLING * seed["at_half"]


def _has_one(seed: dict[str, Any]) -> bool:
    settled = abs(seed["end"] / seed["at_half"] - 1) < SETTLED
    return _least_at(seed) == EPS and abs(seed["end"] / EPS - 1) < SETTLED and settled


def _summed_up(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    invariant = [[at["gradient"] * at["scale"] for at in seed["ray"]] for seed in seeds]
    return {
        "loss_changes_by": max(_loss_changes_by(seed) for seed in seeds),
        "least_at": _least_at(seeds[0]),
        "gradient_times_scale_varies_by": max((max(v) - min(v)) / min(v) for v in invariant),
        "norm_end_over_half": mean_with_interval([s["end"] / s["at_half"] for s in seeds]).as_dict(),
        "norm_at_end": mean_with_interval([s["end"] for s in seeds]).as_dict(),
    }


CLAIM = GlobalMinimum()
