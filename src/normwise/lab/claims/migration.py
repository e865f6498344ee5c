"""Claim: an existing recipe can be moved to AWS with one computed coefficient, and trains in the same way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, all_of, any_of, below, equivalent, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table
from normwise.lab.claims.finished_runs import FinishedRuns, Values, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import Estimate, equivalence, mean_with_interval
from normwise.lab.engine.run import Run
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

IMAGES, TEXT = "images", "text"
HALVES = (IMAGES, TEXT)
RECIPE, TWIN, NONE = "recipe", "AWS twin", "no decay"
PULL = 6.0  # λ·Σlr of the recipes
TRACK = 0.25  # largest relative difference of norms
SEEDS = {"quick": 5, "full": 10}
MARGINS = {IMAGES: 1.0, TEXT: 0.05}
UNITS = {IMAGES: "points", TEXT: "nats"}
WORDS = {
    IMAGES: "SGD with torch's weight_decay, on images",
    TEXT: "AdamW with its weight_decay, on text",
}


class Migration(Claim):
    """The class attributes are the pre-registration."""

    id = "migration"
    order = 11
    title = "From an existing recipe to AWS"
    source = (
        "Not in the paper: nw.theory.match, by which a recipe with L2 is carried over to Adaptive Weight "
        "Shrink (normwise's docs/theory.md)."
    )
    question = (
        "Someone has a recipe that works, and puts AWS in the place of its weight decay, with the "
        "coefficient of nw.theory.match. Are norms, rotation and loss then as they were, and is the result?"
    )
    arms = (
        "(1) Images: SGD with momentum 0.9 and the coupled L2 of torch's weight_decay, on the directions of "
        "a network with weight norm and batch norm; units of norm 1, a cosine from 0.1. (2) Text: AdamW with "
        "its own, decoupled weight_decay on all matrices, the small GPT on the King James Bible, warm-up and "
        "a cosine from 0.01. Usual recipes have λ·Σlr near 20 (5e-4, coupled, over 200 epochs of CIFAR-10; "
        "0.1 in a GPT-2 of 600,000 steps); runs of some hundred steps settle only if it is smaller: λ·Σlr = "
        f"{PULL:g}. The twin: AWS by its flow on the same weights (text: on the RMS of the same tensors), "
        "nothing tuned, its coefficient from nw.theory.match at one norm, the geometric mean over layers "
        "(text: groups of matrices) that a run of the recipe with another seed had half-way: that is what "
        "someone who migrates knows, from a checkpoint, while the equilibrium norm of the theory needs the "
        "size of gradients; and it lies where the learning rate is half of the largest. As a control, no "
        "decay. Pilots, of the time of a run only, had seeds from 5000 on; the GPT is that of the claim "
        "what-to-decay, whose pilots chose its initialisation and length."
    )
    statistic = (
        "For each seed the largest relative difference, over layers and all points in time after the first "
        "quarter, between the norms (text: RMS) of the twin and of the recipe, and the same of effective "
        "learning rates and of rotations; the mean over seeds. Test accuracy in points and test loss in "
        f"nats, twin minus recipe, paired by seed (quick {SEEDS['quick']}, full {SEEDS['full']}): two "
        f"one-sided tests of equivalence within ±{MARGINS[IMAGES]:g} point and ±{MARGINS[TEXT]:g} nats."
    )
    rule = (
        f"A half tracks if the mean of the largest difference of norms is below {100 * TRACK:g} %, and "
        "below half of the mean of that between no decay and the recipe, with its 95 % interval; the "
        "results are equivalent if their 90 % interval lies within the margin, and are not if it lies "
        "outside. Reproduced: both halves track and in both the results are equivalent. Partly: one half "
        "tracks, or in one the results are equivalent. Undecided: where an interval contains its threshold "
        "and that matters. Not reproduced: otherwise."
    )

    def runs(self) -> list[Run]:
        """The recipes, also with a tuning seed, at whose norms the twins are matched; and no decay."""
        wanted: list[Run] = []
        for half in HALVES:
            recipe = self._recipe(half)
            wanted += over_seeds([recipe], (*self._seeds, self.budget.tuning_seeds[0]))
            wanted += over_seeds([recipe.with_rule(None)], self.budget.seeds)
        return wanted

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The twins, whose coefficients follow from norms of the recipes."""
        return over_seeds((self._twin(runs, half) for half in HALVES), self._seeds)

    def second_cost(self) -> float:
        """The twins."""
        return sum(self._recipe(half).cost for half in HALVES) * len(self._seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare twins with recipes over time, and at the end."""
        measured = Measured({})
        for half in HALVES:
            recipe, twin = self._recipe(half), self._twin(runs, half)
            apart = {
                quantity: _largest_difference(runs, twin, recipe, self._seeds, quantity)
                for quantity in ("norm", "effective_lr", "turn")
            }
            none = _largest_difference(runs, recipe.with_rule(None), recipe, self.budget.seeds, "norm")
            results = {
                arm: runs.scores(run, self._seeds) if half == IMAGES else runs.losses(run, self._seeds)
                for arm, run in ((RECIPE, recipe), (TWIN, twin))
            }
            measured.statistics[half] = {
                "largest_relative_difference": apart,
                "norms_without_decay": none,
                "twin_minus_recipe": equivalence(results[TWIN], results[RECIPE], MARGINS[half]),
                "matched_at": self._half_way(runs, half),
                "rules": {RECIPE: recipe.rule, TWIN: twin.rule},
                "tracks": below(apart["norm"], min(TRACK, none.mean / 2)),
            }
            measured.details[half] = results
        return measured

    def judge(self, measured: Measured) -> Verdict:
        """Both halves track the recipe and end with equivalent results, or one of these holds."""
        tracks = [found["tracks"] for found in measured.statistics.values()]
        same = [equivalent(found["twin_minus_recipe"]) for found in measured.statistics.values()]
        return verdict_of(all_of([*tracks, *same]), any_of([*tracks, *same]))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        return {f"{half} / largest_relative_difference / norm": (TRACK,) for half in measured.statistics}

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        apart = [found["largest_relative_difference"]["norm"] for found in measured.statistics.values()]
        return f"norms {_percent(apart[0])} apart on images, {_percent(apart[1])} on text"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show losses and layers over time, and the results."""
        plots: list[Plot] = []
        traces: list[Plot] = []
        for half in HALVES:
            recipe, twin = self._recipe(half), self._twin(runs, half)
            first = self.budget.seeds[0]
            arms = {RECIPE: replace(recipe, seed=first), TWIN: replace(twin, seed=first)}
            curves = [
                Series.over_steps(arm, runs.metrics(run), "train_loss", dashed=arm == TWIN, color=k)
                for k, (arm, run) in enumerate(
                    {**arms, NONE: replace(recipe.with_rule(None), seed=first)}.items()
                )
                if runs.status(run) == "finished"
            ]
            subject = f"{half}, seed {first}"
            plots.append(Plot(f"Training loss over time ({subject})", "step", "training loss (nats)", curves))
            traces += layer_curves(runs, arms, subject, degree=2 if half == IMAGES else 1)
        columns = ["recipe", "norms apart", "without decay", "effective learning rates apart"]
        columns += ["rotations apart", "result of the recipe", "of the twin", "difference, 90 % interval"]
        rows = [_row(half, found, measured.details[half]) for half, found in measured.statistics.items()]
        table = Table("The twin beside the recipe: largest relative differences, and results", columns, rows)
        by_half: dict[str, list[Run]] = {half: [] for half in HALVES}
        for run in [*self.runs(), *self.second_runs(runs)]:
            by_half[IMAGES if isinstance(run, TrainRun) else TEXT].append(run)
        answer = " ".join(_sentence(half, found) for half, found in measured.statistics.items())
        return Exhibits(answer, plots, [table], runs.unfinished(by_half), traces=traces)

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.budget.at_least(SEEDS[self.budget.name])

    def _recipe(self, half: str) -> TrainRun | TextRun:
        if half == IMAGES:
            base = self.budget.training if self.budget.full else self.budget.small
            base = replace(base, member=self.first)
            return base.with_rule(nw.L2(PULL * (1 - base.momentum) / base.total_time), mode="coupled")
        text = replace(self.budget.text, decayed="matrices")
        return text.with_rule(nw.L2(PULL / text.total_time), mode="explicit")

    def _twin(self, runs: FinishedRuns, half: str) -> TrainRun | TextRun:
        recipe = self._recipe(half)
        rule = rule_from(recipe.rule)
        assert rule is not None
        momentum = recipe.momentum if isinstance(recipe, TrainRun) else 0.0
        norm = self._half_way(runs, half)
        return recipe.with_rule(
            nw.theory.match(rule, nw.AdaptiveWeightShrink, norm, momentum, mode=recipe.mode)
        )

    def _half_way(self, runs: FinishedRuns, half: str) -> float:
        """Return the geometric mean over layers of the recipe's norms half-way, to four digits."""
        lines = runs.metrics(replace(self._recipe(half), seed=self.budget.tuning_seeds[0]))
        norms = [float(layer["norm"]) for layer in lines[(len(lines) - 1) // 2]["layers"].values()]
        return float(f"{math.exp(sum(map(math.log, norms)) / len(norms)):.4g}")


def _largest_difference(
    runs: FinishedRuns, run: Run, reference: Run, seeds: tuple[int, ...], quantity: str
) -> Estimate:
    """Return the mean over seeds of the largest relative difference, over layers, after the first quarter."""
    largest: Values = []
    for seed in seeds:
        pair = over_seeds([run, reference], [seed])
        if any(runs.status(settings) != "finished" for settings in pair):
            largest.append(None)
            continue
        lines, reference_lines = map(runs.metrics, pair)
        last = reference_lines[-1]["step"]
        largest.append(
            max(
                abs(line["layers"][layer][quantity] / expected[quantity] - 1)
                for line, reference_line in zip(lines, reference_lines, strict=True)
                for layer, expected in reference_line["layers"].items()
                if reference_line["step"] > last / 4 and expected[quantity]
            )
        )
    return mean_with_interval(largest)


def _row(half: str, found: dict[str, Any], results: dict[str, Values]) -> list[str]:
    apart, test = found["largest_relative_difference"], found["twin_minus_recipe"]
    means = [mean_with_interval(values) for values in results.values()]
    outcome = "no pair of runs finished"
    if test.difference.n:
        outcome = f"{test.difference:+.3f} {UNITS[half]}: "
        outcome += "equivalent" if test.shown else "equivalence not shown"
    return [
        WORDS[half],
        _percent(apart["norm"]),
        _percent(found["norms_without_decay"]),
        _percent(apart["effective_lr"]),
        _percent(apart["turn"]),
        *(f"{mean.mean:.4g} {UNITS[half]}" if mean.n else "did not finish" for mean in means),
        outcome,
    ]


def _sentence(half: str, found: dict[str, Any]) -> str:
    difference = found["twin_minus_recipe"].difference
    if not difference.n:
        return f"{WORDS[half]}: no pair of runs finished."
    without = found["norms_without_decay"]
    off = f" (without decay they are {_percent(without)} off)" if without.n else ""
    return (
        f"{WORDS[half]}: after the first quarter the norms of the twin stay within "
        f"{_percent(found['largest_relative_difference']['norm'])} of the recipe's{off}, and the result "
        f"differs by {difference.mean:+.2f} {UNITS[half]} [{difference.low:+.2f}, {difference.high:+.2f}] "
        "(90 %)."
    )


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.0f} %" if estimate.n else "–"


CLAIM = Migration
