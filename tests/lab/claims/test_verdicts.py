"""The rule of judgement of each claim, on made-up summaries: each verdict is reached where its text says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.lab.claims.made_up_runs import (
    BUDGET,
    MadeUpRuns,
    Summary,
    finished,
    not_finite,
    outcome,
    rule_name,
)
from tests.lab.small import budget

import normwise as nw
from normwise.lab.claims import all_claims
from normwise.lab.claims.budget import Budget
from normwise.lab.claims.claim import Claim
from normwise.lab.claims.coefficient import Coefficient
from normwise.lab.claims.constant_regularizer import ConstantRegularizer
from normwise.lab.claims.effective_learning_rate import EffectiveLearningRate
from normwise.lab.claims.equilibrium import HEAVY, Equilibrium
from normwise.lab.claims.finished_runs import GUESSING_LOSS
from normwise.lab.claims.generalization import Generalization
from normwise.lab.claims.global_minimum import EPS, SCALES, GlobalMinimum
from normwise.lab.claims.initialization import Initialization
from normwise.lab.claims.instability import Instability
from normwise.lab.claims.migration import Migration
from normwise.lab.claims.no_tuning import NoTuning
from normwise.lab.claims.shrink import FREE, Shrink
from normwise.lab.claims.under_fitting import UnderFitting
from normwise.lab.claims.what_to_decay import INVARIANT, MATRICES, NOTHING, WhatToDecay
from normwise.lab.runs import regularizer
from normwise.lab.runs.arms import ARMS, AWS, L2, NONE, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.replay import ReplayRun

SHORT = {"AdaptiveWeightShrink": AWS, "L2": L2}


def _noisy(accuracy: float, run: Any, scale: float = 1.0) -> Summary:
    """Let the noise differ between rules, so that paired differences have a spread: up to 0.3 points."""
    noise = 0.001 * ((7 * run.seed + 3 * len(rule_name(run))) % 4 - 1.5)
    return finished(accuracy, run) | {"test_accuracy": accuracy + scale * noise}


def _arm(run: Any) -> str:
    base = replace(BUDGET.training, lr=run.lr, epochs=run.epochs)
    matching = (
        arm for arm in ARMS if (with_arm(base, arm).rule, with_arm(base, arm).mode) == (run.rule, run.mode)
    )
    return next(matching)


def constant_regularizer(run: Any, epsilons: float, regularized: float, l2: float) -> Summary:
    at = {"value": epsilons, "gradient": 1.0, "exactly_zero": 0.5}
    static = {t: {f"{s:g}": at for s in regularizer.SCALES} for t in ("float32", "float64")}
    angles = {"regularized": regularized, "twin": 1e-14, "L2": l2}
    return {"status": "finished", "static": static, "angles": angles}


def under_fitting(run: Any, at_one: float, at_ten: float) -> Summary:
    if _arm(run) != NONE:
        return finished(0.8, run)
    return finished(at_one if run.init_scale == 1 else at_ten, run)


def effective_learning_rate(run: Any, replay: float, twin: float, naive: float, differ: int) -> Summary:
    angles = {"replay": replay, "twin": twin, "naive": naive}
    others = {
        name: {"largest_angle": angle, "predictions_that_differ": differ} for name, angle in angles.items()
    }
    return {"status": "finished", "norm_change": 0.4, "test_images": 360, **others}


def generalization(run: Any, sphere: float, control: float, differ: int) -> Summary:
    if isinstance(run, ReplayRun):
        return {"status": "finished", "replay": {"predictions_that_differ": differ}}
    return _noisy({"": control, "Sphere": sphere}.get(rule_name(run), 0.80), run)


def global_minimum(run: Any, l2_ends: float, shift_ends: float) -> Summary:
    shifted = rule_name(run) == "EpsilonShiftedL2"
    ray = [
        {"scale": a, "loss": 1.0, "objective": 1 + (a - EPS) ** 2 if shifted else 1 + a, "gradient": 1 / a}
        for a in SCALES
    ]
    end = shift_ends if shifted else l2_ends
    return {"status": "finished", "ray": ray, "at_half": shift_ends if shifted else 1.0, "end": end}


def instability(run: Any, l2_fails_in: str) -> Summary:
    l2 = rule_name(run) == "L2"
    if isinstance(run, DeadUnitsRun):
        fails = 1020 if l2 and "a" in l2_fails_in else None
        never = {"zero_at": None, "ours_fails_at": None}
        return {"status": "finished", "smallest_norm": 1e-9, "torch_fails_at": fails, **never}
    found = finished(0.8, run) | {"spikes": 0, "skipped_steps": 0}
    if run.precision != "float32":
        return found | {"skipped_steps": int(l2 and "c" in l2_fails_in)}
    if run.lr == 0.4:
        aws = rule_name(run) == "AdaptiveWeightShrink"
        return found | {"spikes": 3 * ((l2 and "d" in l2_fails_in) or (aws and "D" in l2_fails_in))}
    return found | ({"test_accuracy": 0.7} if l2 and "b" in l2_fails_in else {})


def initialization(run: Any, aws_at_ends: float, l2_at_ends: float) -> Summary:
    end = {AWS: aws_at_ends, L2: l2_at_ends}.get(_arm(run), 0.6)
    return finished(end if run.init_scale in (1e-3, 1e3) else 0.80, run)


def coefficient(run: Any, l2_far_off: float, aws_far_off: float) -> Summary:
    rule = rule_from(run.rule)
    if isinstance(rule, nw.Sphere):
        return finished(0.7, run)
    matched = rule_from(with_arm(run, L2).rule)
    assert isinstance(rule, nw.L2 | nw.AdaptiveWeightShrink)
    assert isinstance(matched, nw.L2)
    off = not 0.2 < rule.strength / matched.strength < 5
    low = l2_far_off if isinstance(rule, nw.L2) else aws_far_off
    return _noisy(low if off else 0.8, run)


def equilibrium(run: Any, calm: float, heavy: float, sphere: float) -> Summary:
    ratio = heavy if run.momentum == HEAVY else calm
    fastest = {"L2": 1.0, "Sphere": sphere}.get(rule_name(run), 1.2)
    layer = {
        "gradient_scale": 0.1,
        "norm": 0.4,
        "predicted_norm": 0.4 / ratio,
        "norm_ratio": ratio,
        "turn": 0.01,
        "predicted_turn": 0.01,
        "turn_ratio": 1.0,
        "drift": 1.0,
    }
    return {"status": "finished", "layers": {"one": layer, "two": layer | {"turn": 0.01 * fastest}}}


def shrink(run: Any, aws: float, none: float, coupled: float) -> Summary:
    name = rule_name(run)
    if not name and run.optimizer == "sgd":
        return _noisy(none, run)
    if name == "L2" and run.mode == "coupled":
        return _noisy(coupled, run)
    return _noisy(aws if name == "AdaptiveWeightShrink" else 0.78, run)


def no_tuning(run: Any, aws: float, from_large: float | None = None) -> Summary:
    if from_large is not None and run.init_scale == 1e3:
        aws = from_large
    return _noisy(0.80 if rule_name(run) == "L2" else aws, run, scale=0.1)


def what_to_decay(run: Any, matrices: float, invariant: float, aws_large: float, l2_large: float) -> Summary:
    loss = {NOTHING: 2.0, MATRICES: matrices, INVARIANT: invariant}[run.decayed]
    if run.init_scale != 1:
        loss = {"AdaptiveWeightShrink": aws_large, "L2": l2_large}.get(rule_name(run), 2.4)
    loss += 0.001 * run.seed
    return {"status": "finished", "step": 8, "test_loss": loss, "validation_loss": loss}


def migration(run: Any, points: float, nats: float) -> Summary:
    noise = 0.0001 * run.seed
    twin = rule_name(run) == "AdaptiveWeightShrink"
    accuracy = 0.8 - noise - (points / 100 if twin else 0)
    loss = 1.8 + noise + (nats if twin else 0)
    return {"status": "finished", "step": 8, "test_accuracy": accuracy, "test_loss": loss}


CASES: list[tuple[type[Claim], Callable[..., Summary], tuple[Any, ...], str]] = [
    (ConstantRegularizer, constant_regularizer, (2.0, 1e-14, 1.0), "reproduced"),
    (ConstantRegularizer, constant_regularizer, (1e6, 1e-14, 1.0), "not reproduced"),
    (ConstantRegularizer, constant_regularizer, (2.0, 1e-8, 1.0), "not reproduced"),
    (ConstantRegularizer, constant_regularizer, (2.0, 1e-14, 1e-14), "not reproduced"),
    (UnderFitting, under_fitting, (0.70, 0.60), "reproduced"),
    (UnderFitting, under_fitting, (0.79, 0.60), "partly"),
    (UnderFitting, under_fitting, (0.79, 0.79), "not reproduced"),
    (EffectiveLearningRate, effective_learning_rate, (1e-13, 1e-13, 1.0, 0), "reproduced"),
    (EffectiveLearningRate, effective_learning_rate, (1e-6, 1e-6, 1.0, 0), "partly"),
    (EffectiveLearningRate, effective_learning_rate, (1e-6, 1e-13, 1.0, 0), "not reproduced"),
    (EffectiveLearningRate, effective_learning_rate, (1e-13, 1e-13, 1e-3, 0), "not reproduced"),
    (EffectiveLearningRate, effective_learning_rate, (1e-13, 1e-15, 1.0, 1), "not reproduced"),
    (Generalization, generalization, (0.80, 0.70, 0), "reproduced"),
    # the test would not notice another effective learning rate
    (Generalization, generalization, (0.80, 0.80, 0), "not reproduced"),
    (Generalization, generalization, (0.75, 0.70, 0), "not reproduced"),
    (Generalization, generalization, (0.80, 0.70, 1), "not reproduced"),
    (GlobalMinimum, global_minimum, (0.5, EPS), "reproduced"),
    (GlobalMinimum, global_minimum, (0.99, EPS), "partly"),
    (GlobalMinimum, global_minimum, (0.5, 0.2), "partly"),
    (GlobalMinimum, global_minimum, (0.99, 0.2), "not reproduced"),
    (Instability, instability, ("abcd",), "reproduced"),
    (Instability, instability, ("bcd",), "partly"),
    (Instability, instability, ("acd",), "partly"),
    (Instability, instability, ("abd",), "partly"),
    (Instability, instability, ("abcD",), "partly"),
    (Instability, instability, ("abc",), "undecided"),  # no spike on either side
    (Instability, instability, ("d",), "partly"),
    (Instability, instability, ("",), "undecided"),
    (Instability, instability, ("D",), "not reproduced"),
    (Initialization, initialization, (0.79, 0.70), "reproduced"),
    (Initialization, initialization, (0.795, 0.785), "partly"),  # flat, but hardly ahead
    (Initialization, initialization, (0.70, 0.65), "partly"),  # ahead, with 2/3 of the spread
    (Initialization, initialization, (0.75, 0.74), "not reproduced"),
    (Coefficient, coefficient, (0.5, 0.75), "reproduced"),
    (Coefficient, coefficient, (0.75, 0.5), "not reproduced"),
    (Equilibrium, equilibrium, (0.95, 0.85, 2.0), "reproduced"),
    (Equilibrium, equilibrium, (0.85, 0.85, 2.0), "partly"),  # 10 % are allowed, 20 % with momentum
    (Equilibrium, equilibrium, (0.95, 0.75, 2.0), "partly"),
    (Equilibrium, equilibrium, (0.95, 0.95, 1.1), "partly"),  # the sphere is more even than AWS
    (Equilibrium, equilibrium, (0.75, 0.75, 1.1), "not reproduced"),
    (Shrink, shrink, (0.85, 0.70, 0.80), "reproduced"),
    (Shrink, shrink, (0.80, 0.70, 0.80), "partly"),
    (Shrink, shrink, (0.80, 0.70, 0.81), "undecided"),  # about 1 point behind coupled L2
    (Shrink, shrink, (0.80, 0.80, 0.80), "not reproduced"),
    (Shrink, shrink, (0.80, 0.70, 0.85), "not reproduced"),
    (NoTuning, no_tuning, (0.85,), "reproduced"),
    (NoTuning, no_tuning, (0.80,), "undecided"),
    (NoTuning, no_tuning, (0.85, 0.75), "partly"),  # better on average, and far behind in a cell
    (NoTuning, no_tuning, (0.78,), "not reproduced"),
    (WhatToDecay, what_to_decay, (1.9, 1.8, 1.84, 2.2), "reproduced"),
    (WhatToDecay, what_to_decay, (1.9, 1.8, 1.90, 2.2), "partly"),  # a large scale costs AWS 0.1
    (WhatToDecay, what_to_decay, (1.9, 1.8, 1.84, 1.8), "partly"),  # L2 does as well from there
    (WhatToDecay, what_to_decay, (1.7, 1.8, 1.84, 2.2), "partly"),  # all matrices are better
    (WhatToDecay, what_to_decay, (1.7, 1.8, 1.90, 2.2), "not reproduced"),
    (WhatToDecay, what_to_decay, (1.9, 2.1, 2.20, 2.3), "not reproduced"),  # worse than nothing
]


@pytest.mark.parametrize(("claim", "make", "case", "verdict"), CASES)
@pytest.mark.one_in(2)
def test_a_claim_is_judged_by_its_rule(
    claim: type[Claim], make: Callable[..., Summary], case: tuple[Any, ...], verdict: str
) -> None:
    assert outcome(claim, lambda run: make(run, *case)).verdict == verdict


def test_the_answer_names_the_member_of_a_cell_where_there_are_several() -> None:
    def make(run: Any) -> Summary:
        worse = run.member == "plain" and run.init_scale == 10
        return under_fitting(run, 0.8, 0.5 if worse else 0.8)

    answer = UnderFitting(budget(("weight_norm", "plain"))).outcome(MadeUpRuns(make)).exhibits.answer
    assert "; most, by 30.0 [30.0, 30.0] points, with plain at initial norm 10 and learning rate " in answer
    alone = UnderFitting(budget()).outcome(MadeUpRuns(make)).exhibits.answer
    assert "; most, by 0.0 [0.0, 0.0] points, at initial norm " in alone


def test_the_rules_of_all_claims_are_tested() -> None:
    assert {case[0] for case in CASES} | {Migration} == set(all_claims())


@pytest.mark.parametrize(
    ("twin_norm", "none_norm", "points", "nats", "verdict"),
    [
        (2.2, 8.0, 0.0, 0.0, "reproduced"),
        (3.0, 8.0, 0.0, 0.0, "partly"),  # norms 50 % apart
        (2.2, 2.3, 0.0, 0.0, "partly"),  # more than half as far apart as without decay
        (2.2, 8.0, 2.0, 0.0, "partly"),
        (3.0, 8.0, 2.0, 0.0, "partly"),
        (3.0, 8.0, 2.0, 0.2, "not reproduced"),
    ],
)
def test_migration_is_judged_by_its_rule(
    twin_norm: float, none_norm: float, points: float, nats: float, verdict: str
) -> None:
    norms = {"": none_norm, "AdaptiveWeightShrink": twin_norm, "L2": 2.0}
    found = outcome(Migration, lambda run: migration(run, points, nats), lambda run: norms[rule_name(run)])
    assert found.verdict == verdict
    text = found.statistics["text"]
    assert text["largest_relative_difference"]["norm"].mean == pytest.approx(twin_norm / 2 - 1)
    assert text["twin_minus_recipe"].difference.mean == pytest.approx(nats, abs=1e-12)
    assert len(found.exhibits.traces) == 6


def test_statistics_are_those_of_the_runs() -> None:
    spread = outcome(Initialization, lambda run: initialization(run, 0.75, 0.60)).statistics["weight_norm"]
    assert spread["spread"][AWS].mean == pytest.approx(5, abs=0.01)
    found = outcome(Coefficient, lambda run: coefficient(run, 0.5, 0.75))
    # six coefficients over five decades, two of them within a factor of 5
    assert found.statistics["weight_norm"]["lost"][L2].mean == pytest.approx(30 * 4 / 6, abs=0.3)
    assert found.exhibits.maps == []  # of the full budget
    found = outcome(Shrink, lambda run: shrink(run, 0.85, 0.70, 0.80))
    arms = Shrink(BUDGET)._tuned_arms("weight_norm")
    assert set(found.statistics["weight_norm"]["AWS_minus"]) == {*arms, FREE} - {AWS}
    counts = outcome(NoTuning, lambda run: no_tuning(run, 0.85)).statistics["overall"]["counts"]
    assert counts == {"equivalent": 0, "better": 8, "worse": 0, "undecided": 0}
    found = outcome(WhatToDecay, lambda run: what_to_decay(run, 1.9, 1.8, 1.84, 2.2))
    assert found.statistics["gain"]["AWS: matrices − invariant"]["mean"].mean == pytest.approx(0.1)


def test_an_arm_that_did_not_finish_scores_what_guessing_scores_and_is_counted() -> None:
    def make(run: Any) -> Summary:
        failed = _arm(run) == AWS and run.init_scale == 1e3 and run.start == "as is"
        return not_finite() if failed else finished(0.8, run)

    found = outcome(Initialization, make)
    (note,) = found.exhibits.notes
    assert "AWS, initial norm 1000: 2 of 2 runs ended at step 3 (not finite): the training loss" in note
    assert found.statistics["weight_norm"]["spread"][AWS].mean == pytest.approx(70, abs=0.1)
    row = next(row for row in found.exhibits.tables[1].rows if row[0] == AWS)
    assert row[-2] == "10.0 (2 did not finish)"
    assert found.verdict == "not reproduced"


def test_a_setting_of_which_a_run_failed_does_not_agree() -> None:
    def make(run: Any) -> Summary:
        failed = run.momentum == HEAVY and run.seed == 0
        return not_finite() if failed else equilibrium(run, 1.0, 1.0, 2.0)

    found = outcome(Equilibrium, make)
    assert (found.verdict, found.statistics["agree"], found.statistics["of"]) == ("partly", 3, 7)


def test_a_run_that_did_not_finish_scores_what_guessing_scores_and_is_counted() -> None:
    found = outcome(NoTuning, lambda run: not_finite() if run.init_scale == 1e3 else finished(0.80, run))
    assert found.statistics["overall"]["counts"]["equivalent"] == 8  # two cells in which all arms guess
    assert all("norm 1000: 6 runs of" in note for note in found.exhibits.notes)
    failing = outcome(
        NoTuning,
        lambda run: (
            not_finite() if run.start == "equilibrium" and run.init_scale == 1e3 else finished(0.8, run)
        ),
    )
    assert failing.statistics["overall"]["cells_below_the_floor"] == 2  # of SGD and of Adam
    assert failing.verdict == "not reproduced"


def test_a_run_of_the_language_model_that_did_not_finish_is_noted() -> None:
    def make(run: Any) -> Summary:
        failed = run.init_scale != 1 and rule_name(run) == "L2"
        return not_finite() if failed else what_to_decay(run, 2.0, 2.0, 2.0, 2.0)

    found = outcome(WhatToDecay, make)
    assert any("ended at step 3 (not finite): the training loss was nan" in n for n in found.exhibits.notes)
    behind = found.statistics["scale"]["stream"]["L2 − AWS"]
    assert behind.mean == pytest.approx(GUESSING_LOSS - 2.0, abs=0.01)


@pytest.mark.parametrize("claim", [UnderFitting, Initialization, Coefficient, Shrink, Migration, NoTuning])
def test_a_claim_can_be_shown_with_the_cells_of_the_full_budget(claim: type[Claim]) -> None:
    full = claim(Budget.of("full", "fashion-mnist", ""))
    found = full.outcome(MadeUpRuns(lambda run: finished(0.8, run) | {"validation_loss": 1.0}))
    assert found.exhibits.plots
