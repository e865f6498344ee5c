"""Claim: a regulariser on normalised weights is a constant and does nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.engine.run import Run
from normwise.lab.runs.regularizer import SCALES, RegularizerRun

DIGITS = 64.0  # epsilons of the type
BAR = 1e-9  # radians, as in the claim effective-learning-rate
WIDE = 1e-2  # radians: what L2 on W must exceed


class ConstantRegularizer(Claim):
    """See the texts."""

    id = "constant-regularizer"
    order = 1
    title = "A regulariser on normalised weights is constant"
    source = (
        "Li, Chen & Yang, AAAI 2020: putting the regulariser on the normalised weights W′ is of no use, as "
        "½λ‖W′‖² is constant."
    )
    question = (
        "Does ½λ‖W′‖² depend on the weights at all, in value or in gradient, and does training with it "
        "differ from training without it?"
    )
    arms = (
        "Members of the family that form a W′ (plain weights under batch norm form none). The weights of the "
        "network at norms 10⁻³⁰ … 10³⁰, in float32 and float64. And training in float64, 150 steps of "
        "batches of 50 from 1000 images (SGD, momentum 0.9, cosine from 0.1): without a regulariser; with λ "
        "= 3/Σlr · (1 − 0.9) on W′; with the same on W; and a twin without it from a start that differs in "
        "one weight by one unit in the last place."
    )
    statistic = (
        "By type, over norms, units and seeds: the largest deviation of ½‖W′‖² from its constant (½ a unit; "
        "½ times its elements for weight standardisation), and the largest ‖∂/∂w ½‖W′‖²‖·‖w‖, both relative "
        "to ‖W′‖², in epsilons of the type: 1 would be one rounding error. The largest angle between the "
        "runs."
    )
    rule = (
        f"Reproduced: for every member both are at most {DIGITS:g} epsilons, the run with the regulariser on "
        f"W′ stays within {BAR:g} rad of that without, and that with it on W comes to be more than {WIDE:g} "
        "rad away. (The twin, beside it, shows how far one rounding error leads.) Partly: this holds for "
        "some members. Not reproduced: for none."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """One run for each member and seed."""
        return [replace(run, seed=seed) for run in self._runs(budget).values() for seed in budget.seeds]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Take the worst of all seeds."""
        statistics: dict[str, Any] = {}
        rows, angles = [], []
        plots: list[Plot] = []
        conditions = []
        for member, run in self._runs(budget).items():
            family = member.replace("_", " ")
            found = [runs[replace(run, seed=seed)] for seed in budget.seeds]
            types = list(found[0]["static"])
            worst = {
                dtype: {
                    what: max(s["static"][dtype][scale][what] for s in found for scale in s["static"][dtype])
                    for what in ("value", "gradient")
                }
                for dtype in types
            }
            zero = min(
                s["static"][dtype][scale]["exactly_zero"]
                for s in found
                for dtype in types
                for scale in s["static"][dtype]
            )
            largest = {who: max(s["angles"][who] for s in found) for who in found[0]["angles"]}
            least_on_weights = min(s["angles"]["L2"] for s in found)
            conditions.append(
                all(value <= DIGITS for by_what in worst.values() for value in by_what.values())
                and largest["regularized"] < BAR
                and least_on_weights > WIDE
            )
            statistics[member] = {
                "epsilons": worst,
                "gradient_exactly_zero_share": zero,
                "largest_angle": largest,
            }
            rows += [
                [family, dtype, *(f"{worst[dtype][what]:.1f}" for what in ("value", "gradient"))]
                for dtype in types
            ]
            angles.append([family, *(f"{largest[who]:.1e}" for who in ("regularized", "twin", "L2"))])
            plots.append(self._plot(family, found, types))
        verdict: Verdict = (
            "reproduced" if all(conditions) else "partly" if any(conditions) else "not reproduced"
        )
        columns = ["member", "type", "½‖W′‖² off its constant (epsilons)", "gradient (epsilons)"]
        tables = [
            Table("The regulariser on normalised weights, worst over norms 10⁻³⁰ … 10³⁰", columns, rows),
            Table(
                "Largest angle to the run without a regulariser (rad)",
                ["member", "regulariser on W′", "twin", "regulariser on W"],
                angles,
            ),
        ]
        notes = [
            "The gradient is zero but for rounding: not every element of it is exactly 0 (smallest share of "
            "exact zeros: "
            + ", ".join(
                f"{member.replace('_', ' ')} {found['gradient_exactly_zero_share']:.0%}"
                for member, found in statistics.items()
            )
            + "). The paper does not say so, and nothing follows from it."
        ]
        return Finding(verdict, _answer(statistics), statistics, plots, tables, notes)

    def _runs(self, budget: Budget) -> dict[str, RegularizerRun]:
        base = RegularizerRun(
            data=budget.training.data,
            fingerprint=budget.training.fingerprint,
            train_size=budget.replaying.train_size,
            image_size=budget.training.image_size,
            width=budget.training.width,
            batch_size=budget.replaying.batch_size,
        )
        base = replace(base, strength=3 / base.total_time * (1 - base.momentum))
        return {m: replace(base, member=m) for m in budget.members if m != "plain"}

    def _plot(self, family: str, found: list[dict[str, Any]], types: list[str]) -> Plot:
        series = [
            Series(
                f"{'value' if what == 'value' else 'gradient'}, {dtype}",
                SCALES,
                [max(s["static"][dtype][f"{scale:g}"][what] for s in found) or None for scale in SCALES],
                dashed=what == "gradient",
                color=k,
            )
            for k, dtype in enumerate(types)
            for what in ("value", "gradient")
        ]
        title = f"How far ½‖W′‖² is from a constant ({family})"
        return Plot(title, "norm of every unit", "epsilons of the type", series, log_x=True)


def _answer(statistics: dict[str, Any]) -> str:
    parts = []
    for member, found in statistics.items():
        epsilons = found["epsilons"].values()
        value = max(by["value"] for by in epsilons)
        gradient = max(by["gradient"] for by in epsilons)
        angle = found["largest_angle"]
        parts.append(
            f"With {member.replace('_', ' ')}, over 60 decades of norms ½‖W′‖² is its constant to within "
            f"{value:.1f} rounding errors and its gradient zero to within {gradient:.1f}; training with it "
            f"stays within {angle['regularized']:.0e} rad of training without (a change of one last digit: "
            f"{angle['twin']:.0e}), where the same on W leads {angle['L2']:.1f} rad away."
        )
    return " ".join(parts)


CLAIM = ConstantRegularizer()
