"""Claim: an existing recipe has an AWS twin that trains in the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import Equivalence, Estimate, equivalence, mean_with_interval
from normwise.lab.claims.traces import traces
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
KEYS = {IMAGES: "test_accuracy", TEXT: "test_loss"}
FACTORS = {IMAGES: 100.0, TEXT: 1.0}  # fractions to points
MARGINS = {IMAGES: 1.0, TEXT: 0.05}
UNITS = {IMAGES: "points", TEXT: "nats"}
WORDS = {
    IMAGES: "SGD with torch's weight_decay, on images",
    TEXT: "AdamW with its weight_decay, on text",
}


class Migration(Claim):
    """See the texts."""

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
        f"0.1 in a GPT-2 of 600,000 steps); runs of some hundred steps settle only if it is smaller: "
        f"λ·Σlr = {PULL:g}. The twin: AWS by its flow on the same weights (text: on the RMS of the same "
        "tensors), nothing tuned, its coefficient from nw.theory.match at one norm, the geometric mean over "
        "layers (text: groups of matrices) that a run of the recipe with another seed had half-way: that is "
        "what someone who migrates knows, from a checkpoint, while the equilibrium norm of the theory needs "
        "the size of gradients; and it lies where the learning rate is half of the largest. As a control, no "
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
        f"A half tracks if the mean of the largest difference of norms is at most {100 * TRACK:g} %, and "
        "less than half of that between no decay and the recipe. Reproduced: both halves track and in both "
        "the results are equivalent within the margin. Partly: one half tracks, or in one the results are "
        "equivalent. Not reproduced: otherwise."
    )
    needs_text = True

    def runs(self, budget: Budget) -> list[Run]:
        """The recipes, also with a seed of tuning, at whose norms the twins are matched; and no decay."""
        runs: list[Run] = []
        for half in HALVES:
            recipe = self._recipe(budget, half)
            seeds = (*_seeds(budget), budget.tuning_seeds[0])
            runs += [replace(recipe, seed=seed) for seed in seeds]
            runs += [replace(recipe.with_rule(None), seed=seed) for seed in budget.seeds]
        return runs

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """The twins, whose coefficients follow from norms of the recipes."""
        return [
            replace(self._twin(budget, runs, half), seed=seed) for half in HALVES for seed in _seeds(budget)
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare twins with recipes over time, and at the end."""
        statistics: dict[str, Any] = {}
        rows: list[list[str]] = []
        plots: list[Plot] = []
        over_time: list[Plot] = []
        tracks, same = [], []
        for half in HALVES:
            recipe, twin = self._recipe(budget, half), self._twin(budget, runs, half)
            none = recipe.with_rule(None)
            apart = {
                quantity: mean_with_interval(_apart(runs, twin, recipe, _seeds(budget), quantity))
                for quantity in ("norm", "effective_lr", "turn")
            }
            control = mean_with_interval(_apart(runs, none, recipe, budget.seeds, "norm"))
            results = {
                arm: _scaled(runs.values(KEYS[half], run, _seeds(budget)), FACTORS[half])
                for arm, run in ((RECIPE, recipe), (TWIN, twin))
            }
            test = equivalence(results[TWIN], results[RECIPE], MARGINS[half])
            tracks.append(apart["norm"].mean <= min(TRACK, control.mean / 2))
            same.append(test.shown)
            statistics[half] = {
                "largest_relative_difference": {q: e.as_dict() for q, e in apart.items()},
                "norms_without_decay": control.as_dict(),
                "twin_minus_recipe": test.as_dict(),
                "matched_at": _half_way(runs, replace(recipe, seed=budget.tuning_seeds[0])),
                "rules": {RECIPE: recipe.rule, TWIN: twin.rule},
                "tracks": tracks[-1],
            }
            rows.append(_row(half, apart, control, results, test))
            first = budget.seeds[0]
            arms = {RECIPE: replace(recipe, seed=first), TWIN: replace(twin, seed=first)}
            shown = arms | {NONE: replace(none, seed=first)}
            plots.append(_losses(runs, shown, f"{half}, seed {first}"))
            over_time += traces(runs, arms, f"{half}, seed {first}", degree=2 if half == IMAGES else 1)
        verdict: Verdict = "not reproduced"
        if all(tracks) and all(same):
            verdict = "reproduced"
        elif any(tracks) or any(same):
            verdict = "partly"
        columns = ["recipe", "norms apart", "without decay", "effective learning rates apart"]
        columns += ["rotations apart", "result of the recipe", "of the twin", "difference, 90 % interval"]
        table = Table("The twin beside the recipe: largest relative differences, and results", columns, rows)
        of_half: dict[str, list[Run]] = {half: [] for half in HALVES}
        for run in [*self.runs(budget), *self.second_runs(budget, runs)]:
            of_half[IMAGES if isinstance(run, TrainRun) else TEXT].append(run)
        notes = runs.endings(of_half)
        return Finding(verdict, _answer(statistics), statistics, plots, [table], notes, traces=over_time)

    def _recipe(self, budget: Budget, half: str) -> TrainRun | TextRun:
        if half == IMAGES:
            base = budget.training if budget.full else budget.small
            base = replace(base, member=budget.members[0])
            return base.with_rule(nw.L2(PULL * (1 - base.momentum) / base.total_time), mode="coupled")
        text = replace(budget.text, decayed="matrices")
        return text.with_rule(nw.L2(PULL / text.total_time), mode="explicit")

    def _twin(self, budget: Budget, runs: Runs, half: str) -> TrainRun | TextRun:
        recipe = self._recipe(budget, half)
        rule = rule_from(recipe.rule)
        assert rule is not None
        norm = _half_way(runs, replace(recipe, seed=budget.tuning_seeds[0]))
        momentum = recipe.momentum if isinstance(recipe, TrainRun) else 0.0
        twin = nw.theory.match(rule, nw.AdaptiveWeightShrink, norm, momentum, mode=recipe.mode)
        return recipe.with_rule(twin)


