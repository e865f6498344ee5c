"""What the start in equilibrium depends on, and what to decay beside it: ablations of the claim no-tuning.

    python -m benchmarks.start_variants RUNS [--tables rest,placement,...] [--out FILE.md]

RUNS is a folder for finished runs: a killed benchmark goes on from there. Accuracies are test accuracies in
points on half of the images of Fashion-MNIST, 7×7 pixels. Losses of the language model are test losses in
nats. Differences are paired by seed, with 95 % intervals.

placement: other ways to measure γ, another clock, and a warm-up, minus ``normwise.attach`` as it is.
training: a constant learning rate, and ten times as many steps: AWS from equilibrium minus the L2 that was
    tuned on validation data in the same cell.
rest: weight decay on the matrices that are not scale-invariant (none by default): S/Σlr, or the usual 5e-4
    (SGD) and 0.1 (AdamW), minus none.
every: decay that is applied every eighth step, minus every step.
scales: AWS from equilibrium, from initial norms over twelve decades.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import normwise as nw
from normwise.decay.start import Start
from normwise.lab.claims.budget import Budget
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.no_tuning import MULTIPLES, SETUPS, TEXT, Cell
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.data.datasets import load
from normwise.lab.engine.execution import Workers, execute, local_workers
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store
from normwise.lab.models.convnet import directions
from normwise.lab.models.gpt import GPT, planned
from normwise.lab.runs.arms import AWS, L2, from_equilibrium, times, with_arm
from normwise.lab.runs.base import OptimizerRun, rule_from
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun
from normwise.units import Unit

SEEDS = range(5)
TUNING_SEEDS = (1000,)
CELLS = (Cell(1.0, 1.0), Cell(0.25, 1e-3), Cell(4.0, 1e3))


@dataclass(frozen=True, kw_only=True)
class ImageVariant(TrainRun):
    """A training run with another start, or with weight decay on the other matrices.

    Attributes:
        warmup: Share of the steps in which the learning rate grows linearly.
        gradients: The number of steps in which γ is measured.
        by_unit: Whether each unit has a γ of its own, in place of the root mean square over its tensor.
        rate_clock: Clock of the Decay.
        every: The number of steps after which decay is applied.
        rest: ``weight_decay`` of the optimizer on matrices that are not scale-invariant.
    """

    warmup: float = 0.0
    gradients: int = 32
    by_unit: bool = False
    rate_clock: str = "lr"
    every: int = 1
    rest: float = 0.0

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return super().lr_at(step) * min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer, with what differs changed."""
        optimizer: Optimizer = replace(self, rule=None).make_plain_optimizer(model)
        others = optimizer.param_groups[0]
        matrices = [p for p in others["params"] if p.numel() > p.shape[0]]
        others["params"] = [p for p in others["params"] if p.numel() == p.shape[0]]
        optimizer.add_param_group({"params": matrices, "weight_decay": self.rest})
        rule = rule_from(self.rule)
        weights = list(directions(model).values())
        if rule is None:
            return optimizer
        if self.start != "equilibrium":
            nw.Decay(optimizer, rule, weights, dim=self.dim, measure=self.measure, every=self.every)
            return optimizer
        decay = nw.attach(
            optimizer,
            weights,
            self.total_time,
            dim=self.dim,
            strength=self.strength,
            rule=type(rule),
            model=model,
        )
        start = decay.start
        assert start is not None
        if any(start.grows_with_gradient):
            start.steps = self.gradients
        if self.by_unit:
            start = StartByUnit(**{f.name: getattr(start, f.name) for f in fields(Start)})
        decay.remove()
        clock = self.rate_clock
        time = self.total_squares / max(map(self.lr_at, range(self.steps)))
        rate = self.strength / (self.total_time if clock == "lr" else time)
        same = type(rule)(rate)  # type: ignore[call-arg]
        nw.Decay(
            optimizer,
            same,
            weights,
            dim=self.dim,
            clock=clock,
            measure="relative",
            every=self.every,
            start=replace(start, readings=[]),
        )
        return optimizer

    def make_plain_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer without a rule."""
        return super().make_optimizer(model)

    def _set_lrs(self, optimizer: Optimizer, step: int) -> float:
        lr = self.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr


class StartByUnit(Start):
    """Places each unit by a γ of its own; units without a gradient stay as they are."""

    def _are_placed(self, members: Iterable[int]) -> bool:
        return True  # each unit decides

    def _factors(self, which: int, unit: Unit, norms: Tensor, gradients: Tensor) -> Tensor:
        norm = self.norms[which]
        if not self.grows_with_gradient[which] or norm is None:
            return super()._factors(which, unit, norms, gradients)
        scales = norms * gradients
        seen = self.__dict__.setdefault("_seen", {}).setdefault(which, [])
        placed = self.__dict__.setdefault("_placed", {})
        seen.append(torch.where(scales > 0, scales, torch.nan).log())
        later = torch.stack(seen[-max(1, len(seen) // 4) :]).nanmean(0)
        before = placed.get(which, torch.full_like(later, torch.inf))
        revised = ((later - before).abs() / 2 > 0.1) & later.isfinite()
        placed[which] = torch.where(revised, later, before)
        return torch.where(revised, norm * (later / 2).exp() / norms, 1.0)


@dataclass(frozen=True, kw_only=True)
class TextVariant(TextRun):
    """A run of the language model with weight decay on the other matrices.

    Attributes:
        rest: ``weight_decay`` of AdamW on matrices that are not scale-invariant.
    """

    rest: float = 0.0

    def make_optimizers(self, model: GPT) -> list[Optimizer]:
        """Return AdamW, with the rule of a run that starts in equilibrium."""
        if not self.rest:
            return super().make_optimizers(model)
        plan = planned(model.token.num_embeddings, *self._architecture).apply_to(model)
        groups = plan.param_groups(weight_decay=self.rest)
        optimizer: Optimizer = AdamW(groups, self.lr, (0.9, self.beta2), fused=True)
        rule = rule_from(self.rule)
        assert rule is not None
        plan.attach(optimizer, self.total_time, strength=self.strength, rule=type(rule))
        return [optimizer]


# -- what is compared ----------------------------------------------------------------------------------------


def variant(run: OptimizerRun, **changes: Any) -> OptimizerRun:
    """Return a run as one of the classes of this file, with changes."""
    kind: type[OptimizerRun] = TextVariant if isinstance(run, TextRun) else ImageVariant
    return kind(**{**{f.name: getattr(run, f.name) for f in fields(run)}, **changes})


def run_of(setup: str, cell: Cell, **changes: Any) -> OptimizerRun:
    """Return the run of a cell of the claim, without decay."""
    budget = Budget.of("full", "fashion-mnist", load("fashion-mnist").fingerprint)
    return variant(SETUPS[setup].run(budget, cell), **changes)


def tuned_l2(run: OptimizerRun) -> dict[float, OptimizerRun]:
    """Return the candidates of L2."""
    if isinstance(run, TextRun):
        plain: OptimizerRun = replace(run, decayed="matrices").with_rule(nw.L2(3.0 / run.total_time))
    else:
        assert isinstance(run, TrainRun)
        plain = with_arm(run, L2)
    return {multiple: times(plain, multiple) for multiple in MULTIPLES}


class Bench:
    """Runs are executed when they are needed, and looked up later."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.store, self.workers = Store(folder), workers

    def done(self, runs: Sequence[Run]) -> FinishedRuns:
        """Execute the runs that are missing."""

        def progress(done: int, total: int, share: float) -> None:
            if total and (done == total or done % 20 == 0):
                print(f"{done} of {total} runs", flush=True)

        return FinishedRuns(execute(runs, self.store, self.workers, progress, print), self.store)

    def scores(self, run: OptimizerRun, seeds: Sequence[int] = SEEDS, part: str = "test") -> list[float]:
        """Return accuracy in points or loss in nats for each seed; guessing for what does not finish."""
        runs = self.done(over_seeds([run], seeds))
        if isinstance(run, TextRun):
            return [math.log(30) if v is None else v for v in runs.values(f"{part}_loss", run, seeds)]
        return [10.0 if v is None else 100 * v for v in runs.values(f"{part}_accuracy", run, seeds)]

    def best(self, candidates: Mapping[float, OptimizerRun]) -> OptimizerRun:
        """Return the candidate with the best validation score."""
        self.done(over_seeds(candidates.values(), TUNING_SEEDS))
        sign = -1 if isinstance(next(iter(candidates.values())), TextRun) else 1
        means = {m: sign * sum(self.scores(run, TUNING_SEEDS, "validation")) for m, run in candidates.items()}
        return candidates[max(means, key=lambda m: means[m])]

    def difference(self, run: OptimizerRun, other: OptimizerRun, seeds: Sequence[int] = SEEDS) -> str:
        """Return the difference of two runs with its interval."""
        self.done(over_seeds([run, other], seeds))
        decimals = 3 if isinstance(run, TextRun) else 2
        found = paired_difference(self.scores(run, seeds), self.scores(other, seeds))
        return f"{found.mean:+.{decimals}f} [{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]"

    def mean(self, run: OptimizerRun, seeds: Sequence[int] = SEEDS) -> str:
        """Return the mean score."""
        decimals = 3 if isinstance(run, TextRun) else 1
        return f"{mean_with_interval(self.scores(run, seeds)).mean:.{decimals}f}"


