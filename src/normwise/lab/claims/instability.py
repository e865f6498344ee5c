"""Claim: L2 on normalised weights makes training unstable, and AWS is more stable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.traces import traces
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, NONE, with_arm
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.train import TrainRun

DTYPES = ("float32", "float16", "bfloat16")
DEAD: dict[str, nw.Rule] = {
    L2: nw.L2(0.5),
    AWS: nw.AdaptiveWeightShrink(0.5),
    "ε-shifted L2": nw.EpsilonShiftedL2(0.5, epsilon=1e-3),
    "sphere": nw.Sphere(1.0),
}
MULTIPLES = (1, 10, 100, 1000)
MODES = ("flow", "explicit", "coupled")
PRECISIONS = {"quick": ("float16",), "full": ("float16", "bfloat16")}
NORMS = (1e-4, 1e4)
TINY = (NONE, L2, AWS)
LOSS = 3.0  # points of test accuracy
CHANCE = 10.0  # per cent: what a run that does not finish counts as


class Instability(Claim):
    """See the texts."""

    id = "instability"
    order = 6
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
        "0.001) and a sphere, weights in float32, float16, bfloat16 (one seed: only the start is random). "
        "(b) Large coefficients: L2 and AWS, 1, 10, 100, 1000 times the coefficient 3/Σlr (coupled: times "
        "1 − 0.9), modes flow, explicit and coupled, 3 epochs of half of the images. (c) For the "
        "first member, float16 autocast with a GradScaler and (full budget) bfloat16 autocast, initial norms "
        "1e-4 and 1e4, L2 and AWS at 3/Σlr, 2 epochs. "
        "(d) Over-trained: 100 images, batches of 25, 100 epochs, learning rate 0.4; no decay, L2, AWS."
    )
    statistic = (
        "(a) The step at which torch's own weight normalisation is not finite. (b) Test accuracy, AWS minus "
        f"L2 in points, paired by seed with a 95 % interval; a run that does not finish counts as {CHANCE:g} "
        "%. (c) Steps skipped by the scaler and runs that did not finish, over all cells and seeds. (d) "
        "Losses above twice the median of the 20 before and 0.5 above it; L2 minus AWS, paired, with an "
        "interval."
    )
    rule = (
        "(a) holds where in float32 torch's formula fails under L2 and under no other rule. (b) holds where "
        f"in mode flow AWS is ahead by {LOSS:g} points with an interval above 0 at some multiple from 10, "
        "and behind by as much with an interval below 0 at none. (c) holds where L2 has more runs that did "
        "not finish, or as many and more skipped steps. (d) holds where the interval is above 0. Reproduced: "
        "all four, for every member. Partly: some. Not "
        "reproduced: none."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """The dead units, and the three kinds of training for all seeds."""
        trained = [
            run
            for member in budget.members
            for cells in (_large(budget, member), _tiny(budget, member))
            for run in cells.values()
        ]
        wanted: list[Run] = [replace(run, seed=seed) for run in trained for seed in budget.seeds]
        half = _half(budget, budget.members[0]).values()
        wanted += [replace(run, seed=seed) for run in half for seed in _autocast_seeds(budget)]
        return [*_dead(budget).values(), *wanted]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Judge the four parts."""
        dead = {cell: runs[run] for cell, run in _dead(budget).items()}
        failing = {rule for rule in DEAD if dead[rule, "float32"].get("torch_fails_at") is not None}
        statistics: dict[str, Any] = {"dead": {"fails": sorted(failing), "holds": failing == {L2}}}
        holds: list[bool] = [failing == {L2}]
        plots = [_dead_plot(budget, runs)]
        tables = [_dead_table(dead)]
        notes = [
            "Dead units: a normal run is far from this. With a coefficient of 3/Σlr L2 leaves e⁻³ of a dead "
            "unit; torch's formula in float32 fails below norms of some 1e-22, after 17 such budgets. "
            "They need not reach 0: a step of less than half the smallest number is rounded away.",
        ]
        for member in budget.members:
            family = member.replace("_", " ")
            large, rows, by_arm = self._judge_large(budget, runs, member)
            plots.append(_large_plot(family, by_arm))
            columns = ["rule", "mode", "multiple", "accuracy (%)", "finished", "refused", "not finite"]
            tables.append(Table(f"Large coefficients ({family})", columns, rows))
            if member == budget.members[0]:
                half, rows = _judge_half(budget, runs, member)
                statistics["autocast"] = half
                holds.append(half["holds"])
                columns = [
                    "rule",
                    "precision",
                    "initial norm",
                    "accuracy (%)",
                    "did not finish",
                    "skipped steps",
                ]
                tables.append(Table(f"Autocast, over all seeds ({family})", columns, rows))
            tiny_runs = _tiny(budget, member).items()
            spikes = {arm: runs.values("spikes", run, budget.seeds) for arm, run in tiny_runs}
            fewer = paired_difference(spikes[L2], spikes[AWS])
            tables.append(
                Table(
                    f"Loss spikes in over-trained networks ({family})",
                    ["rule", "spikes by seed", "mean"],
                    [
                        [a, ", ".join(map(str, v)), round(mean_with_interval(v).mean, 2)]
                        for a, v in spikes.items()
                    ],
                )
            )
            if not fewer.low > 0:
                notes.append(
                    f"{family}: AWS does not help against loss spikes on tiny data: L2 minus AWS is {fewer} "
                    f"spikes."
                )
            tiny: dict[str, Any] = {"L2_minus_AWS": fewer.as_dict(), "holds": bool(fewer.low > 0)}
            statistics[member] = {"large": large, "spikes": tiny}
            holds += [large["holds"], tiny["holds"]]
        verdict: Verdict = "reproduced" if all(holds) else "partly" if any(holds) else "not reproduced"
        first = budget.members[0]
        traced = {a: replace(run, seed=budget.seeds[0]) for a, run in _tiny(budget, first).items()}
        return Finding(
            verdict,
            _answer(statistics, first),
            statistics,
            plots,
            tables,
            notes,
            traces=traces(runs, traced, f"over-trained, seed {budget.seeds[0]}"),
        )

    def _judge_large(self, budget: Budget, runs: Runs, member: str) -> tuple[dict[str, Any], Any, Any]:
        cells = _large(budget, member)
        accuracy = {
            cell: [CHANCE if v is None else v for v in runs.points("test_accuracy", run, budget.seeds)]
            for cell, run in cells.items()
        }
        gains = {
            mode: {k: paired_difference(accuracy[AWS, mode, k], accuracy[L2, mode, k]) for k in MULTIPLES}
            for mode in MODES
        }
        flow = gains["flow"]
        ahead = any(flow[k].mean >= LOSS and flow[k].low > 0 for k in MULTIPLES[1:])
        behind = any(flow[k].mean <= -LOSS and flow[k].high < 0 for k in MULTIPLES)
        rows = []
        for (arm, mode, multiple), run in cells.items():
            ends = [runs[replace(run, seed=seed)]["status"] for seed in budget.seeds]
            counts = [ends.count(end) for end in ("finished", "refused", "not finite")]
            rows.append(
                [arm, mode, multiple, str(mean_with_interval(accuracy[arm, mode, multiple])), *counts]
            )
        found = {mode: {str(k): gain.as_dict() for k, gain in by.items()} for mode, by in gains.items()}
        return {"AWS_minus_L2": found, "holds": ahead and not behind}, rows, accuracy


