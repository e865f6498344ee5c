"""Claim: AWS is less sensitive to its coefficient than L2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, HeatMap, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.tuning import chosen
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, SPHERE, scaled, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.train import TrainRun

MULTIPLES = {  # five decades
    "quick": tuple(10 ** (k / 2) for k in range(-5, 6, 2)),
    "full": tuple(10 ** (k / 2) for k in range(-5, 6)),
}
RATES = {"quick": (0.025, 0.1, 0.4), "full": (0.00625, 0.025, 0.1, 0.4, 1.6)}
MAP_MULTIPLES = {
    "quick": (0.01, 1.0, 100.0),
    "full": tuple(10 ** (k / 2) for k in range(-4, 5)),
}
NEAR = 2.0  # points from the best


class Coefficient(Claim):
    """See the texts."""

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
        "L2 and AWS by their flows, with 11 (quick budget: 6) coefficients from 1/316 to 316 times 3/Σlr; at "
        "each the two have the same pull at norm 1, where all units start. The map: learning rates against "
        "coefficients (multiples of 3/Σlr at the learning rate 0.1, the same number in every column) for L2 "
        "and AWS, and against the radius for a sphere (the same multiples, −1/4 power: the radius at which "
        "the effective learning rate is that of L2's equilibrium). SGD with momentum 0.9 and a cosine, half "
        "of the images."
    )
    statistic = (
        "The loss of a rule: test accuracy at the coefficient that is best on validation images (other "
        "seeds), minus the mean test accuracy over all of them. L2's loss minus that of AWS, paired by seed, "
        "with a 95 % interval by Student's t. Beside it: the difference of the two best, and the share of "
        f"cells of the map within {NEAR:g} points of the best of all rules (reported, not judged)."
    )
    rule = (
        "Reproduced: for every member L2 loses more "
        "than AWS, with an interval above 0. Partly: for some. Not reproduced: for none."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """Sweeps for all members, with seeds of tuning beside; the map for the first member."""
        sweep: list[Run] = [
            replace(run, seed=seed)
            for member in budget.members
            for arm in (L2, AWS)
            for run in self._sweep(budget, member, arm).values()
            for seed in (*_seeds(budget, member), *budget.tuning_seeds)
        ]
        mapped: list[Run] = [
            replace(run, seed=seed)
            for arm in (L2, AWS, SPHERE)
            for run in self._map(budget, arm).values()
            for seed in self._map_seeds(budget)
        ]
        return sweep + mapped

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare what is lost."""
        plots, tables, conditions = [], [], []
        statistics: dict[str, Any] = {}
        for member in budget.members:
            family = member.replace("_", " ")
            seeds = _seeds(budget, member)
            accuracy: dict[str, dict[float, list[float | None]]] = {}
            losses: dict[str, list[float | None]] = {}
            best: dict[str, float] = {}
            for arm in (L2, AWS):
                sweep = self._sweep(budget, member, arm)
                accuracy[arm] = {m: runs.points("test_accuracy", run, seeds) for m, run in sweep.items()}
                best[arm] = chosen(runs, sweep, budget.tuning_seeds)
                losses[arm] = [_lost(accuracy[arm], best[arm], k) for k in range(len(seeds))]
            gain = paired_difference(losses[L2], losses[AWS])
            peaks = paired_difference(accuracy[AWS][best[AWS]], accuracy[L2][best[L2]])
            conditions.append(gain.low > 0)
            statistics[member] = {
                "lost": {arm: mean_with_interval(values).as_dict() for arm, values in losses.items()},
                "L2_loses_more_by": gain.as_dict(),
                "best_multiple": best,
                "best_AWS_minus_best_L2": peaks.as_dict(),
            }
            plots.append(_plot(family, accuracy))
            tables.append(_table(family, accuracy, losses))
        maps, near = self._maps(budget, runs)
        statistics["map"] = {"share_near_the_best": near}
        verdict: Verdict = (
            "reproduced" if all(conditions) else "partly" if any(conditions) else "not reproduced"
        )
        return Finding(verdict, _answer(statistics, budget), statistics, plots, tables, maps=maps)

    def _sweep(self, budget: Budget, member: str, arm: str) -> dict[float, TrainRun]:
        base = with_arm(replace(budget.small, member=member), arm)
        return {m: times(base, m) for m in MULTIPLES[budget.name]}

    def _map_seeds(self, budget: Budget) -> tuple[int, ...]:
        return budget.seeds[:1]

    def _map(self, budget: Budget, arm: str) -> dict[tuple[float, float], TrainRun]:
        """Return the settings by learning rate and multiple."""
        at_centre = with_arm(replace(budget.small, member=budget.members[0]), arm)
        cells = {}
        for lr in RATES[budget.name]:
            for m in MAP_MULTIPLES[budget.name]:
                run = replace(at_centre, lr=lr)
                if arm == SPHERE:
                    radius = float(m**-0.25)
                    cells[lr, m] = scaled(run.with_rule(nw.Sphere(radius)), radius)
                else:
                    cells[lr, m] = times(run, m)
        return cells

    def _maps(self, budget: Budget, runs: Runs) -> tuple[list[HeatMap], dict[str, float]]:
        rates, multiples = RATES[budget.name], MAP_MULTIPLES[budget.name]
        seeds = self._map_seeds(budget)
        means: dict[str, list[list[float | None]]] = {}
        for arm in (L2, AWS, SPHERE):
            cells = self._map(budget, arm)
            means[arm] = [
                [_mean(runs.points("test_accuracy", cells[lr, m], seeds)) for lr in rates] for m in multiples
            ]
        there = [v for rows in means.values() for row in rows for v in row if v is not None]
        low, high = min(there), max(there)
        near = {
            arm: round(
                sum(v is not None and v >= high - NEAR for row in rows for v in row)
                / (len(rates) * len(multiples)),
                3,
            )
            for arm, rows in means.items()
        }
        maps = [
            HeatMap(
                f"Test accuracy (%) over the learning rate: {arm}",
                "learning rate",
                "radius" if arm == SPHERE else "coefficient, in 3/Σlr at learning rate 0.1",
                [f"{lr:g}" for lr in rates],
                [f"{m**-0.25:.2f}" if arm == SPHERE else f"{m:.3g}" for m in multiples],
                rows,
                "%",
                low,
                high,
            )
            for arm, rows in means.items()
        ]
        return maps, near


