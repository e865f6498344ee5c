"""The claims that compare arms after tuning, judged on made-up summaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.lab.engine.made_up_runs import BUDGET, MadeUpRuns, Summary, finished, judge

import normwise as nw
from normwise.lab.claims.claim import Budget, Series
from normwise.lab.claims.coefficient import CLAIM as COEFFICIENT
from normwise.lab.claims.coefficient import times
from normwise.lab.claims.generalization import CLAIM as GENERALIZATION
from normwise.lab.claims.no_tuning import CLAIM as NO_TUNING
from normwise.lab.claims.shrink import CLAIM as SHRINK
from normwise.lab.claims.shrink import FREE, READINGS, _read, _tuned_arms
from normwise.lab.runs.arms import AWS, L2, NONE, SPHERE, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.replay import ReplayRun
from normwise.lab.runs.train import TrainRun


def _noise(settings: TrainRun) -> float:
    """Differs between rules, so that paired differences have a spread: up to 0.3 points."""
    name = "" if settings.rule is None else str(settings.rule["name"])
    return 0.001 * ((7 * settings.seed + 3 * len(name)) % 4 - 1.5)


@pytest.mark.parametrize(
    ("sphere", "control", "differ", "verdict"),
    [
        (0.80, 0.70, 0, "reproduced"),
        (0.80, 0.80, 0, "not reproduced"),  # the test would not notice another effective learning rate
        (0.75, 0.70, 0, "not reproduced"),
        (0.80, 0.70, 1, "not reproduced"),
    ],
)
def test_generalization_is_judged_by_its_rule(
    sphere: float, control: float, differ: int, verdict: str
) -> None:
    def make(settings: Any) -> Summary:
        if isinstance(settings, ReplayRun):
            return {"status": "finished", "replay": {"predictions_that_differ": differ}}
        rule = rule_from(settings.rule)
        accuracy = control if rule is None else sphere if isinstance(rule, nw.Sphere) else 0.80
        return finished(accuracy, settings) | {"test_accuracy": accuracy + _noise(settings)}

    assert judge(GENERALIZATION, make).verdict == verdict


def test_the_scheduled_sphere_has_the_effective_learning_rates_of_the_decayed_runs() -> None:
    runs = MadeUpRuns(lambda settings: finished(0.8, settings))
    second = GENERALIZATION.second_runs(BUDGET, runs)
    assert {run.seed for run in second} == set(BUDGET.many_seeds)
    for run in second:
        assert isinstance(run, TrainRun)
        assert rule_from(run.rule) == nw.Sphere(1.0)
        # from norm 10 at the start to the 0.1 / 0.1 of the made-up metrics
        assert run.relative_lr == ((0.01, 1.0, 1.0),) * 2


@pytest.mark.parametrize(
    ("l2_far_off", "aws_far_off", "verdict"), [(0.5, 0.75, "reproduced"), (0.75, 0.5, "not reproduced")]
)
def test_coefficient_is_judged_by_its_rule(l2_far_off: float, aws_far_off: float, verdict: str) -> None:
    def make(settings: TrainRun) -> Summary:
        rule = rule_from(settings.rule)
        if isinstance(rule, nw.Sphere):
            return finished(0.7, settings)
        assert isinstance(rule, nw.L2 | nw.AdaptiveWeightShrink)
        matched = rule_from(with_arm(settings, L2).rule)
        assert isinstance(matched, nw.L2)
        off = not 0.2 < rule.strength / matched.strength < 5
        low = l2_far_off if isinstance(rule, nw.L2) else aws_far_off
        found = finished(low if off else 0.8, settings)
        return found | {"test_accuracy": found["test_accuracy"] + _noise(settings)}

    finding = judge(COEFFICIENT, make)
    assert finding.verdict == verdict
    lost = finding.statistics["weight_norm"]["lost"]
    # six coefficients over five decades, two of them within a factor of 5
    assert lost[L2]["mean"] == pytest.approx(100 * (0.8 - l2_far_off) * 4 / 6, abs=0.3)
    assert len(finding.maps) == 3
    assert {m.low for m in finding.maps} == {finding.maps[0].low}


@pytest.mark.parametrize(
    ("aws", "none", "coupled", "verdict"),
    [
        (0.85, 0.70, 0.80, "reproduced"),
        (0.80, 0.70, 0.80, "partly"),
        (0.80, 0.80, 0.80, "not reproduced"),
        (0.80, 0.70, 0.85, "not reproduced"),
    ],
)
def test_shrink_is_judged_by_its_rule(aws: float, none: float, coupled: float, verdict: str) -> None:
    def make(settings: TrainRun) -> Summary:
        accuracy = 0.78
        if settings.rule is None and settings.optimizer == "sgd":
            accuracy = none
        elif settings.mode == "coupled" and settings.rule and settings.rule["name"] == "L2":
            accuracy = coupled
        elif settings.rule and settings.rule["name"] == "AdaptiveWeightShrink":
            accuracy = aws
        return finished(accuracy, settings) | {"test_accuracy": accuracy + _noise(settings)}

    finding = judge(SHRINK, make)
    assert finding.verdict == verdict
    assert set(finding.statistics["weight_norm"]["AWS_minus"]) == {*_tuned_arms(), FREE} - {AWS}


def test_every_arm_is_tuned_over_as_many_candidates_by_seeds_that_are_not_compared() -> None:
    for name in ("quick", "full"):
        budget = Budget.of(name, "fashion-mnist", "f")
        counts = {len(SHRINK._candidates(budget, "weight_norm", arm)) for arm in _tuned_arms()}
        assert counts == {5 if name == "quick" else 15}
        assert not set(budget.tuning_seeds) & set(budget.many_seeds)


def test_chosen_settings_are_those_with_the_best_validation_accuracy() -> None:
    def make(settings: TrainRun) -> Summary:
        rule = rule_from(settings.rule)
        right = isinstance(rule, nw.AdaptiveWeightShrink) and rule.strength * settings.total_time > 20
        return finished(0.5, settings) | {"validation_accuracy": 0.9 if right else 0.5}

    compared = SHRINK._compared(BUDGET, MadeUpRuns(make), "weight_norm")
    rule = rule_from(compared[AWS].rule)
    assert isinstance(rule, nw.AdaptiveWeightShrink)
    assert rule.strength * compared[AWS].total_time == pytest.approx(30)


def test_readings_of_aws_have_the_same_pull_on_units_of_norm_one() -> None:
    base = with_arm(BUDGET.small, AWS)
    mean_lr = base.total_time / base.steps
    pulls = {}
    for name in READINGS:
        run = _read(base, name, 1.0)
        rule = rule_from(run.rule)
        assert rule is not None
        norm = 1.0 if run.dim == 0 else (2 * run.width) ** 0.5
        pulls[name] = float(rule.rate(norm)) * (mean_lr if run.clock == "lr" else 1.0)
    assert pulls == pytest.approx(dict.fromkeys(READINGS, 3 / base.steps))


@pytest.mark.parametrize(
    ("aws", "verdict"), [(0.85, "reproduced"), (0.80, "reproduced"), (0.78, "not reproduced")]
)
def test_no_tuning_is_judged_by_its_rule(aws: float, verdict: str) -> None:
    def make(settings: TrainRun) -> Summary:
        accuracy = 0.80 if isinstance(rule_from(settings.rule), nw.L2) else aws
        return finished(accuracy, settings) | {"test_accuracy": accuracy + 0.1 * _noise(settings)}

    finding = judge(NO_TUNING, make)
    assert finding.verdict == verdict
    counts = finding.statistics["overall"]["counts"]
    assert sum(counts.values()) == 10
    assert counts["better"] == (10 if aws > 0.8 else 0)


def test_no_tuning_says_where_no_seed_finished() -> None:
    def make(settings: TrainRun) -> Summary:
        if settings.init_scale == 1e3:
            return {"status": "not finite", "step": 3, "reason": "the training loss was nan"}
        return finished(0.80, settings)

    finding = judge(NO_TUNING, make)
    assert finding.statistics["overall"]["counts"]["undecided"] == 2  # of SGD and of Adam
    assert len(finding.notes) == 2
    assert all("norm 1000: undecided, as no seed finished" in note for note in finding.notes)


def test_a_curve_over_seeds_has_means_intervals_and_gaps() -> None:
    curve = Series.over("a", {1.0: [1.0, 2.0, 3.0], 2.0: [None, 5.0, None], 3.0: [None, None, None]}, color=2)
    low, high = curve.low, curve.high
    assert low is not None
    assert high is not None
    assert (low[0], high[0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert [list(values)[1:] for values in (curve.y, low, high)] == [[5.0, None], [None, None], [None, None]]
    assert curve.by_seed == [(1.0, None, None), (2.0, 5.0, None), (3.0, None, None)]
    assert (curve.x, curve.color, curve.dashed) == ([1.0, 2.0, 3.0], 2, False)


def test_an_l2_tuned_in_the_centre_keeps_its_coefficient_in_every_cell() -> None:
    runs = NO_TUNING.second_runs(BUDGET, MadeUpRuns(lambda settings: finished(0.8, settings)))
    rules = {str(run.rule) for run in runs if isinstance(run, TrainRun) and run.optimizer == "sgd"}
    rates = {run.lr for run in runs if isinstance(run, TrainRun) and run.optimizer == "sgd"}
    assert len(rates) == 3
    # the first of seven is chosen where all are equal: one coefficient for each rate, the centre's among them
    assert len(rules) == 3


def test_adam_is_matched_on_the_rms_that_an_undecayed_weight_reaches() -> None:
    run = replace(BUDGET.small, optimizer="adam", measure="rms", lr=0.003)
    norm = run.total_squares**0.5
    aws, l2, sphere = (rule_from(with_arm(run, arm).rule) for arm in (AWS, L2, SPHERE))
    assert isinstance(aws, nw.AdaptiveWeightShrink)
    assert isinstance(l2, nw.L2)
    assert aws.strength == pytest.approx(3 / (run.total_time * norm))
    assert l2.strength == pytest.approx(aws.strength * norm)
    assert sphere == nw.Sphere(norm)
    assert with_arm(run, NONE).rule is None
    assert rule_from(times(with_arm(run, L2), 2.0).rule) == nw.L2(2 * l2.strength)
