"""Claim: AWS is less sensitive to its coefficient than L2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured, in_short
from normwise.lab.claims.conditions import Verdict, above, all_some_none
from normwise.lab.claims.exhibits import HeatMap, Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.statistics import mean_with_interval, median
from normwise.lab.claims.tuning import mean_of_tuned
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, SPHERE, scaled, times, with_arm
from normwise.lab.runs.train import TrainRun

MULTIPLES = {  # five decades
    "quick": tuple(10 ** (k / 2) for k in range(-5, 6, 2)),
    "full": tuple(10 ** (k / 2) for k in range(-5, 6)),
}
RATES = (0.00625, 0.025, 0.1, 0.4, 1.6)  # of the map, in the full budget
MAP_MULTIPLES = tuple(10 ** (k / 2) for k in range(-4, 5))
NEAR = 2.0  # points from the best


class Coefficient(Claim):
    """The class attributes are the pre-registration."""

    id = "coefficient"
    order = 8
    title = "Sensitivity to the coefficient"
    source = (
        "Li, Chen & Yang, AAAI 2020, propose AWS as the more stable rule; that its coefficient needs less "
        "care is what follows for a user."
    )
    question = (
        "Over five decades of the coefficient, how much accuracy is lost against the best one, under L2 and "
        "under AWS? And which pairs of learning rate and coefficient work?"
    )
    arms = (
        "L2 and AWS by their flows, with 11 (quick budget: 6) coefficients from 1/316 to 316 times 3/Σlr; "
        "at each the two have the same pull at norm 1, where all units start. The map (full budget): "
        "learning rates against coefficients (multiples of 3/Σlr at the learning rate 0.1, the same number "
        "in every column) for L2 and AWS, and against the radius for a sphere (the same multiples, −1/4 "
        "power: the radius at which the effective learning rate is that of L2's equilibrium). SGD with "
        "momentum 0.9 and a cosine, half of the images."
    )
    statistic = (
        "The loss of a rule: test accuracy at the coefficient that is best on validation images (three other "
        "seeds: best mean, ties to the middle of the grid), minus the mean test accuracy over all of them. A "
        "run that does not finish scores what guessing scores. L2's loss minus that of AWS, paired by seed, "
        "with a 95 % interval that carries the choice (the tuning seeds are resampled). Beside it: the "
        "median over the coefficients of what is lost at each, the difference of the two best, and the share "
        f"of cells of the map within {NEAR:g} points of the best of all rules (reported, not judged)."
    )
    rule = (
        "Reproduced: for every member L2 loses more than AWS, with an interval above 0. Partly: for some. "
        "Not reproduced: for none. Undecided: where an interval contains 0 and that matters."
    )

    def runs(self) -> list[Run]:
        """Sweeps for all members, also with the tuning seeds; the map for the first member."""
        wanted: list[Run] = []
        for member in self.budget.members:
            seeds = (*self.budget.seeds_for(member), *self.budget.tuning_seeds)
            for arm in (L2, AWS):
                wanted += over_seeds(self._sweep(member, arm).values(), seeds)
        for arm in self._mapped:
            wanted += over_seeds(self._cells(arm).values(), self.budget.seeds[:1])
        return wanted

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare how much each rule loses away from its best coefficient."""
        measured = Measured({}, {"accuracy": {}, "maps": {}})
        for member in self.budget.members:
            sweeps = {arm: self._sweep(member, arm) for arm in (L2, AWS)}
            accuracy = {
                arm: runs.accuracy(sweep, self.budget.seeds_for(member)) for arm, sweep in sweeps.items()
            }
            choices = {arm: runs.choice(sweep, self.budget.tuning_seeds) for arm, sweep in sweeps.items()}
            lost = {arm: choices[arm].values(_lost(accuracy[arm])) for arm in sweeps}
            best = {arm: choices[arm].values(accuracy[arm]) for arm in sweeps}
            measured.statistics[member] = {
                "lost": {arm: mean_of_tuned(values) for arm, values in lost.items()},
                "median_lost": {arm: _median_lost(accuracy[arm], choices[arm].best) for arm in sweeps},
                "L2_loses_more_by": mean_of_tuned(lost[L2].minus(lost[AWS])),
                "best_multiple": {arm: choice.best for arm, choice in choices.items()},
                "multiples_that_resamples_choose": {arm: choice.needed for arm, choice in choices.items()},
                "best_AWS_minus_best_L2": mean_of_tuned(best[AWS].minus(best[L2])),
            }
            measured.details["accuracy"][member] = accuracy
        maps = {
            arm: {
                cell: round(values[0], 2)
                for cell, values in runs.accuracy(self._cells(arm), self.budget.seeds[:1]).items()
            }
            for arm in self._mapped
        }
        if maps:
            known = [mean for cells in maps.values() for mean in cells.values()]
            measured.details.update(maps=maps, low=min(known), high=max(known))
            measured.statistics["map"] = {
                "share_near_the_best": {
                    arm: round(sum(v >= max(known) - NEAR for v in cells.values()) / len(cells), 3)
                    for arm, cells in maps.items()
                }
            }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """L2 loses more for all, some or no members."""
        return all_some_none(
            above(measured.statistics[member]["L2_loses_more_by"]) for member in self.budget.members
        )

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        return {f"{member} / L2_loses_more_by": (0.0,) for member in self.budget.members}

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        more = {m: measured.statistics[m]["L2_loses_more_by"] for m in self.budget.members}
        return f"L2 loses {in_short(more, '+.1f')} points more"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show accuracy by coefficient, and the maps."""
        plots, tables, sentences = [], [], []
        for member, accuracy in measured.details["accuracy"].items():
            statistics = measured.statistics[member]
            lost = statistics["lost"]
            title = f"Test accuracy{{}} by coefficient ({family(member)})"
            plots.append(
                Plot(
                    title.format(""),
                    "coefficient, in 3/Σlr (the same pull at norm 1)",
                    "test accuracy (%)",
                    [Series.over_seeds(arm, at) for arm, at in accuracy.items()],
                    log_x=True,
                )
            )
            columns = ["rule", *(f"×{m:.3g}" for m in accuracy[L2]), "lost on average (points)"]
            rows = [
                [arm, *(str(mean_with_interval(values)) for values in at.values()), str(lost[arm])]
                for arm, at in accuracy.items()
            ]
            tables.append(Table(title.format(" (%)"), columns, rows))
            middle = statistics["median_lost"]
            sentences.append(
                f"With {family(member)}, over five decades of the coefficient L2 loses {lost[L2]} points on "
                f"average against its best (at the median coefficient {middle[L2]:.1f}), AWS {lost[AWS]} "
                f"({middle[AWS]:.1f}): L2 loses {statistics['L2_loses_more_by']:+.1f} more; at their best, "
                f"AWS is {statistics['best_AWS_minus_best_L2']:+.1f} points from L2."
            )
        if self._mapped:
            near = measured.statistics["map"]["share_near_the_best"]
            sentences.append(
                f"Of the pairs of learning rate and coefficient, {100 * near[L2]:.0f} % are within {NEAR:g} "
                f"points of the best under L2, {100 * near[AWS]:.0f} % under AWS, {100 * near[SPHERE]:.0f} % "
                "of radii on a sphere."
            )
        return Exhibits(" ".join(sentences), plots, tables, maps=self._maps(measured))

    @property
    def _mapped(self) -> tuple[str, ...]:
        """The rules of the map, in the full budget only: it decides nothing."""
        return (L2, AWS, SPHERE) if self.budget.full else ()

    def _sweep(self, member: str, arm: str) -> dict[float, TrainRun]:
        base = with_arm(replace(self.budget.small, member=member), arm)
        return {multiple: times(base, multiple) for multiple in MULTIPLES[self.budget.name]}

    def _cells(self, arm: str) -> dict[tuple[float, float], TrainRun]:
        """Return the settings of a map by learning rate and multiple."""
        base = with_arm(replace(self.budget.small, member=self.first), arm)
        cells = {}
        for lr in RATES:
            for multiple in MAP_MULTIPLES:
                run = replace(base, lr=lr)
                if arm == SPHERE:
                    radius = float(multiple**-0.25)
                    cells[lr, multiple] = scaled(run.with_rule(nw.Sphere(radius)), radius)
                else:
                    cells[lr, multiple] = times(run, multiple)
        return cells

    def _maps(self, measured: Measured) -> list[HeatMap]:
        rates, multiples = RATES, MAP_MULTIPLES
        return [
            HeatMap(
                f"Test accuracy (%) over the learning rate: {arm}",
                "learning rate",
                "radius" if arm == SPHERE else "coefficient, in 3/Σlr at learning rate 0.1",
                [f"{lr:g}" for lr in rates],
                [f"{m**-0.25:.2f}" if arm == SPHERE else f"{m:.3g}" for m in multiples],
                [[cells[lr, multiple] for lr in rates] for multiple in multiples],
                "%",
                measured.details["low"],
                measured.details["high"],
            )
            for arm, cells in measured.details["maps"].items()
        ]


def _lost(accuracy: Mapping[float, Sequence[float]]) -> dict[float, list[float]]:
    """Return, for each coefficient that may be the best one, what is lost on average over all, by seed."""
    means = [sum(of_seed) / len(of_seed) for of_seed in zip(*accuracy.values(), strict=True)]
    return {
        multiple: [top - mean for top, mean in zip(values, means, strict=True)]
        for multiple, values in accuracy.items()
    }


def _median_lost(accuracy: Mapping[float, Sequence[float]], best: float) -> float | None:
    """Return the median over the coefficients of what is lost at each, in means over seeds."""
    means = {multiple: sum(values) / len(values) for multiple, values in accuracy.items()}
    return median([means[best] - mean for mean in means.values()])


CLAIM = Coefficient
