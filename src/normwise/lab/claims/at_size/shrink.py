"""Claim, on networks of the paper's size: AWS trains better than the other rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normwise.lab.claims.claim import Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_of, verdict_of
from normwise.lab.claims.exhibits import Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.networks import SIZED, matched, recipe, tuned_aws
from normwise.lab.claims.shrink import AHEAD, FREE, NEAR, Shrink
from normwise.lab.claims.tuning import TunedValues, mean_of_tuned
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, EPSILON, L2, NONE, STARTED
from normwise.lab.runs.network import NetworkRun

__all__ = ["CLAIM"]

MULTIPLES = (0.1, 1.0, 10.0)
PUBLISHED = (
    ["network", "compared with", "theirs", "source"],
    ["ResNet-50, weight standardisation, L2", "–", "76.74", "Li, Chen & Yang, arXiv 1911.05920"],
    ["ResNet-50, weight standardisation, ε-shift 0.001", "76.74", "76.86", "the same"],
    ["ResNet-101, weight standardisation, L2", "–", "78.07", "the same"],
    ["ResNet-101, weight standardisation, ε-shift 0.001", "78.07", "78.29", "the same"],
    ["ResNet-18", "–", "70.28", "Heo et al. 2021, AdamP, arXiv 2006.08217"],
    ["ResNet-18, with their projection", "70.28", "70.73", "the same"],
)


class ShrinkAtSize(Shrink):
    """The class attributes are the pre-registration."""

    budgets = SIZED
    arms = (
        "Large: ResNet-20 with weight norm and batch norm at full image size for 10 epochs; no decay; L2 by "
        "its flow and AWS, on the filters, each tuned over 0.1, 1 and 10 times the matched coefficient "
        "(3/Σlr for AWS, the same pull at norm 1 for L2) by the accuracy on 2000 validation images of one "
        "other seed, ties to the middle; AWS with nothing tuned, started in equilibrium (normwise.attach). "
        "SGD with momentum 0.9, a cosine from 0.1, without augmentation. What was cut, to take hours and not "
        "days: 4000 images instead of all, one tuning seed instead of three, rates for no decay, coupled L2, "
        "the ε-shift, other members. Paper: each network of the budget with its recipe: no decay; L2 with "
        "the usual coefficient on all parameters (CIFAR 5e-4, ImageNet 1e-4); the ε-shift with the same on "
        "the filters; AWS with nothing tuned; and for CIFAR AWS tuned over 0.3, 1 and 3 times 5e-3, the pull "
        "of the recipe at norm 1, by 5000 validation images of one other seed. For a folder AWS with nothing "
        "tuned takes the place of the tuned one."
    )
    statistic = (
        "Test accuracy at the chosen settings with 3 seeds, where a run that does not finish scores what "
        "guessing scores: AWS minus each other arm, paired, with a 95 % interval by Student's t, which "
        "leaves out the choice by a single tuning seed."
    )
    rule = (
        f"AWS is ahead of an arm where its lead is above {AHEAD:g} points with the whole interval, and not "
        "ahead where the interval lies below. Reproduced: in every network AWS is ahead of every other arm "
        "but AWS with nothing tuned. Partly: in every network it is ahead of no decay and not more than "
        f"{NEAR:g} point behind L2 (interval above −{NEAR:g}). Undecided: where an interval contains its "
        "threshold and that matters. Not reproduced: otherwise."
    )

    def runs(self) -> list[Run]:
        """All candidates with the tuning seed, and the arms that have nothing to tune."""
        wanted: list[Run] = []
        for arms in self._all().values():
            for candidates in arms.values():
                seeds = self.budget.seeds if len(candidates) == 1 else self.budget.tuning_seeds
                wanted += over_seeds(candidates.values(), seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The chosen settings, with the seeds of the comparison."""
        return [
            run
            for arms in self._all().values()
            for arm, candidates in arms.items()
            if len(candidates) > 1
            for run in over_seeds([self._chosen(runs, arms, arm)[1]], self.budget.seeds)
        ]

    def second_cost(self) -> float:
        """Each tuned arm with the seeds of the comparison."""
        return sum(
            len(self.budget.seeds) * next(iter(candidates.values())).cost
            for arms in self._all().values()
            for candidates in arms.values()
            if len(candidates) > 1
        )

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare AWS with every other arm in each network."""
        measured = Measured({})
        for name, arms in self._all().items():
            chosen = {arm: self._chosen(runs, arms, arm) for arm in arms}
            values = {
                arm: TunedValues(tuple(runs.scores(run, self.budget.seeds)))
                for arm, (_, run) in chosen.items()
            }
            ours = self._ours(arms)
            measured.statistics[name] = {
                "test_accuracy": {arm: mean_of_tuned(scores) for arm, scores in values.items()},
                "AWS_minus": {
                    arm: mean_of_tuned(values[ours].minus(scores))
                    for arm, scores in values.items()
                    if arm != ours
                },
                "chosen": {arm: words for arm, (words, _) in chosen.items()},
            }
            measured.details[name] = {
                arm: runs.unfinished_count(run, self.budget.seeds) for arm, (_, run) in chosen.items()
            }
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """AWS is ahead of every other arm; or ahead of no decay and near L2."""
        ahead, near = [], []
        for found in measured.statistics.values():
            gains = found["AWS_minus"]
            ahead += [above(gain, AHEAD) for arm, gain in gains.items() if arm != FREE]
            near += [above(gains[NONE], AHEAD), above(gains[L2], -NEAR)]
        return verdict_of(all_of(ahead), all_of(near))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        return {
            f"{name} / AWS_minus / {arm}": (AHEAD, -NEAR) if arm == L2 else (AHEAD,)
            for name, found in measured.statistics.items()
            for arm in found["AWS_minus"]
            if arm != FREE
        }

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        gains = [found["AWS_minus"][L2] for found in measured.statistics.values()]
        if len(gains) == 1:
            return f"{gains[0]:+.1f} points from L2"
        means = sorted(gain.mean for gain in gains)
        return f"{means[0]:+.1f} … {means[-1]:+.1f} points from L2"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show the differences and all arms."""
        plots, sentences = [], []
        rows: list[list[str]] = []
        for name, found in measured.statistics.items():
            plots.append(
                dot_plot(
                    f"Test accuracy of AWS minus that of each other arm ({name})",
                    "points",
                    found["AWS_minus"],
                )
            )
            gains = [f"{gain:+.1f} points from {arm}" for arm, gain in found["AWS_minus"].items()]
            sentences.append(f"With {name}, AWS is {', '.join(gains)}.")
            for arm, accuracy in found["test_accuracy"].items():
                difference = found["AWS_minus"].get(arm)
                gain = "–" if difference is None else f"{difference:+.1f}"
                unfinished = str(measured.details[name][arm])
                rows.append([name, arm, str(accuracy), gain, found["chosen"][arm], unfinished])
        columns = [
            "network",
            "rule",
            "test accuracy (%)",
            "AWS minus it (points)",
            "chosen",
            "did not finish",
        ]
        tables = [Table(f"Each rule at its best, {len(self.budget.seeds)} seeds", columns, rows)]
        if self.budget.networks.whole.data.startswith("imagefolder:"):
            tables.append(Table("Published top-1 accuracy on ImageNet (%)", PUBLISHED[0], PUBLISHED[1:]))
        return Exhibits(" ".join(sentences), plots, tables)

    def _all(self) -> dict[str, dict[str, dict[str, NetworkRun]]]:
        """Return the candidates by network, arm and words for the setting; an arm with one is not tuned."""
        networks = self.budget.networks
        if self.budget.name == "large":
            run = networks.sweep
            arms = {arm: _candidates(matched(run, arm, m) for m in MULTIPLES) for arm in (L2, AWS)}
            return {
                "weight norm": {
                    NONE: {"–": matched(run, NONE)},
                    L2: arms[L2],
                    FREE: {"nothing tuned": matched(run, STARTED)},
                    AWS: arms[AWS],
                }
            }
        found = {}
        for name, run in networks.others.items():
            fixed = {NONE: NONE, L2: L2, EPSILON: EPSILON, FREE: STARTED}
            found[name] = {label: {"as published": recipe(run, arm)} for label, arm in fixed.items()}
            if candidates := tuned_aws(run, networks.sweep.validation_size):
                found[name][AWS] = _candidates(candidates)
        return found

    def _chosen(
        self, runs: FinishedRuns, arms: dict[str, dict[str, NetworkRun]], arm: str
    ) -> tuple[str, NetworkRun]:
        """Return the words for the setting that the tuning seed chooses, and its run on as many images."""
        candidates = arms[arm]
        if len(candidates) == 1:
            return next(iter(candidates.items()))
        best = runs.choice(candidates, self.budget.tuning_seeds).best
        (untuned,) = arms[NONE].values()
        return best, replace(candidates[best], validation_size=untuned.validation_size)

    def _ours(self, arms: dict[str, Any]) -> str:
        return AWS if AWS in arms else FREE


def _candidates(runs: Any) -> dict[str, NetworkRun]:
    return {f"coefficient {run.coefficient:.3g}": run for run in runs}


CLAIM = ShrinkAtSize