def _judge_half(budget: Budget, runs: Runs, member: str) -> tuple[dict[str, Any], Any]:
    failed, skipped = {L2: 0, AWS: 0}, {L2: 0, AWS: 0}
    rows = []
    for (arm, precision, norm), run in _half(budget, member).items():
        found = [runs[replace(run, seed=seed)] for seed in _autocast_seeds(budget)]
        failures = sum(one["status"] != "finished" for one in found)
        skips = sum(one.get("skipped_steps", 0) for one in found)
        failed[arm], skipped[arm] = failed[arm] + failures, skipped[arm] + skips
        accuracy = mean_with_interval(runs.points("test_accuracy", run, _autocast_seeds(budget)))
        rows.append([arm, precision, f"{norm:g}", str(accuracy), failures, skips])
    worse = (failed[L2], skipped[L2]) > (failed[AWS], skipped[AWS])
    return {"did_not_finish": failed, "skipped_steps": skipped, "holds": worse}, rows


def _autocast_seeds(budget: Budget) -> tuple[int, ...]:
    """Half precision takes a CPU ten times as long: one seed in the quick budget."""
    return budget.seeds if budget.full else budget.seeds[:1]


def _dead(budget: Budget) -> dict[tuple[str, str], DeadUnitsRun]:
    return {
        (name, dtype): DeadUnitsRun(rule=rule.settings(), dtype=dtype, seed=budget.seeds[0])
        for name, rule in DEAD.items()
        for dtype in DTYPES
    }