def placement(bench: Bench) -> list[str]:
    """Return the table of other ways to place."""
    arms: dict[str, dict[str, Any]] = {
        "γ from 1 gradient": {"gradients": 1},
        "γ from 4": {"gradients": 4},
        "γ from 16": {"gradients": 16},
        "γ from 64": {"gradients": 64},
        "γ of each unit": {"by_unit": True},
        "clock lr²/max lr": {"rate_clock": "lr^2/max_lr"},
        "warm-up 10 %": {"warmup": 0.1},
    }
    lines = [f"| network | cell | as it is | {' | '.join(arms)} |", "|---" * (3 + len(arms)) + "|"]
    setups = ("weight norm, SGD", "batch norm only, SGD")
    runs = {
        (setup, cell): {
            "": from_equilibrium(run_of(setup, cell)),
            **{name: from_equilibrium(run_of(setup, cell, **changes)) for name, changes in arms.items()},
        }
        for setup in setups
        for cell in CELLS
    }
    bench.done(over_seeds([run for by_arm in runs.values() for run in by_arm.values()], SEEDS))
    for (setup, cell), by_arm in runs.items():
        cells = [bench.difference(run, by_arm[""]) for name, run in by_arm.items() if name]
        lines.append(f"| {setup} | {cell} | {bench.mean(by_arm[''])} | {' | '.join(cells)} |")
    return lines


