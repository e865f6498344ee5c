"""Claim: a regulariser on normalised weights is a constant and does nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, all_some_none
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.engine.run import Run
from normwise.lab.runs.regularizer import SCALES, RegularizerRun

DIGITS = 64.0  # epsilons of the type
BAR = 1e-9  # radians, as in the claim effective-learning-rate
WIDE = 1e-2  # radians: L2 on W must exceed this


class ConstantRegularizer(Claim):
    """The class attributes are the pre-registration."""

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

    def runs(self) -> list[Run]:
        """One run for each member and seed."""
        return over_seeds(self._settings().values(), self._seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Take the worst over all seeds."""
        measured = Measured({}, {"least_angle_of_L2": {}, "by_scale": {}})
        for member, run in self._settings().items():
            found = runs.summaries(run, self._seeds)
            dtypes = {
                dtype: [at for seed in found for at in seed["static"][dtype].values()]
                for dtype in found[0]["static"]
            }
            measured.statistics[member] = {
                "epsilons": {
                    dtype: {key: max(at[key] for at in cells) for key in ("value", "gradient")}
                    for dtype, cells in dtypes.items()
                },
                "gradient_exactly_zero_share": min(
                    at["exactly_zero"] for cells in dtypes.values() for at in cells
                ),
                "largest_angle": {
                    run: max(seed["angles"][run] for seed in found) for run in found[0]["angles"]
                },
            }
            measured.details["least_angle_of_L2"][member] = min(seed["angles"]["L2"] for seed in found)
            measured.details["by_scale"][member] = {
                (dtype, key): [max(seed["static"][dtype][f"{s:g}"][key] for seed in found) for s in SCALES]
                for dtype in dtypes
                for key in ("value", "gradient")
            }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """Value, gradient and angles lie within the bounds for all, some or no members."""
        return all_some_none(
            all(value <= DIGITS for by_key in found["epsilons"].values() for value in by_key.values())
            and found["largest_angle"]["regularized"] < BAR
            and measured.details["least_angle_of_L2"][member] > WIDE
            for member, found in measured.statistics.items()
        )

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        worst = max(
            value
            for found in measured.statistics.values()
            for by_key in found["epsilons"].values()
            for value in by_key.values()
        )
        return f"constant to {worst:.1f} rounding errors over 60 decades"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the deviation by norm, and the angles."""
        epsilons = [
            [family(member), dtype, *(f"{worst[key]:.1f}" for key in ("value", "gradient"))]
            for member, found in measured.statistics.items()
            for dtype, worst in found["epsilons"].items()
        ]
        angles = [
            [family(member), *(f"{found['largest_angle'][run]:.1e}" for run in ("regularized", "twin", "L2"))]
            for member, found in measured.statistics.items()
        ]
        tables = [
            Table(
                "The regulariser on normalised weights, worst over norms 10⁻³⁰ … 10³⁰",
                ["member", "type", "½‖W′‖² off its constant (epsilons)", "gradient (epsilons)"],
                epsilons,
            ),
            Table(
                "Largest angle to the run without a regulariser (rad)",
                ["member", "regulariser on W′", "twin", "regulariser on W"],
                angles,
            ),
        ]
        shares = ", ".join(
            f"{family(member)} {found['gradient_exactly_zero_share']:.0%}"
            for member, found in measured.statistics.items()
        )
        note = (
            "The gradient is zero but for rounding: not every element of it is exactly 0 (smallest share of "
            f"exact zeros: {shares}). The paper does not say so, and nothing follows from it."
        )
        plots = [
            Plot(
                f"How far ½‖W′‖² is from a constant ({family(member)})",
                "norm of every unit",
                "epsilons of the type",
                [
                    Series(
                        f"{key}, {dtype}",
                        SCALES,
                        [value or None for value in values],
                        dashed=key == "gradient",
                        color=k // 2,
                    )
                    for k, ((dtype, key), values) in enumerate(curves.items())
                ],
                log_x=True,
            )
            for member, curves in measured.details["by_scale"].items()
        ]
        sentences = [_sentence(member, found) for member, found in measured.statistics.items()]
        return Exhibits(" ".join(sentences), plots, tables, [note])

    @property
    def _seeds(self) -> tuple[int, ...]:
        """Two in the quick budget: nothing here varies by more than rounding."""
        return self.budget.seeds if self.budget.full else self.budget.seeds[:2]

    def _settings(self) -> dict[str, RegularizerRun]:
        like = self.budget.replaying
        base = self.budget.images(RegularizerRun, train_size=like.train_size, batch_size=like.batch_size)
        base = replace(base, strength=3 / base.total_time * (1 - base.momentum))
        return {m: replace(base, member=m) for m in self.budget.members if m != "plain"}


def _sentence(member: str, found: dict[str, Any]) -> str:
    value, gradient = (max(by[key] for by in found["epsilons"].values()) for key in ("value", "gradient"))
    angle = found["largest_angle"]
    return (
        f"With {family(member)}, over 60 decades of norms ½‖W′‖² is its constant to within "
        f"{value:.1f} rounding errors and its gradient zero to within {gradient:.1f}; training with it "
        f"stays within {angle['regularized']:.0e} rad of training without (a change of one last digit: "
        f"{angle['twin']:.0e}), where the same on W leads {angle['L2']:.1f} rad away."
    )


CLAIM = ConstantRegularizer