def _large(budget: Budget, member: str) -> dict[tuple[str, str, int], TrainRun]:
    base = replace(budget.small, member=member, epochs=3)
    cells = {}
    for arm, kind in ((L2, nw.L2), (AWS, nw.AdaptiveWeightShrink)):
        for mode in MODES:
            for multiple in MULTIPLES:
                strong = nw.AdaptiveWeightShrink.for_budget(base.total_time, strength=3.0 * multiple)
                rule = nw.theory.match(strong, kind, momentum=base.momentum, to_mode=mode)
                cells[arm, mode, multiple] = base.with_rule(rule, mode)
    return cells


def _half(budget: Budget, member: str) -> dict[tuple[str, str, float], TrainRun]:
    """Return the runs under autocast: of the first member only, as a CPU takes long over them."""
    if member != budget.members[0]:
        return {}
    base = replace(budget.small, member=member, epochs=2)
    return {
        (arm, precision, norm): with_arm(replace(base, precision=precision, init_scale=norm), arm)
        for arm in (L2, AWS)
        for precision in PRECISIONS[budget.name]
        for norm in NORMS
    }


def _tiny(budget: Budget, member: str) -> dict[str, TrainRun]:
    base = replace(budget.small, member=member, train_size=100, batch_size=25, epochs=100, lr=0.4)
    return {arm: with_arm(base, arm) for arm in TINY}


def _dead_plot(budget: Budget, runs: Runs) -> Plot:
    series = []
    for (rule, dtype), run in _dead(budget).items():
        if runs[run]["status"] == "finished":
            lines = runs.metrics(run)
            steps, norms = [line["step"] for line in lines], [line["norm"] or None for line in lines]
            label = f"{rule}, {dtype}"
            series.append(
                Series(label, steps, norms, dashed=dtype != DTYPES[0], color=list(DEAD).index(rule))
            )
    return Plot("Norm of dead units under decay", "step", "norm", series, log_y=True)


def _dead_table(dead: dict[tuple[str, str], dict[str, Any]]) -> Table:
    keys = ("smallest_norm", "zero_at", "torch_fails_at", "ours_fails_at")
    rows = []
    for (rule, dtype), found in dead.items():
        smallest, *steps = (found.get(key) for key in keys)
        shown = found["status"] if smallest is None else f"{smallest:.1e}"
        rows.append([rule, dtype, shown, *("never" if step is None else step for step in steps)])
    columns = ["rule", "weights", "norm at the end", "norm 0 at step"]
    columns += ["torch._weight_norm fails at step", "normwise fails at step"]
    return Table("Units without gradient, 2500 steps of lr·λ = 0.05", columns, rows)


def _large_plot(family: str, accuracy: dict[tuple[str, str, int], list[float]]) -> Plot:
    series = []
    for arm in (L2, AWS):
        for mode in MODES:
            at = {float(k): accuracy[arm, mode, k] for k in MULTIPLES}
            dashed = mode != "flow"
            series.append(Series.over(f"{arm}, {mode}", at, dashed, (L2, AWS).index(arm)))
    title = f"Test accuracy by coefficient ({family}); not finished: {CHANCE:g} %"
    return Plot(title, "times 3/Σlr", "test accuracy (%)", series, log_x=True)


def _answer(statistics: dict[str, Any], member: str) -> str:
    found = statistics[member]
    gain = found["large"]["AWS_minus_L2"]["flow"]
    gains = ", ".join(f"{gain[str(k)]['mean']:.1f} at {k} times" for k in MULTIPLES)
    failed, skipped = (statistics["autocast"][key] for key in ("did_not_finish", "skipped_steps"))
    dead = " and ".join(statistics["dead"]["fails"]) or "no rule"
    return (
        f"Dead units in float32 come to break torch's own weight normalisation under {dead}. With larger "
        f"coefficients AWS minus L2 in test accuracy is {gains} the usual one; under autocast {failed[L2]} "
        f"runs of L2 and {failed[AWS]} of AWS fail, with {skipped[L2]} and {skipped[AWS]} skipped steps; "
        f"loss spikes of over-trained networks are {'fewer' if found['spikes']['holds'] else 'no fewer'} "
        "under AWS."
    )


CLAIM = Instability()
