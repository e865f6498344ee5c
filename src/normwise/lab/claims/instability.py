"""Claim: L2 on normalised weights makes training unstable, and AWS is more stable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import (
    Condition,
    Verdict,
    above,
    all_of,
    all_some_none,
    any_of,
    below,
    negated,
)
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import GUESSING_ACCURACY, FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, NONE, with_arm
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.train import TrainRun

DTYPES = {"quick": ("float32",), "full": ("float32", "float16", "bfloat16")}
DEAD: dict[str, nw.Rule] = {
    L2: nw.L2(0.5),
    AWS: nw.AdaptiveWeightShrink(0.5),
    "ε-shifted L2": nw.EpsilonShiftedL2(0.5, epsilon=1e-3),
    "sphere": nw.Sphere(1.0),
}
MULTIPLES = (1, 10, 100, 1000)
MODES = {"quick": ("flow",), "full": ("flow", "explicit", "coupled")}
PRECISIONS = {"quick": ("float16",), "full": ("float16", "bfloat16")}
NORMS = (1e-4, 1e4)
TINY = (NONE, L2, AWS)
LOSS = 3.0  # points of test accuracy


class Instability(Claim):
    """The class attributes are the pre-registration."""

    id = "instability"
    order = 6
    failures_are_the_subject = True
    title = "Training instability"
    source = (
        "Li, Chen & Yang, AAAI 2020: with L2 the gradient grows as 1/‖W‖, down to float overflow, and "
        "training is unstable; AWS is more stable."
    )
    question = (
        "Where does L2 on normalised weights break training or its arithmetic, does AWS with the same pull "
        "hold there, and where does AWS not help?"
    )
    arms = (
        "(a) Dead units: norm 1, gradient 0, 2500 steps of lr·λ = 0.05 by the flows of L2, AWS, ε-shift (ε = "
        "0.001) and a sphere, weights in float32 and (full budget) float16, bfloat16 (one seed: only the "
        "start is random). (b) Large coefficients: L2 and AWS, 1, 10, 100, 1000 times the coefficient 3/Σlr "
        "(coupled: times 1 − 0.9), mode flow and (full budget) explicit and coupled, 3 epochs of half of the "
        "images, quick 4 seeds. (c) For the first member, "
        "float16 autocast with a GradScaler and (full budget) bfloat16 autocast, initial norms 1e-4 and 1e4, "
        "L2 and AWS at 3/Σlr, 2 epochs. (d) Over-trained: 100 images, batches of 25, 100 epochs, learning "
        "rate 0.4; no decay, L2, AWS."
    )
    statistic = (
        "(a) The step at which torch's own weight normalisation is not finite. (b) Test accuracy, AWS "
        "minus L2 in points, paired by seed with a 95 % interval; a run that does not finish counts as "
        f"{GUESSING_ACCURACY:g} %. (c) Steps skipped by the scaler and runs that did not finish, over all "
        "cells and seeds. (d) Losses above twice the median of the 20 before and 0.5 above it; L2 minus "
        "AWS, paired, with an interval."
    )
    rule = (
        "(a) holds where in float32 torch's formula fails under L2 and under no other rule. (b) holds "
        f"where in mode flow AWS is ahead by more than {LOSS:g} points, with its interval, at some multiple "
        "from 10, and behind by as much at none. (c) holds where L2 has more runs that did not finish, or "
        "as many and more skipped steps. (d) holds where the interval is above 0, and does not where it is "
        "below. Reproduced: all four, for every member. Partly: some. Not reproduced: none. Undecided: "
        "where an interval contains its threshold and that matters."
    )

    def runs(self) -> list[Run]:
        """The dead units, and the three kinds of training with all seeds."""
        wanted: list[Run] = [*self._dead().values()]
        for member in self.budget.members:
            wanted += over_seeds(self._large(member).values(), self._large_seeds)
            wanted += over_seeds(self._tiny(member).values(), self.budget.seeds)
        return wanted + over_seeds(self._autocast().values(), self._autocast_seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Measure the four parts."""
        fails = sorted(
            rule
            for (rule, dtype), run in self._dead().items()
            if dtype == "float32" and runs[run].get("torch_fails_at") is not None
        )
        measured = Measured(
            {"dead": {"fails": fails, "holds": fails == [L2]}}, {"accuracy": {}, "spikes": {}}
        )
        measured.statistics["autocast"] = self._count_autocast(runs)
        for member in self.budget.members:
            accuracy = runs.accuracy(self._large(member), self._large_seeds)
            gains = {
                mode: {k: paired_difference(accuracy[AWS, mode, k], accuracy[L2, mode, k]) for k in MULTIPLES}
                for mode in MODES[self.budget.name]
            }
            flow = gains["flow"]
            ahead = any_of(above(flow[k], LOSS) for k in MULTIPLES[1:])
            behind = any_of(below(flow[k], -LOSS) for k in MULTIPLES)
            spikes = {
                arm: runs.values("spikes", run, self.budget.seeds) for arm, run in self._tiny(member).items()
            }
            fewer = paired_difference(spikes[L2], spikes[AWS])
            measured.statistics[member] = {
                "large": {
                    "AWS_minus_L2": {
                        mode: {str(k): gain for k, gain in by_multiple.items()}
                        for mode, by_multiple in gains.items()
                    },
                    "holds": all_of([ahead, negated(behind)]),
                },
                "spikes": {"L2_minus_AWS": fewer, "holds": above(fewer)},
            }
            measured.details["accuracy"][member] = accuracy
            measured.details["spikes"][member] = spikes
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """All, some or none of the four parts hold."""
        return all_some_none(self._parts(measured))

    def _parts(self, measured: Measured) -> list[Condition]:
        parts = [measured.statistics["dead"], measured.statistics["autocast"]]
        for member in self.budget.members:
            parts += measured.statistics[member].values()
        return [part["holds"] for part in parts]

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {}
        for member in self.budget.members:
            found |= {f"{member} / large / AWS_minus_L2 / flow / {k}": (LOSS, -LOSS) for k in MULTIPLES}
            found[f"{member} / spikes / L2_minus_AWS"] = (0.0,)
        return found

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        flow = measured.statistics[self.first]["large"]["AWS_minus_L2"]["flow"]
        parts = self._parts(measured)
        last = MULTIPLES[-1]
        return f"{parts.count(True)} of {len(parts)} parts; {flow[str(last)]:+.0f} points at λ × {last}"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the four parts."""
        plots, tables = [self._dead_plot(runs)], [self._dead_table(runs)]
        notes = [
            "Dead units: a normal run is far from this. With a coefficient of 3/Σlr L2 leaves e⁻³ of a dead "
            "unit; torch's formula in float32 fails below norms of some 1e-22, after 17 such budgets. "
            "They need not reach 0: a step of less than half the smallest number is rounded away.",
        ]
        for member in self.budget.members:
            accuracy = measured.details["accuracy"][member]
            plots.append(_large_plot(member, accuracy))
            tables.append(self._large_table(runs, member, accuracy))
            if member == self.first:
                tables.append(self._autocast_table(runs))
            rows = [
                [arm, ", ".join(map(str, counts)), round(mean_with_interval(counts).mean, 2)]
                for arm, counts in measured.details["spikes"][member].items()
            ]
            title = f"Loss spikes in over-trained networks ({family(member)})"
            tables.append(Table(title, ["rule", "spikes by seed", "mean"], rows))
            spikes = measured.statistics[member]["spikes"]
            notes.append(
                f"{family(member)}: loss spikes on tiny data, L2 minus AWS: {spikes['L2_minus_AWS']} a run."
            )
        traced = {a: replace(run, seed=self.budget.seeds[0]) for a, run in self._tiny(self.first).items()}
        traces = layer_curves(runs, traced, f"over-trained, seed {self.budget.seeds[0]}")
        return Exhibits(self._answer(measured.statistics), plots, tables, notes, traces=traces)

    def _answer(self, statistics: dict[str, Any]) -> str:
        failed, skipped = (statistics["autocast"][key] for key in ("did_not_finish", "skipped_steps"))
        dead = " and ".join(statistics["dead"]["fails"]) or "no rule"
        sentences = [f"Dead units in float32 come to break torch's own weight normalisation under {dead}."]
        for member in self.budget.members:
            flow = statistics[member]["large"]["AWS_minus_L2"]["flow"]
            gains = ", ".join(f"{gain:+.1f} at {multiple} times" for multiple, gain in flow.items())
            spikes = statistics[member]["spikes"]["L2_minus_AWS"]
            sentences.append(
                f"With {family(member)} and larger coefficients AWS minus L2 in test accuracy is {gains} the "
                f"usual one; over-trained networks have {spikes:+.1f} more loss spikes under L2."
            )
        sentences.append(
            f"Under autocast {failed[L2]} runs of L2 and {failed[AWS]} of AWS fail, with {skipped[L2]} and "
            f"{skipped[AWS]} skipped steps."
        )
        return " ".join(sentences)

    # (a) dead units

    def _dead(self) -> dict[tuple[str, str], DeadUnitsRun]:
        return {
            (name, dtype): DeadUnitsRun(rule=rule.settings(), dtype=dtype, seed=self.budget.seeds[0])
            for name, rule in DEAD.items()
            for dtype in DTYPES[self.budget.name]
        }

    def _dead_plot(self, runs: FinishedRuns) -> Plot:
        series = [
            Series.over_steps(
                f"{rule}, {dtype}",
                runs.metrics(run),
                "norm",
                dashed=DTYPES["full"].index(dtype),
                color=list(DEAD).index(rule),
            )
            for (rule, dtype), run in self._dead().items()
            if runs.status(run) == "finished"
        ]
        return Plot("Norm of dead units under decay", "step", "norm", series, log_y=True)

    def _dead_table(self, runs: FinishedRuns) -> Table:
        rows = []
        for (rule, dtype), run in self._dead().items():
            found = runs[run]
            smallest = found.get("smallest_norm")
            end = found["status"] if smallest is None else f"{smallest:.1e}"
            steps = (found.get(key) for key in ("zero_at", "torch_fails_at", "ours_fails_at"))
            rows.append([rule, dtype, end, *("never" if step is None else step for step in steps)])
        columns = ["rule", "weights", "norm at the end", "norm 0 at step"]
        columns += ["torch._weight_norm fails at step", "normwise fails at step"]
        return Table("Units without gradient, 2500 steps of lr·λ = 0.05", columns, rows)

    # (b) large coefficients

    @property
    def _large_seeds(self) -> tuple[int, ...]:
        """Four at least: accuracies far from the best vary much."""
        return self.budget.at_least(4)

    def _large(self, member: str) -> dict[tuple[str, str, int], TrainRun]:
        """Return the settings by rule, mode and multiple."""
        base = replace(self.budget.small, member=member, epochs=3)
        cells = {}
        for arm, rule_class in ((L2, nw.L2), (AWS, nw.AdaptiveWeightShrink)):
            for mode in MODES[self.budget.name]:
                for multiple in MULTIPLES:
                    strong = nw.AdaptiveWeightShrink.for_budget(base.total_time, strength=3.0 * multiple)
                    rule = nw.theory.match(strong, rule_class, momentum=base.momentum, to_mode=mode)
                    cells[arm, mode, multiple] = base.with_rule(rule, mode)
        return cells

    def _large_table(
        self, runs: FinishedRuns, member: str, accuracy: dict[tuple[str, str, int], list[float]]
    ) -> Table:
        rows: list[list[str | int]] = []
        for cell, run in self._large(member).items():
            ends = [summary["status"] for summary in runs.summaries(run, self._large_seeds)]
            counts = [ends.count(end) for end in ("finished", "refused", "not finite")]
            rows.append([*cell, str(mean_with_interval(accuracy[cell])), *counts])
        columns = ["rule", "mode", "multiple", "accuracy (%)", "finished", "refused", "not finite"]
        return Table(f"Large coefficients ({family(member)})", columns, rows)

    # (c) autocast: of the first member only, as half precision takes long on a CPU

    @property
    def _autocast_seeds(self) -> tuple[int, ...]:
        """One seed in the quick budget: half precision takes a CPU ten times as long."""
        return self.budget.seeds if self.budget.full else self.budget.seeds[:1]

    def _autocast(self) -> dict[tuple[str, str, float], TrainRun]:
        """Return the settings by rule, precision and initial norm."""
        base = replace(self.budget.small, member=self.first, epochs=2)
        return {
            (arm, precision, norm): with_arm(replace(base, precision=precision, init_scale=norm), arm)
            for arm in (L2, AWS)
            for precision in PRECISIONS[self.budget.name]
            for norm in NORMS
        }

    def _autocast_rows(self, runs: FinishedRuns) -> list[list[Any]]:
        """Return, for each cell, rule, precision, norm, accuracy, failed runs and skipped steps."""
        rows = []
        for (arm, precision, norm), run in self._autocast().items():
            summaries = runs.summaries(run, self._autocast_seeds)
            failed = sum(summary["status"] != "finished" for summary in summaries)
            skipped = sum(summary.get("skipped_steps", 0) for summary in summaries)
            accuracy = mean_with_interval(runs.scores(run, self._autocast_seeds))
            rows.append([arm, precision, f"{norm:g}", str(accuracy), failed, skipped])
        return rows

    def _count_autocast(self, runs: FinishedRuns) -> dict[str, Any]:
        rows = self._autocast_rows(runs)
        failed, skipped = (
            {arm: sum(row[column] for row in rows if row[0] == arm) for arm in (L2, AWS)}
            for column in (-2, -1)
        )
        worse = (failed[L2], skipped[L2]) > (failed[AWS], skipped[AWS])
        return {"did_not_finish": failed, "skipped_steps": skipped, "holds": worse}

    def _autocast_table(self, runs: FinishedRuns) -> Table:
        columns = ["rule", "precision", "initial norm", "accuracy (%)", "did not finish", "skipped steps"]
        return Table(f"Autocast, over all seeds ({family(self.first)})", columns, self._autocast_rows(runs))

    # (d) over-trained

    def _tiny(self, member: str) -> dict[str, TrainRun]:
        base = replace(self.budget.small, member=member, train_size=100, batch_size=25, epochs=100, lr=0.4)
        return {arm: with_arm(base, arm) for arm in TINY}


def _large_plot(member: str, accuracy: dict[tuple[str, str, int], list[float]]) -> Plot:
    series = [
        Series.over_seeds(
            f"{arm}, {mode}",
            {float(k): accuracy[arm, mode, k] for k in MULTIPLES},
            dashed=MODES["full"].index(mode),
            color=color,
        )
        for color, arm in enumerate((L2, AWS))
        for mode in dict.fromkeys(mode for _, mode, _ in accuracy)
    ]
    title = f"Test accuracy by coefficient ({family(member)}); not finished: {GUESSING_ACCURACY:g} %"
    return Plot(title, "times 3/Σlr", "test accuracy (%)", series, log_x=True)


CLAIM = Instability