def training(bench: Bench) -> list[str]:
    """Return the table of other trainings."""
    lines = ["| training | network | cell | L2 tuned in the cell | AWS from equilibrium minus it |"]
    lines.append("|---|---|---|---|---|")
    cases: list[tuple[str, str, Cell, dict[str, Any], Sequence[int]]] = [
        ("constant rate", setup, cell, {"schedule": "constant"}, SEEDS)
        for setup in ("weight norm, SGD", "weight norm, Adam")
        for cell in CELLS
    ]
    usual = run_of("weight norm, SGD", CELLS[0])
    assert isinstance(usual, TrainRun)
    longer = {"epochs": 10 * usual.epochs}
    cases += [
        ("ten times as long", "weight norm, SGD", Cell(factor, 1.0), longer, range(3))
        for factor in (0.25, 1.0, 4.0)
    ]
    candidates = [tuned_l2(run_of(setup, cell, **changes)) for _, setup, cell, changes, _ in cases]
    bench.done(over_seeds([run for by_multiple in candidates for run in by_multiple.values()], TUNING_SEEDS))
    for title, setup, cell, changes, seeds in cases:
        run = run_of(setup, cell, **changes)
        tuned = bench.best(tuned_l2(run))
        difference = bench.difference(from_equilibrium(run), tuned, seeds)
        lines.append(f"| {title} | {setup} | {cell} | {bench.mean(tuned, seeds)} | {difference} |")
    return lines


