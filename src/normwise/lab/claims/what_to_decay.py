"""Claim: decay belongs on scale-invariant weights; what is decayed matters more than the rule."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, NamedTuple

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Verdict, above, all_of, any_of, below, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table, dot_plot
from normwise.lab.claims.finished_runs import FinishedRuns, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import Estimate
from normwise.lab.claims.tuning import Choice, TunedValues, mean_of_tuned, mean_over_cells
from normwise.lab.engine.run import Run
from normwise.lab.runs.arms import AWS, L2, NONE, from_equilibrium
from normwise.lab.runs.text import TextRun

NOTHING, MATRICES, INVARIANT = "nothing", "matrices", "invariant"
RULES = (L2, AWS)
PARTS = {"attention": "queries and keys", "stream": "embeddings and writers"}

MULTIPLES = {"quick": (0.3, 1.0, 3.0), "full": (0.1, 0.3, 1.0, 3.0)}
RATES = {"quick": (0.01,), "full": (0.004, 0.01, 0.025)}
CENTRE = 0.01
LARGE = 1e4  # initial scale
SAME = 0.05  # nats: the largest cost of the scale


class Arm(NamedTuple):
    """What is decayed, and by which rule."""

    decayed: str
    rule: str | None

    def __str__(self) -> str:
        objects = {MATRICES: "all matrices", INVARIANT: "what is invariant"}
        return NONE if self.rule is None else f"{self.rule} on {objects[self.decayed]}"


UNDECAYED = Arm(NOTHING, None)
DECAYED = tuple(Arm(decayed, rule) for decayed in (MATRICES, INVARIANT) for rule in RULES)
SCALED = {NONE: UNDECAYED, L2: Arm(INVARIANT, L2), AWS: Arm(INVARIANT, AWS)}  # start from a large scale

ByScale = dict[float, TunedValues]  # the losses of all seeds, by initial scale


class WhatToDecay(Claim):
    """The class attributes are the pre-registration."""

    id = "what-to-decay"
    order = 12
    title = "What to decay in a language model"
    source = (
        "Not in the paper, which decays the weights that are normalised: nw.plan carries this over to a "
        "network in which it must be found out which weights are scale-invariant."
    )
    question = (
        "Under AdamW, does decay do better on what nw.plan finds scale-invariant, alone or jointly, than on "
        "all matrices or on nothing, whichever the rule and the learning rate? And does it make training "
        "independent of the initial scale of these weights?"
    )
    arms = (
        "A GPT of characters on the King James Bible (pre-norm, QK-norm; 2 blocks and 360 steps, quick 1 "
        "and 160; AdamW, warm-up and cosine). Decayed are: nothing; all matrices; or what nw.plan says is "
        "to be shrunk: queries and keys, each alone, and embeddings and all layers that write to the "
        "residual stream, jointly. Rules: L2 and AWS by their flows, on the RMS of each tensor, with the "
        "pull 3/Σlr at √Σlr² (for_budget) times 0.1, 0.3, 1 or 3 (quick: 0.3, 1 or 3), chosen for each "
        "rule, object and learning rate by the mean validation loss of three other seeds, ties to the "
        "middle of the grid. Learning rates 0.004, 0.01 and 0.025 (quick: 0.01). Then, at 0.01 with the "
        "same coefficients, queries and keys, or embeddings and writers, start 10,000 times as large, "
        "which leaves the network's function as it is. Reported and not judged: AWS with nothing tuned, "
        "started in equilibrium (plan.attach), at each learning rate and from both scales. A control in "
        "the full budget: the same weights frozen. That must hurt, or it would do no harm that large "
        "weights hardly turn. Pilots with seed 5000 only, at the learning rate 0.01, settled the "
        "initialisation (with which freezing hurts), the length of a run and the range of multiples."
    )
    statistic = (
        "Test loss in nats a character, paired by seed (quick 3, full 5), with 95 % intervals that carry "
        "the choice of coefficients (the tuning seeds are resampled); a run that does not finish scores "
        "what guessing among the letters scores: nothing minus invariant and matrices minus invariant, for "
        "each rule and learning rate; and, at the scale of 10,000, the loss under the tuned AWS on the "
        "invariant weights minus that at scale 1, and that of L2 on the same weights, and of no decay, "
        "minus that of AWS."
    )
    rule = (
        "Object: for both rules, at every learning rate, both differences are above 0 with their "
        f"intervals. Scale: for both parts AWS loses less than {SAME:g} nats from scale 1 to 10,000, and L2 "
        "and no decay are worse than it there, all with their intervals. Reproduced: both hold. Partly: "
        "one holds, or for both rules the differences, averaged over learning rates, are above 0 with "
        "their intervals. Undecided: where an interval contains its threshold and that matters. Not "
        "reproduced: otherwise."
    )

    centre: ClassVar[float] = CENTRE

    def runs(self) -> list[Run]:
        """All candidates with the tuning seeds; no decay and frozen weights with the seeds of the claim."""
        tuned: list[Run] = []
        others: list[Run] = []
        for lr in self._rates:
            tuned += [run for arm in DECAYED for run in self._candidates(arm, lr).values()]
            others.append(self._base(lr))
        others += [run for lr in self._rates for run in self._untuned(lr).values()]
        others += [self._frozen(part) for part in self._frozen_parts]
        others += [_from_scale(self._base(self.centre), part, LARGE) for part in PARTS]
        return over_seeds(tuned, self.budget.tuning_seeds) + over_seeds(others, self.budget.seeds)

    def second_runs(self, runs: FinishedRuns) -> list[Run]:
        """The chosen settings with the seeds of the claim; at the central learning rate from both scales."""
        wanted = [
            run for lr in self._rates for arm in DECAYED for run in self._chosen(runs, arm, lr)[1].values()
        ]
        for rule in RULES:
            chosen = self._chosen(runs, SCALED[rule], self.centre)[1].values()
            wanted += [_from_scale(run, part, LARGE) for run in chosen for part in PARTS]
        return over_seeds(wanted, self.budget.seeds)

    def second_cost(self) -> float:
        """Each tuned arm, and two arms from two large scales, with one or two settings."""
        count = len(self._rates) * len(DECAYED) + len(RULES) * len(PARTS)
        return 1.5 * count * len(self.budget.seeds) * self.budget.text.cost

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare what is decayed at each learning rate, then the rules at a large initial scale."""
        losses = {
            (arm, lr): self._losses(runs, arm, lr) for arm in (UNDECAYED, *DECAYED) for lr in self._rates
        }
        gains: dict[str, dict[str, Estimate]] = {}
        for rule in RULES:
            for other in (UNDECAYED, Arm(MATRICES, rule)):
                pairs = {lr: (losses[other, lr], losses[Arm(INVARIANT, rule), lr]) for lr in self._rates}
                differences = {lr: theirs.minus(ours) for lr, (theirs, ours) in pairs.items()}
                by_rate = {f"{lr:g}": mean_of_tuned(difference) for lr, difference in differences.items()}
                by_rate["mean"] = mean_of_tuned(mean_over_cells(list(differences.values())))
                gains[f"{rule}: {other.decayed} − invariant"] = by_rate
        by_scale = {part: self._from_scales(runs, part) for part in PARTS}
        costs = {part: _costs(by_label) for part, by_label in by_scale.items()}
        statistics = {
            "gain": gains,
            "scale": costs,
            "frozen_minus_trained": {
                part: mean_of_tuned(
                    TunedValues(tuple(runs.losses(self._frozen(part), self.budget.seeds))).minus(
                        losses[UNDECAYED, self.centre]
                    )
                )
                for part in self._frozen_parts
            },
            "untuned_AWS_minus_tuned": {
                f"lr {lr:g}, {label}": mean_of_tuned(
                    TunedValues(tuple(runs.losses(run, self.budget.seeds))).minus(
                        losses[Arm(INVARIANT, AWS), lr]
                    )
                )
                for lr in self._rates
                for label, run in self._untuned(lr).items()
            },
            "object_holds": all_of(above(gain) for by_rate in gains.values() for gain in by_rate.values()),
            "scale_holds": all_of(
                condition
                for found in costs.values()
                for condition in (
                    below(found["AWS: cost of the scale"], SAME),
                    *(above(found[f"{other} − AWS"]) for other in (NONE, L2)),
                )
            ),
        }
        return Measured(statistics, {"losses": losses, "by_scale": by_scale})

    def judge(self, measured: Measured) -> Verdict:
        """Object and scale hold; or one of them, or the object on average over learning rates."""
        holds = [measured.statistics[key] for key in ("object_holds", "scale_holds")]
        on_average = all_of(above(by_rate["mean"]) for by_rate in measured.statistics["gain"].values())
        return verdict_of(all_of(holds), any_of([*holds, on_average]))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {
            f"gain / {name} / {rate}": (0.0,)
            for name, by_rate in measured.statistics["gain"].items()
            for rate in by_rate
        }
        for part, costs in measured.statistics["scale"].items():
            found |= {f"scale / {part} / {name}": (SAME if "cost" in name else 0.0,) for name in costs}
        return found

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        l2, aws = (measured.statistics["gain"][f"{rule}: {MATRICES} − invariant"]["mean"] for rule in RULES)
        return f"L2 {l2:.2f}, AWS {aws:.2f} nats"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show losses by learning rate and by initial scale."""
        losses, by_scale = measured.details["losses"], measured.details["by_scale"]
        multiples = {
            (arm, lr): self._choice(runs, arm, lr).best for arm, lr in losses if arm.rule is not None
        }
        grid = self._multiples
        at_ends = [
            f"{arm} at lr {lr:g} (×{multiple:g})"
            for (arm, lr), multiple in multiples.items()
            if multiple in (grid[0], grid[-1])
        ]
        notes = _frozen_note(measured.statistics["frozen_minus_trained"])
        if at_ends:
            notes.append(f"Chosen at an end of the grid of multiples: {', '.join(at_ends)}.")
        groups: dict[str, list[Run]] = {}
        for run in [*self.runs(), *self.second_runs(runs)]:
            assert isinstance(run, TextRun)
            groups.setdefault(f"{run.decayed}, lr {run.lr:g}, scale {run.init_scale:g}", []).append(run)
        first = self.budget.seeds[0]
        traced = {
            str(arm): replace(self._best(runs, arm, self.centre), seed=first)
            for arm in (UNDECAYED, Arm(MATRICES, AWS), Arm(INVARIANT, AWS))
        }
        return Exhibits(
            _answer(measured.statistics["gain"], measured.statistics["scale"]),
            [_loss_plot(losses), *_scale_plots(by_scale)],
            [
                _loss_table(losses, multiples),
                _scale_table(by_scale),
                _untuned_table(measured.statistics["untuned_AWS_minus_tuned"]),
            ],
            notes + runs.unfinished(groups),
            traces=layer_curves(runs, traced, f"seed {first}, lr {self.centre:g}", degree=1),
        )

    @property
    def _rates(self) -> tuple[float, ...]:
        return RATES[self.budget.name]

    @property
    def _multiples(self) -> tuple[float, ...]:
        return MULTIPLES[self.budget.name]

    @property
    def _frozen_parts(self) -> tuple[str, ...]:
        """The control, in the full budget only."""
        return tuple(PARTS) if self.budget.full else ()

    def _base(self, lr: float) -> TextRun:
        return replace(self.budget.text, lr=lr)

    def _frozen(self, part: str) -> TextRun:
        return replace(self._base(self.centre), frozen=part)

    def _untuned(self, lr: float) -> dict[str, TextRun]:
        """Return AWS with nothing tuned; in the full budget from large scales too, at the central rate."""
        base = from_equilibrium(replace(self._base(lr), decayed=INVARIANT))
        scaled = {f"{PARTS[part]} × {LARGE:g}": _from_scale(base, part, LARGE) for part in PARTS}
        return {"usual scale": base} | (scaled if lr == self.centre and self.budget.full else {})

    def _candidates(self, arm: Arm, lr: float) -> dict[float, TextRun]:
        base = replace(self._base(lr), decayed=arm.decayed)
        return {m: with_rule(base, str(arm.rule), m) for m in self._multiples}

    def _choice(self, runs: FinishedRuns, arm: Arm, lr: float) -> Choice[float]:
        return runs.choice(self._candidates(arm, lr), self.budget.tuning_seeds, "validation_loss")

    def _chosen(self, runs: FinishedRuns, arm: Arm, lr: float) -> tuple[Choice[float], dict[float, TextRun]]:
        """Return what was chosen, and the settings that it needs by multiple."""
        candidates, choice = self._candidates(arm, lr), self._choice(runs, arm, lr)
        return choice, {multiple: candidates[multiple] for multiple in choice.needed}

    def _best(self, runs: FinishedRuns, arm: Arm, lr: float) -> TextRun:
        if arm.rule is None:
            return self._base(lr)
        choice, settings = self._chosen(runs, arm, lr)
        return settings[choice.best]

    def _losses(
        self, runs: FinishedRuns, arm: Arm, lr: float, part: str = "", scale: float = 1.0
    ) -> TunedValues:
        """Return the losses of an arm, of which a part may start from a large scale."""

        def of(run: TextRun) -> tuple[float, ...]:
            return tuple(runs.losses(_from_scale(run, part, scale) if part else run, self.budget.seeds))

        if arm.rule is None:
            return TunedValues(of(self._base(lr)))
        choice, settings = self._chosen(runs, arm, lr)
        return choice.values({multiple: of(run) for multiple, run in settings.items()})

    def _from_scales(self, runs: FinishedRuns, part: str) -> dict[str, ByScale]:
        """Return the losses by initial scale of a part, for each arm that starts from a large one."""
        return {
            label: {
                1.0: self._losses(runs, arm, self.centre),
                LARGE: self._losses(runs, arm, self.centre, part, LARGE),
            }
            for label, arm in SCALED.items()
        }


def with_rule(base: TextRun, rule: str, multiple: float) -> TextRun:
    """Return the run under L2 or AWS with a multiple of the pull of ``for_budget`` at the RMS √Σlr²."""
    reference = base.total_squares**0.5
    aws = nw.AdaptiveWeightShrink(
        nw.AdaptiveWeightShrink.for_budget(base.total_time, norm=reference).strength * multiple
    )
    return base.with_rule(aws if rule == AWS else nw.theory.match(aws, nw.L2, norm=reference))


def _from_scale(run: TextRun, part: str, scale: float) -> TextRun:
    return replace(run, scaled=part, init_scale=scale)


def _costs(by_label: dict[str, ByScale]) -> dict[str, Estimate]:
    """Return the cost of the large scale under AWS, and how far the others are behind AWS there."""
    large = {label: by_scale[LARGE] for label, by_scale in by_label.items()}
    costs = {"AWS: cost of the scale": mean_of_tuned(large[AWS].minus(by_label[AWS][1.0]))}
    behind = {f"{label} − AWS": mean_of_tuned(large[label].minus(large[AWS])) for label in (NONE, L2)}
    return costs | behind


def _loss_table(
    losses: dict[tuple[Arm, float], TunedValues], multiples: dict[tuple[Arm, float], float]
) -> Table:
    rows: dict[Arm, list[str]] = {}
    for (arm, lr), values in losses.items():
        chosen = f" (×{multiples[arm, lr]:g})" if (arm, lr) in multiples else ""
        rows.setdefault(arm, [str(arm)]).append(_loss(values) + chosen)
    columns = ["decayed", *(f"lr {lr:g}" for lr in dict.fromkeys(lr for _, lr in losses))]
    title = "Test loss (nats a character), with the chosen multiple of the coefficient of for_budget"
    return Table(title, columns, list(rows.values()))


def _untuned_table(differences: dict[str, Estimate]) -> Table:
    title = "AWS with nothing tuned, started in equilibrium: test loss minus that of the tuned AWS at scale 1"
    return Table(title, ["", "nats"], [[label, f"{value:+.3f}"] for label, value in differences.items()])


def _scale_table(by_scale: dict[str, dict[str, ByScale]]) -> Table:
    rows = [
        [PARTS[part], label, *map(_loss, losses.values())]
        for part, by_label in by_scale.items()
        for label, losses in by_label.items()
    ]
    columns = ["scaled at the start", "decay on the invariant weights", "× 1", f"× {LARGE:g}"]
    return Table("Test loss (nats a character) by initial scale", columns, rows)


def _loss_plot(losses: dict[tuple[Arm, float], TunedValues]) -> Plot:
    y_label = "test loss (nats a character)"
    rates = {lr for _, lr in losses}
    if len(rates) == 1:
        means = {str(arm): mean_of_tuned(values) for (arm, _), values in losses.items()}
        title = f"Test loss at the learning rate {min(rates):g}: what is decayed, and by which rule"
        return dot_plot(title, y_label, means, reference=float(means[str(UNDECAYED)].mean))
    curves: dict[Arm, dict[float, tuple[float, ...]]] = {}
    for (arm, lr), values in losses.items():
        curves.setdefault(arm, {})[lr] = values.chosen
    objects = (NOTHING, MATRICES, INVARIANT)
    series = [
        Series.over_seeds(str(arm), by_rate, dashed=arm.rule == L2, color=objects.index(arm.decayed))
        for arm, by_rate in curves.items()
    ]
    title = "Test loss by learning rate: what is decayed, and by which rule"
    return Plot(title, "learning rate", y_label, series, log_x=True)


def _scale_plots(by_scale: dict[str, dict[str, ByScale]]) -> list[Plot]:
    return [
        Plot(
            f"Test loss by initial scale of {PARTS[part]}",
            "initial scale",
            "test loss (nats a character)",
            [
                Series.over_seeds(label, {scale: values.chosen for scale, values in losses.items()})
                for label, losses in by_label.items()
            ],
            log_x=True,
        )
        for part, by_label in by_scale.items()
    ]


def _frozen_note(frozen: dict[str, Estimate]) -> list[str]:
    """Return a note on the cost of freezing the parts."""
    costs = [
        f"{PARTS[part]} frozen as they began cost {cost:+.3f} nats"
        + ("" if cost.low > 0 else ", so that a large scale, under which they hardly turn, is no test")
        for part, cost in frozen.items()
    ]
    return [f"Control: {'; '.join(costs)}."] if costs else []


def _answer(gains: dict[str, dict[str, Estimate]], costs: dict[str, dict[str, Estimate]]) -> str:
    gained = "; ".join(
        f"under {rule} by {gains[f'{rule}: {NOTHING} − invariant']['mean']:+.3f} against none and by "
        f"{gains[f'{rule}: {MATRICES} − invariant']['mean']:+.3f} against all matrices"
        for rule in RULES
    )
    cost = " and ".join(
        f"{found['AWS: cost of the scale']:+.3f} (no decay {found['no decay − AWS']:+.3f} and L2 "
        f"{found['L2 − AWS']:+.3f} behind it) for {PARTS[part]}"
        for part, found in costs.items()
    )
    rates = {rate for by_rate in gains.values() for rate in by_rate if rate != "mean"}
    decay = "Decay" if len(rates) == 1 else "Averaged over learning rates, decay"
    return (
        f"{decay} on what is invariant lowers the test loss (nats) {gained}. "
        f"An initial scale of 10,000 costs AWS {cost}."
    )


def _loss(values: TunedValues) -> str:
    return f"{mean_of_tuned(values):.3f}"


CLAIM = WhatToDecay
