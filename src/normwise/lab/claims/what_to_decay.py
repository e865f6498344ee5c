"""Claim: what is decayed matters more than how: decay belongs on what is scale-invariant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims import what_to_decay_shown as shown
from normwise.lab.claims.claim import Budget, Claim, Finding, Runs, Verdict
from normwise.lab.claims.statistics import Estimate, paired_difference
from normwise.lab.claims.traces import traces
from normwise.lab.claims.tuning import chosen
from normwise.lab.claims.what_to_decay_shown import (
    AWS,
    INVARIANT,
    L2,
    MATRICES,
    NOTHING,
    PARTS,
    RULES,
    Arm,
    ByScale,
)
from normwise.lab.engine.run import Run
from normwise.lab.runs.text import TextRun

MULTIPLES = {"quick": (0.3, 1.0, 3.0), "full": (0.1, 0.3, 1.0, 3.0)}
RATES = {"quick": (0.01,), "full": (0.004, 0.01, 0.025)}
CENTRE = 0.01
SCALES = {"quick": (1e4,), "full": (1e4,)}
LARGEST = 1e4
SAME = 0.05  # nats: what a scale may cost

ARMS: tuple[Arm, ...] = (
    (NOTHING, None),
    *((what, rule) for what in (MATRICES, INVARIANT) for rule in RULES),
)


class WhatToDecay(Claim):
    """See the texts."""

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
        "A GPT of characters on the King James Bible (pre-norm, QK-norm; 2 blocks and 360 steps, quick 1 and "
        "160; AdamW, warm-up and cosine). Decayed are: nothing; all matrices; or what nw.plan says is to be "
        "shrunk: queries and keys, each alone, and embeddings and all layers that write to the residual "
        "stream, jointly. Rules: L2 and AWS by their flows, on the RMS of each tensor, with the pull 3/Σlr "
        "at √Σlr² (for_budget) times 0.1, 0.3, 1 or 3 (quick: 0.3, 1 or 3), chosen for each rule, object and "
        "learning rate by validation loss with other seeds. Learning rates 0.004, 0.01 and 0.025 (quick: "
        "0.01). Then, at 0.01 with the same coefficients, queries and keys, or embeddings and writers, start "
        "10,000 times as large, which leaves the network's function as it is. A "
        "control in the full budget: the same weights frozen. That must hurt, or it would do no harm that "
        "large weights hardly turn. Pilots with seed 5000 only, at the learning rate 0.01, settled the "
        "initialisation (with which freezing hurts), the length of a run and the range of multiples."
    )
    statistic = (
        "Test loss in nats a character, paired by seed (quick 3, full 5), with 95 % intervals by Student's "
        "t: nothing minus invariant and matrices minus invariant, for each rule and learning rate; and, at "
        "the scale of 10,000, the loss under the tuned AWS on the invariant weights minus that at scale 1, "
        "and that of L2 on the same weights, and of no decay, minus that of AWS."
    )
    rule = (
        "Object: for both rules, at every learning rate, both differences are above 0 with their intervals. "
        f"Scale: for both parts AWS loses at most {SAME:g} nats from scale 1 to 10,000, and L2 and no decay "
        "are worse than it there, with intervals above 0. Reproduced: both hold. Partly: one holds, or for "
        "both rules the differences, averaged over learning rates, are above 0 with their intervals. Not "
        "reproduced: otherwise."
    )
    needs_text = True

    def runs(self, budget: Budget) -> list[Run]:
        """All candidates with the seeds of tuning; no decay and frozen weights with those of the claim."""
        runs: list[Run] = []
        for lr in RATES[budget.name]:
            tuned = [run for arm in ARMS[1:] for run in self._candidates(budget, arm, lr).values()]
            runs += [replace(run, seed=seed) for run in tuned for seed in budget.tuning_seeds]
            runs += [replace(self._base(budget, lr), seed=seed) for seed in budget.seeds]
        others = [self._frozen(budget, part) for part in PARTS] if budget.full else []
        others += [
            _from_scale(self._base(budget, CENTRE), part, scale)
            for part in PARTS
            for scale in SCALES[budget.name]
        ]
        return runs + [replace(run, seed=seed) for run in others for seed in budget.seeds]

    def second_runs(self, budget: Budget, runs: Runs) -> list[Run]:
        """What was chosen, with the seeds of the claim; at the central learning rate from all scales."""
        wanted = [self._tuned(budget, runs, arm, lr) for lr in RATES[budget.name] for arm in ARMS[1:]]
        for rule in RULES:
            best = self._tuned(budget, runs, (INVARIANT, rule), CENTRE)
            wanted += [_from_scale(best, part, scale) for part in PARTS for scale in SCALES[budget.name]]
        return [replace(run, seed=seed) for run in wanted for seed in budget.seeds]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare objects of decay at each learning rate, then rules at a large initial scale."""
        losses = {
            (arm, lr): runs.values("test_loss", self._tuned(budget, runs, arm, lr), budget.seeds)
            for arm in ARMS
            for lr in RATES[budget.name]
        }
        gains: dict[str, dict[str, Estimate]] = {}
        for rule in RULES:
            for other in (NOTHING, MATRICES):
                arm = (other, None if other == NOTHING else rule)
                pairs = [(losses[arm, lr], losses[(INVARIANT, rule), lr]) for lr in RATES[budget.name]]
                by_rate = {
                    f"{lr:g}": paired_difference(*pair)
                    for lr, pair in zip(RATES[budget.name], pairs, strict=True)
                }
                ours = [_average(values) for values in zip(*(b for _, b in pairs), strict=True)]
                theirs = [_average(values) for values in zip(*(a for a, _ in pairs), strict=True)]
                gains[f"{rule}: {other} − invariant"] = by_rate | {"mean": paired_difference(theirs, ours)}
        everywhere = all(gain.low > 0 for by_rate in gains.values() for gain in by_rate.values())
        on_average = all(by_rate["mean"].low > 0 for by_rate in gains.values())
        by_scale = {part: self._from_scales(budget, runs, part) for part in PARTS}
        scale = {part: _costs(found) for part, found in by_scale.items()}
        robust = all(found["AWS: cost of the scale"].mean <= SAME for found in scale.values()) and all(
            found[f"{other} − AWS"].low > 0 for found in scale.values() for other in ("no decay", L2)
        )
        verdict: Verdict = "not reproduced"
        if everywhere and robust:
            verdict = "reproduced"
        elif everywhere or robust or on_average:
            verdict = "partly"
        frozen = {
            part: paired_difference(
                runs.values("test_loss", self._frozen(budget, part), budget.seeds),
                losses[(NOTHING, None), CENTRE],
            )
            for part in (PARTS if budget.full else ())
        }
        statistics: dict[str, Any] = {
            "gain": {name: {lr: e.as_dict() for lr, e in found.items()} for name, found in gains.items()},
            "scale": {part: {k: e.as_dict() for k, e in found.items()} for part, found in scale.items()},
            "frozen_minus_trained": {part: estimate.as_dict() for part, estimate in frozen.items()},
            "object_holds": everywhere,
            "scale_holds": robust,
        }
        multiples = {key: self._multiple(budget, runs, *key) for key in losses}
        tried = MULTIPLES[budget.name]
        notes = shown.control(frozen) + shown.edges(multiples, (tried[0], tried[-1]))
        first = budget.seeds[0]
        over_time = {
            shown.label(arm): replace(self._tuned(budget, runs, arm, CENTRE), seed=first)
            for arm in (ARMS[0], (MATRICES, AWS), (INVARIANT, AWS))
        }
        return Finding(
            verdict,
            shown.answer(gains, scale),
            statistics,
            [shown.loss_plot(losses), *shown.scale_plots(by_scale)],
            [shown.loss_table(losses, multiples), shown.scale_table(by_scale)],
            notes + self._endings(budget, runs),
            traces=traces(runs, over_time, f"seed {first}, lr {CENTRE:g}", degree=1),
        )

    def _base(self, budget: Budget, lr: float) -> TextRun:
        return replace(budget.text, lr=lr)

    def _frozen(self, budget: Budget, part: str) -> TextRun:
        return replace(self._base(budget, CENTRE), frozen=part)

    def _candidates(self, budget: Budget, arm: Arm, lr: float) -> dict[float, TextRun]:
        what, rule = arm
        base = replace(self._base(budget, lr), decayed=what)
        if rule is None:
            return {0.0: base}
        return {multiple: with_rule(base, rule, multiple) for multiple in MULTIPLES[budget.name]}

    def _multiple(self, budget: Budget, runs: Runs, arm: Arm, lr: float) -> float:
        candidates = self._candidates(budget, arm, lr)
        if len(candidates) == 1:
            return next(iter(candidates))
        return chosen(runs, candidates, budget.tuning_seeds, "validation_loss", smallest=True)

    def _tuned(self, budget: Budget, runs: Runs, arm: Arm, lr: float) -> TextRun:
        return self._candidates(budget, arm, lr)[self._multiple(budget, runs, arm, lr)]

    def _from_scales(self, budget: Budget, runs: Runs, part: str) -> dict[str, ByScale]:
        """Return the losses by initial scale of a part, for each arm that starts from large ones."""
        arms = {"no decay": ARMS[0], L2: (INVARIANT, L2), AWS: (INVARIANT, AWS)}
        return {
            label: {
                scale: runs.values("test_loss", _from_scale(tuned, part, scale), budget.seeds)
                for scale in (1.0, *SCALES[budget.name])
            }
            for label, tuned in ((name, self._tuned(budget, runs, arm, CENTRE)) for name, arm in arms.items())
        }

    def _endings(self, budget: Budget, runs: Runs) -> list[str]:
        wanted: dict[str, list[Run]] = {}
        for run in [*self.runs(budget), *self.second_runs(budget, runs)]:
            assert isinstance(run, TextRun)
            wanted.setdefault(f"{run.decayed}, lr {run.lr:g}, scale {run.init_scale:g}", []).append(run)
        return runs.endings(wanted)


def _costs(by_scale: dict[str, ByScale]) -> dict[str, Estimate]:
    """Return what the largest scale costs AWS, and how far the others are behind it there."""
    large = {label: at[LARGEST] for label, at in by_scale.items()}
    found = {"AWS: cost of the scale": paired_difference(large[AWS], by_scale[AWS][1.0])}
    return found | {
        f"{label} − AWS": paired_difference(large[label], large[AWS]) for label in ("no decay", L2)
    }


def with_rule(base: TextRun, rule: str, multiple: float) -> TextRun:
    """Return the run under L2 or AWS with so many times the pull of ``for_budget`` at the RMS √Σlr²."""
    reference = base.total_squares**0.5
    aws = nw.AdaptiveWeightShrink(
        nw.AdaptiveWeightShrink.for_budget(base.total_time, norm=reference).strength * multiple
    )
    if rule == AWS:
        return base.with_rule(aws)
    return base.with_rule(nw.theory.match(aws, nw.L2, norm=reference))


def _from_scale(run: TextRun, part: str, scale: float) -> TextRun:
    return run if scale == 1.0 else replace(run, scaled=part, init_scale=scale)


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


CLAIM = WhatToDecay()