def rest(bench: Bench) -> list[str]:
    """Return the table of decay on what is not invariant."""
    lines = ["| network | learning rate × | none | S/Σlr minus none | 5e-4 or 0.1 minus none |"]
    lines.append("|---|---|---|---|---|")
    setups = ("weight norm, SGD", "weight norm, Adam", "batch norm only, SGD", "residual network, SGD", TEXT)
    runs = {}
    for setup in setups:
        for factor in (0.25, 1.0, 4.0):
            cell = Cell(factor, 1.0)
            plain = run_of(setup, cell)
            usual = 0.1 if setup == TEXT or "Adam" in setup else 5e-4
            runs[setup, factor] = [
                from_equilibrium(variant(plain, rest=value)) for value in (0.0, 3.0 / plain.total_time, usual)
            ]
    bench.done(over_seeds([run for arms in runs.values() for run in arms], SEEDS))
    for (setup, factor), (none, timescale, habit) in runs.items():
        differences = [bench.difference(run, none) for run in (timescale, habit)]
        lines.append(f"| {setup} | {factor:g} | {bench.mean(none)} | {' | '.join(differences)} |")
    return lines


def every(bench: Bench) -> list[str]:
    """Return the table of decay that is applied every eighth step."""
    lines = ["| network | cell | from equilibrium: every=8 minus 1 | from the norms as they are |"]
    lines.append("|---|---|---|---|")
    pairs: dict[tuple[str, Cell], list[OptimizerRun]] = {}
    for setup in ("weight norm, SGD", "weight norm, Adam", "batch norm only, SGD"):
        for cell in CELLS:
            run, rare = run_of(setup, cell), run_of(setup, cell, every=8)
            assert isinstance(run, TrainRun)
            assert isinstance(rare, TrainRun)
            started = [from_equilibrium(rare), from_equilibrium(run)]
            pairs[setup, cell] = [*started, with_arm(rare, AWS), with_arm(run, AWS)]
    bench.done(over_seeds([run for runs in pairs.values() for run in runs], SEEDS))
    for (setup, cell), (rarely, often, rarely_as_is, often_as_is) in pairs.items():
        found, as_is = bench.difference(rarely, often), bench.difference(rarely_as_is, often_as_is)
        lines.append(f"| {setup} | {cell} | {found} | {as_is} |")
    return lines


def scales(bench: Bench) -> list[str]:
    """Return the table of initial norms over twelve decades."""
    decades = [10.0**k for k in range(-6, 7, 2)]
    lines = [f"| network | {' | '.join(f'norm {scale:g}' for scale in decades)} | largest minus smallest |"]
    lines.append("|---" * (len(decades) + 2) + "|")
    for setup in ("weight norm, SGD", "weight norm, Adam", "batch norm only, SGD"):
        runs = [from_equilibrium(run_of(setup, Cell(1.0, scale))) for scale in decades]
        bench.done(over_seeds(runs, SEEDS))
        means = [mean_with_interval(bench.scores(run)).mean for run in runs]
        row = " | ".join(f"{mean:.2f}" for mean in means)
        lines.append(f"| {setup} | {row} | {max(means) - min(means):.2f} |")
    return lines


TABLES: dict[str, Callable[[Bench], list[str]]] = {
    "placement": placement,
    "training": training,
    "rest": rest,
    "every": every,
    "scales": scales,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder for finished runs")
    parser.add_argument("--tables", default=",".join(TABLES), help="which tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    described = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    lines = ["# Variants of the start in equilibrium", ""]
    lines += [f"`python -m benchmarks.start_variants`. {described}.", ""]
    with local_workers(arguments.jobs) as workers:
        bench = Bench(arguments.runs, workers)
        for name in arguments.tables.split(","):
            lines += [*TABLES[name](bench), ""]
            print("\n".join(lines[-30:]), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