def _seeds(budget: Budget) -> tuple[int, ...]:
    return tuple(range(max(SEEDS[budget.name], len(budget.seeds))))


def _half_way(runs: Runs, run: Run) -> float:
    """Return the geometric mean over layers of the norms that a run had half-way, to four digits."""
    lines = runs.metrics(run)
    norms = [float(layer["norm"]) for layer in lines[(len(lines) - 1) // 2]["layers"].values()]
    return float(f"{math.exp(sum(map(math.log, norms)) / len(norms)):.4g}")


def _apart(runs: Runs, run: Run, other: Run, seeds: Sequence[int], quantity: str) -> list[float | None]:
    """Return each seed's largest relative difference to ``other`` after the first quarter, over layers."""
    found: list[float | None] = []
    for seed in seeds:
        pair = [replace(settings, seed=seed) for settings in (run, other)]
        if any(runs[settings]["status"] != "finished" for settings in pair):
            found.append(None)
            continue
        ones, others = (runs.metrics(settings) for settings in pair)
        last = others[-1]["step"]
        found.append(
            max(
                abs(one["layers"][layer][quantity] / values[quantity] - 1)
                for one, line in zip(ones, others, strict=True)
                for layer, values in line["layers"].items()
                if line["step"] > last / 4 and values[quantity]
            )
        )
    return found


def _scaled(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def _losses(runs: Runs, arms: Mapping[str, Run], what: str) -> Plot:
    series = []
    for k, (arm, run) in enumerate(arms.items()):
        if runs[run]["status"] == "finished":
            lines = runs.metrics(run)
            losses = [line["train_loss"] for line in lines]
            series.append(Series(arm, [line["step"] for line in lines], losses, dashed=arm == TWIN, color=k))
    return Plot(f"Training loss over time ({what})", "step", "training loss", series)


def _row(
    half: str,
    apart: dict[str, Estimate],
    control: Estimate,
    results: dict[str, list[float | None]],
    test: Equivalence,
) -> list[str]:
    difference, unit = test.difference, UNITS[half]
    means = {arm: mean_with_interval(values) for arm, values in results.items()}
    outcome = "no pair of runs finished"
    if difference.n:
        shown = "equivalent" if test.shown else "equivalence not shown"
        interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
        outcome = f"{difference.mean:+.3f} {interval} {unit}: {shown}"
    return [
        WORDS[half],
        _percent(apart["norm"]),
        _percent(control),
        _percent(apart["effective_lr"]),
        _percent(apart["turn"]),
        *(f"{mean.mean:.4g} {unit}" if mean.n else "did not finish" for mean in means.values()),
        outcome,
    ]


def _answer(statistics: dict[str, Any]) -> str:
    sentences = []
    for half in HALVES:
        found = statistics[half]
        test, apart = (
            found["twin_minus_recipe"]["difference"],
            found["largest_relative_difference"]["norm"],
        )
        if test["mean"] is None:
            sentences.append(f"{WORDS[half]}: no pair of runs finished.")
            continue
        low, high = ("–" if test[end] is None else f"{test[end]:+.2f}" for end in ("low_90", "high_90"))
        without = found["norms_without_decay"]["mean"]
        off = "" if without is None else f" (without decay they are {100 * without:.0f} % off)"
        sentences.append(
            f"{WORDS[half]}: after the first quarter the norms of the twin stay within "
            f"{100 * apart['mean']:.0f} % of the recipe's{off}, and the result differs by "
            f"{test['mean']:+.2f} {UNITS[half]} [{low}, {high}]."
        )
    return " ".join(sentences)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.0f} %" if estimate.n else "–"


CLAIM = Migration()
