"""Three claims on a user's own network: AWS with nothing tuned there, against L2 and no decay."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normwise.lab.claims.budget import Budget, seeds_from
from normwise.lab.claims.changes import Change
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_of, any_of, below, verdict_of
from normwise.lab.claims.exhibits import Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.initialization import SHARE, spread, spread_minus_share
from normwise.lab.claims.statistics import Estimate, mean_with_interval, paired_difference
from normwise.lab.engine.execution import Progress, local_workers
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store
from normwise.lab.reproduce import Results, environment_of, execute_all, write_results
from normwise.lab.runs.devices import Execution, device_named
from normwise.lab.runs.own import OPTIMIZERS, RULES, OwnRun, own_parts, source_of

__all__ = ["compare"]

MULTIPLES = (0.1, 1.0, 10.0)
FACTORS = (0.25, 1.0, 4.0)
SCALES = (1e-3, 1.0, 1e3)
_NAMES = {"none": "no decay", "l2": "L2, tuned", "aws": "AWS, nothing tuned"}
_STATISTIC = (
    "Mean loss on the test batches at the end, paired by seed, with 95 % intervals by Student's t, which "
    "leave out the choice of L2 by a single tuning seed. A run that does not finish scores the loss of its "
    "initial network."
)
_SOURCE = "Your own network and data; after Li, Chen & Yang, AAAI 2020."


@dataclass(frozen=True)
class _Design:
    """What is compared: the run at the usual rate and scale, the rules, and the seeds."""

    base: OwnRun
    rules: Sequence[str]
    seeds: tuple[int, ...]
    tuning_seed: int


class _OwnClaim(Claim):
    """A claim on a user's network: each rule in some cells."""

    source = _SOURCE
    statistic = _STATISTIC

    def __init__(self, design: _Design, budget: Budget) -> None:
        super().__init__(budget)
        self.design = design

    @abstractmethod
    def cells(self) -> dict[str, OwnRun]:
        """Return the run without a rule in each cell, by name."""

    def changes(self) -> list[Change]:
        return []

    def runs(self) -> list[Run]:
        """All rules but L2 with the seeds of the comparison; L2 with all multiples and the tuning seed."""
        wanted: list[Run] = []
        for cell in self.cells().values():
            fixed = [replace(cell, rule=rule) for rule in self.design.rules if rule != "l2"]
            wanted += over_seeds(fixed, self.design.seeds)
            wanted += over_seeds(self._candidates(cell).values(), [self.design.tuning_seed])
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The L2 that was chosen in each cell."""
        chosen = [self._run(runs, cell, "l2") for cell in self.cells().values()]
        return over_seeds(chosen, self.design.seeds) if "l2" in self.design.rules else []

    def second_cost(self) -> float:
        """The L2 that is chosen in each cell."""
        return sum(cell.cost for cell in self.cells().values()) * len(self.design.seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Return the losses, and what the claim compares."""
        losses = {
            name: {
                rule: _losses(runs, self._run(runs, cell, rule), self.design.seeds)
                for rule in self.design.rules
            }
            for name, cell in self.cells().items()
        }
        found = {
            "test_loss": {
                name: {_NAMES[rule]: mean_with_interval(values) for rule, values in by_rule.items()}
                for name, by_rule in losses.items()
            }
        }
        unfinished = {
            name: sum(
                runs.unfinished_count(self._run(runs, cell, rule), self.design.seeds)
                for rule in self.design.rules
            )
            for name, cell in self.cells().items()
        }
        return Measured(found | self.compared(losses), {"losses": losses, "unfinished": unfinished})

    @abstractmethod
    def compared(self, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        """Return what the claim compares, from the losses by cell and rule."""

    def gains(self, losses: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
        """Return how far each other rule's loss is above that of AWS."""
        return {
            _NAMES[rule]: paired_difference(values, losses["aws"])
            for rule, values in losses.items()
            if rule != "aws"
        }

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the losses, and those of the others minus that of AWS."""
        losses = measured.details["losses"]
        differences = {
            f"{name}: {rule}": gain
            for name, by_rule in losses.items()
            for rule, gain in self.gains(by_rule).items()
        }
        rows = [
            [name]
            + [f"{mean_with_interval(by_rule[rule]):.4g}" for rule in self.design.rules]
            + [f"{gain:+.3g}" for gain in self.gains(by_rule).values()]
            + [str(measured.details["unfinished"][name])]
            for name, by_rule in losses.items()
        ]
        columns = ["", *(_NAMES[rule] for rule in self.design.rules)]
        columns += [f"{_NAMES[rule]} − AWS" for rule in self.design.rules if rule != "aws"]
        table = Table("Test loss", [*columns, "did not finish"], rows)
        answer = f"{self.headline(measured)}."
        return Exhibits(answer, [dot_plot("Test loss above that of AWS", "loss", differences)], [table])

    def _candidates(self, cell: OwnRun) -> dict[float, OwnRun]:
        multiples = MULTIPLES if "l2" in self.design.rules else ()
        return {multiple: replace(cell, rule="l2", multiple=multiple) for multiple in multiples}

    def _run(self, runs: FinishedRuns, cell: OwnRun, rule: str) -> OwnRun:
        """Return the run of a rule in a cell; of L2 the one that the tuning seed chooses."""
        candidates = self._candidates(cell)
        if rule != "l2" or not candidates:
            return replace(cell, rule=rule)
        seed = [self.design.tuning_seed]
        losses = {m: _losses(runs, run, seed, "validation")[0] for m, run in candidates.items()}
        return candidates[min(losses, key=lambda m: (losses[m], abs(math.log(m))))]


class _Shrink(_OwnClaim):
    id = "shrink"
    order = 10
    title = "AWS with nothing tuned against other rules"
    question = "At your learning rate and initialisation, is AWS better than L2 and than no decay?"
    arms = (
        "AWS with nothing tuned, from equilibrium (plan.attach); L2 by its flow, tuned over 0.1, 1 and 10 "
        "times 3/Σlr by the validation loss of one other seed; no decay. All act on what nw.plan finds "
        "scale-invariant."
    )
    rule = (
        "Reproduced: the loss of every other rule is above that of AWS, with the whole interval. Partly: "
        "that of one. Undecided: where an interval contains 0 and that matters. Not reproduced: otherwise."
    )

    def cells(self) -> dict[str, OwnRun]:
        return {"usual": self.design.base}

    def compared(self, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        return {"above_AWS": self.gains(losses["usual"])}

    def judge(self, measured: Measured) -> Verdict:
        conditions = [above(gain) for gain in measured.statistics["above_AWS"].values()]
        return verdict_of(all_of(conditions), any_of(conditions))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        return {f"above_AWS / {rule}": (0.0,) for rule in measured.statistics["above_AWS"]}

    def headline(self, measured: Measured) -> str:
        gains = measured.statistics["above_AWS"].items()
        return "loss above AWS: " + ", ".join(f"{rule.split(',')[0]} {gain:+.2g}" for rule, gain in gains)


class _Initialization(_OwnClaim):
    id = "initialization"
    order = 7
    title = "Sensitivity to initialisation"
    question = (
        "Does the norm of the initial weights, which changes no output, change what training arrives at?"
    )
    arms = (
        "The rules of shrink, from 0.001, 1 and 1000 times the initial weights that are scale-invariant "
        "alone."
    )
    rule = (
        "The spread of a rule is its largest minus its smallest mean loss over the scales. Reproduced: that "
        f"of AWS is less than {SHARE:g} times that of L2 (no decay where L2 is not compared), with the "
        "interval by the bootstrap over seeds. Undecided: where the interval contains 0. Not reproduced: "
        "otherwise."
    )

    def cells(self) -> dict[str, OwnRun]:
        return {f"scale {scale:g}": replace(self.design.base, init_scale=scale) for scale in SCALES}

    def compared(self, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        by_rule = {
            rule: {float(k): cell[rule] for k, cell in enumerate(losses.values())}
            for rule in self.design.rules
        }
        other = "l2" if "l2" in by_rule else "none"
        return {
            "spread": {_NAMES[rule]: spread(cells) for rule, cells in by_rule.items()},
            "spread_of_AWS_minus_half": spread_minus_share(by_rule["aws"], by_rule[other]),
        }

    def judge(self, measured: Measured) -> Verdict:
        return verdict_of(below(measured.statistics["spread_of_AWS_minus_half"]), False)

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        return {"spread_of_AWS_minus_half": (0.0,)}

    def headline(self, measured: Measured) -> str:
        spreads = measured.statistics["spread"].items()
        return "spread: " + ", ".join(f"{rule.split(',')[0]} {value.mean:.2g}" for rule, value in spreads)


class _NoTuning(_OwnClaim):
    id = "no-tuning"
    order = 13
    title = "AWS with nothing tuned, at three learning rates"
    question = "Is AWS with nothing tuned as good as L2 that is tuned anew at each learning rate?"
    arms = "The rules of shrink at 1/4, 1 and 4 times the learning rate."
    rule = (
        "Reproduced: averaged over the rates the loss of the tuned L2 (no decay where L2 is not compared) is "
        "above that of AWS with the whole interval, and at no rate below it with the whole interval. "
        "Undecided: where the interval of the mean contains 0. Not reproduced: otherwise."
    )

    def cells(self) -> dict[str, OwnRun]:
        base = self.design.base
        return {f"lr × {factor:g}": replace(base, lr=base.lr * factor) for factor in FACTORS}

    def compared(self, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        other = "l2" if "l2" in self.design.rules else "none"
        gains = {name: paired_difference(cell[other], cell["aws"]) for name, cell in losses.items()}
        by_seed = [
            sum(losses[name][other][k] - losses[name]["aws"][k] for name in losses) / len(losses)
            for k in range(len(self.design.seeds))
        ]
        return {"above_AWS": gains, "mean_above_AWS": mean_with_interval(by_seed)}

    def judge(self, measured: Measured) -> Verdict:
        nowhere_behind = all(gain.high >= 0 for gain in measured.statistics["above_AWS"].values())
        return verdict_of(all_of([above(measured.statistics["mean_above_AWS"]), nowhere_behind]), False)

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        cells = {f"above_AWS / {name}": (0.0,) for name in measured.statistics["above_AWS"]}
        return {"mean_above_AWS": (0.0,), **cells}

    def headline(self, measured: Measured) -> str:
        return f"loss of the others above AWS: {measured.statistics['mean_above_AWS']:+.2g} on average"


def compare(
    target: str,
    *,
    out: Path,
    rules: Sequence[str] = RULES,
    seeds: str | int = 3,
    optimizer: str = "sgd",
    lr: float = 0.1,
    jobs: int = 1,
    device: str = "cpu",
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, left: None,
) -> Results:
    """Test shrink, initialization and no-tuning on a user's network; write results and report.

    Finished runs are not repeated, so the same call resumes a killed job.

    Args:
        target: ``package.module:setup``, whose ``setup()`` returns the functions of
            :class:`normwise.lab.runs.own.Parts`.
        out: The folder: new, empty, or of an earlier call.
        rules: "aws", and "l2", "none" or both.
        seeds: Number of seeds, or the first and the last; as for ``reproduce``.
        optimizer: "sgd" with momentum 0.9, or "adamw".
        lr: Peak learning rate.
        jobs: Number of runs at a time.
        device: Where they are trained.
        announce: As for ``reproduce``.
        progress: As for ``reproduce``.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: Something of this is not possible, ``setup`` is not as it should be, or a run failed.
    """
    for rule in rules:
        if rule not in RULES:
            raise ValueError(
                f"--rules {','.join(rules)}: {rule!r} is not known: choose from {', '.join(RULES)}"
            )
    if "aws" not in rules or len(set(rules)) < 2:
        raise ValueError(f"--rules {','.join(rules)} compares nothing: give aws, and l2, none or both")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer {optimizer} is not known: choose from {', '.join(OPTIMIZERS)}")
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr} is not possible: give a positive number")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} is not possible: give 1 or more")
    device_named(device)
    chosen = seeds_from(seeds)
    own_parts(target)
    begin = time.perf_counter()
    base = OwnRun(target=target, source=source_of(target), optimizer=optimizer, lr=lr)
    design = _Design(base, tuple(dict.fromkeys(rules)), chosen, 1000 + chosen[0])
    budget = Budget.of("quick", "fashion-mnist", "", seeds)  # of which no run is used
    claims: list[Claim] = [kind(design, budget) for kind in (_Initialization, _Shrink, _NoTuning)]
    store = Store(out)
    with local_workers(jobs, Execution(device)) as workers:
        runs = execute_all(claims, store, workers, announce, progress)
    protocol = {
        "data": f"own:{target}",
        "budget": "own",
        "seeds": list(chosen),
        "experiments": f"Trained is the model of {target} by {optimizer} at learning rate {lr:g}.",
        "environment": environment_of(device, "float32"),
    }
    return write_results(claims, runs, protocol, out, time.perf_counter() - begin)


def _losses(runs: FinishedRuns, run: OwnRun, seeds: Sequence[int], part: str = "test") -> list[float]:
    """Return the loss of each seed; a run that did not finish scores that of its initial network."""
    return [
        summary[f"{part}_loss" if summary["status"] == "finished" else "initial_loss"]
        for summary in runs.summaries(run, seeds)
    ]