def _seeds(budget: Budget, member: str) -> tuple[int, ...]:
    """Five, of members but the first and in the quick budget three: a sweep is long."""
    return budget.seeds if member == budget.members[0] else budget.seeds[:3]


def times(run: TrainRun, multiple: float) -> TrainRun:
    """Return the run with so many times the coefficient."""
    rule = rule_from(run.rule)
    assert rule is not None
    return run.with_rule(replace(rule, coefficient=rule.coefficient * multiple))  # type: ignore[type-var, attr-defined]


def _lost(accuracy: dict[float, list[float | None]], best: float, k: int) -> float | None:
    """Return what the k-th seed loses on the average coefficient against the best."""
    values = [at[k] for at in accuracy.values()]
    top = accuracy[best][k]
    if top is None or any(value is None for value in values):
        return None
    return top - sum(value for value in values if value is not None) / len(values)


def _mean(values: list[float | None]) -> float | None:
    estimate = mean_with_interval(values)
    return round(estimate.mean, 2) if estimate.n else None


def _plot(family: str, accuracy: dict[str, dict[float, list[float | None]]]) -> Plot:
    series = [Series.over(arm, at) for arm, at in accuracy.items()]
    return Plot(
        f"Test accuracy by coefficient ({family})",
        "coefficient, in 3/Σlr (the same pull at norm 1)",
        "test accuracy (%)",
        series,
        log_x=True,
    )


def _table(
    family: str, accuracy: dict[str, dict[float, list[float | None]]], losses: dict[str, list[float | None]]
) -> Table:
    rows = [
        [
            arm,
            *(mean_with_interval(v).short for v in at.values()),
            str(mean_with_interval(losses[arm])),
        ]
        for arm, at in accuracy.items()
    ]
    columns = ["rule", *(f"×{m:.3g}" for m in accuracy[L2]), "lost on average (points)"]
    return Table(f"Test accuracy (%) by coefficient ({family})", columns, rows)


def _answer(statistics: dict[str, Any], budget: Budget) -> str:
    sentences = []
    for member in budget.members:
        found = statistics[member]
        lost = {arm: found["lost"][arm]["mean"] for arm in (L2, AWS)}
        peaks = found["best_AWS_minus_best_L2"]
        sentences.append(
            f"With {member.replace('_', ' ')}, over five decades of the coefficient L2 loses "
            f"{lost[L2]:.1f} points on average against its best, AWS {lost[AWS]:.1f}; at their best, AWS is "
            f"{peaks['mean']:+.1f} [{peaks['low']:+.1f}, {peaks['high']:+.1f}] points from L2."
        )
    near = statistics["map"]["share_near_the_best"]
    sentences.append(
        f"Of the pairs of learning rate and coefficient, {100 * near[L2]:.0f} % are within {NEAR:g} points "
        f"of the best under L2, {100 * near[AWS]:.0f} % under AWS, {100 * near[SPHERE]:.0f} % of radii on a "
        "sphere."
    )
    return " ".join(sentences)


CLAIM = Coefficient()
