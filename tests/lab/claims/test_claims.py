"""What claims run: budgets, seeds, tuning and matched coefficients."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.claims.made_up_runs import BUDGET, MadeUpRuns, Summary, finished, outcome, rule_name

import normwise as nw
from normwise.cli import CLAIMS
from normwise.lab.claims import all_claims, claims_named
from normwise.lab.claims.budget import BUDGETS, Budget
from normwise.lab.claims.claim import Claim, Exhibits, Outcome
from normwise.lab.claims.exhibits import Series, Table
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.claims.generalization import Generalization
from normwise.lab.claims.migration import PULL, Migration
from normwise.lab.claims.no_tuning import NoTuning
from normwise.lab.claims.shrink import READINGS, Shrink, _read
from normwise.lab.claims.statistics import Estimate
from normwise.lab.claims.what_to_decay import CENTRE, DECAYED, MULTIPLES, WhatToDecay, with_rule
from normwise.lab.engine.execution import execute
from normwise.lab.engine.store import Store
from normwise.lab.runs.arms import ARMS, AWS, L2, NONE, SPHERE, times, with_arm
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun


def test_claims_are_found_in_order_and_by_name() -> None:
    assert tuple(claim.id for claim in all_claims()) == CLAIMS
    assert [claim.id for claim in claims_named(["initialization"])] == ["initialization"]
    with pytest.raises(ValueError, match=f"claim 'gravity' is not known: choose from {CLAIMS[0]}, "):
        claims_named(["gravity"])


@pytest.mark.parametrize("claim", all_claims())
def test_every_claim_is_registered_in_full_and_compares_paired_seeds(claim: type[Claim]) -> None:
    assert all(len(text) > 20 for name, text in claim.texts().items() if name != "title")
    runs = claim(BUDGET).runs()
    by_seed = [{replace(r, seed=0).identity for r in runs if r.seed == seed} for seed in BUDGET.seeds]
    assert all(others <= by_seed[0] for others in by_seed)  # some runs are made with the first seed only
    assert by_seed[0]


def test_claims_share_runs() -> None:
    by_claim = [{run.identity for run in claim(BUDGET).runs()} for claim in all_claims()]
    assert len(set.union(*by_claim)) < sum(map(len, by_claim))


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("data", ["fashion-mnist", "digits"])
def test_budgets_fit_their_data(name: str, data: str) -> None:
    made = Budget.of(name, data, "f")
    side = {"fashion-mnist": 28, "digits": 8}[data]
    assert side % made.training.image_size == 0
    assert len(made.seeds) >= 3
    assert Budget.of(name, data, "f", seeds=4).seeds == (0, 1, 2, 3)


def test_budgets_that_are_not_possible_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--budget endless is not known: choose from quick, full, large, paper"
    ):
        Budget.of("endless", "digits", "f")
    with pytest.raises(ValueError, match="--seeds 1 is not possible"):
        Budget.of("quick", "digits", "f", seeds=1)


def test_outcomes_become_plain_values_that_json_can_hold() -> None:
    estimate = Estimate(1.0, float("nan"), float("nan"), 1)
    exhibits = Exhibits("", [], [Table("", ["x", "y"], [[float("inf"), 1.0]])])
    plain = Outcome("partly", "", {"a": float("nan"), "b": [estimate]}, {}, exhibits).as_dict()
    assert plain["statistics"] == {"a": None, "b": [{"mean": 1.0, "low": None, "high": None, "n": 1}]}
    assert plain["tables"][0]["rows"] == [[None, 1.0]]


def test_a_curve_over_seeds_has_means_intervals_and_gaps() -> None:
    values: dict[float, Any] = {1.0: [1.0, 2.0, 3.0], 2.0: [None, 5.0, None], 3.0: [None, None, None]}
    curve = Series.over_seeds("a", values, color=2)
    low, high = curve.low, curve.high
    assert low is not None
    assert high is not None
    assert (low[0], high[0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert [list(values)[1:] for values in (curve.y, low, high)] == [[None, None]] * 3
    assert curve.by_seed == [(1.0, None, None), (2.0, 5.0, None), (3.0, None, None)]
    assert (curve.x, curve.color, curve.dashed) == ([1.0, 2.0, 3.0], 2, False)


# matched coefficients


def test_arms_have_the_same_pull_at_norm_one() -> None:
    rules = {arm: rule_from(with_arm(BUDGET.training, arm).rule) for arm in ARMS}
    pulls = {arm: float(rule.rate(1.0)) for arm, rule in rules.items() if rule and arm != SPHERE}
    assert pulls == pytest.approx(dict.fromkeys(pulls, 3 / BUDGET.training.total_time))
    assert set(ARMS) - set(pulls) == {NONE, SPHERE}


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


def test_the_scheduled_sphere_has_the_effective_learning_rates_of_the_decayed_runs() -> None:
    second = Generalization(BUDGET).second_runs(MadeUpRuns(lambda run: finished(0.8, run)))
    assert {run.seed for run in second} == set(BUDGET.many_seeds)
    for run in second:
        assert isinstance(run, TrainRun)
        assert rule_from(run.rule) == nw.Sphere(1.0)
        # from norm 10 at the start to the 0.1 / 0.1 of the made-up metrics
        assert run.relative_lr == ((0.01, *[1.0] * 8),) * 2


def test_twins_have_the_pull_of_the_recipe_at_the_norm_that_it_had_half_way() -> None:
    norm = 1.7
    claim = Migration(BUDGET)
    recipes = [run for run in claim.runs() if getattr(run, "rule", None)]
    twins = claim.second_runs(MadeUpRuns(lambda run: finished(0.8, run), lambda run: norm))
    for run_class, coupling in ((TrainRun, 0.1), (TextRun, 1.0)):
        recipe = next(run for run in recipes if isinstance(run, run_class))
        twin = next(run for run in twins if isinstance(run, run_class))
        old, new = rule_from(recipe.rule), rule_from(twin.rule)
        assert isinstance(new, nw.AdaptiveWeightShrink)
        assert old is not None
        assert float(new.rate(norm)) == pytest.approx(float(old.rate(norm)) / coupling)
        assert float(new.rate(norm)) * recipe.total_time == pytest.approx(PULL)
        assert (recipe.mode, twin.mode) == ("coupled" if coupling == 0.1 else "explicit", "flow")
        assert replace(twin, rule=recipe.rule, mode=recipe.mode, seed=recipe.seed) == recipe


# tuning


def test_every_arm_is_tuned_over_as_many_candidates_by_seeds_that_are_not_compared() -> None:
    for name in BUDGETS:
        budget = Budget.of(name, "fashion-mnist", "f")
        claim = Shrink(budget)
        for member in budget.members:
            counts = {len(claim._candidates(member, arm)) for arm in claim._tuned_arms(member)}
            assert counts == {3 if name == "quick" else 15}
        assert not set(budget.tuning_seeds) & set(budget.many_seeds)


def test_every_arm_of_the_language_model_is_tuned_with_the_same_budget_and_matched() -> None:
    runs: list[Any] = [run for run in WhatToDecay(BUDGET).runs() if run.seed in BUDGET.tuning_seeds]
    names = {L2: "L2", AWS: "AdaptiveWeightShrink"}
    counts = Counter((run.decayed, rule_name(run)) for run in runs)
    each = len(MULTIPLES["quick"]) * len(BUDGET.tuning_seeds)
    assert counts == {(arm.decayed, names[str(arm.rule)]): each for arm in DECAYED}
    base = replace(BUDGET.text, lr=CENTRE)
    for name in (L2, AWS):
        rule = rule_from(with_rule(base, name, 1.0).rule)
        assert rule is not None
        assert float(rule.rate(base.total_squares**0.5)) == pytest.approx(3 / base.total_time)


def test_chosen_settings_are_those_with_the_best_validation_accuracy() -> None:
    def make(run: TrainRun) -> Summary:
        rule = rule_from(run.rule)
        right = isinstance(rule, nw.AdaptiveWeightShrink) and rule.strength * run.total_time > 20
        return finished(0.5, run) | {"validation_accuracy": 0.9 if right else 0.5}

    second: list[Any] = Shrink(BUDGET).second_runs(MadeUpRuns(make))
    (aws,) = {run.rule["coefficient"] for run in second if rule_name(run) == "AdaptiveWeightShrink"}
    assert aws * BUDGET.small.total_time == pytest.approx(30)


@pytest.mark.parametrize("best", MULTIPLES["quick"])
def test_multiples_are_chosen_on_validation_loss_by_other_seeds(best: float) -> None:
    def multiple(run: TextRun) -> float:
        base, name = replace(run, rule=None), L2 if rule_name(run) == "L2" else AWS
        return next(m for m in MULTIPLES["quick"] if with_rule(base, name, m).rule == run.rule)

    def make(run: TextRun) -> Summary:
        loss = 1.5 if run.rule and run.start == "as is" and multiple(run) == best else 1.9
        # the validation losses of the claim's own seeds play no role
        validation = loss if run.seed in BUDGET.tuning_seeds else 9.0
        return {"status": "finished", "test_loss": loss + 0.001 * run.seed, "validation_loss": validation}

    second: list[Any] = WhatToDecay(BUDGET).second_runs(MadeUpRuns(make))
    assert {multiple(run) for run in second} == {best}
    assert {run.seed for run in second} == set(BUDGET.seeds)
    at_end = best in (MULTIPLES["quick"][0], MULTIPLES["quick"][-1])
    notes = outcome(WhatToDecay, make).exhibits.notes
    assert any("an end of the grid" in note for note in notes) == at_end


def test_an_l2_tuned_in_the_centre_keeps_its_coefficient_in_every_cell() -> None:
    runs: list[Any] = NoTuning(BUDGET).second_runs(MadeUpRuns(lambda run: finished(0.8, run)))
    sgd = [run for run in runs if run.optimizer == "sgd"]
    assert len({run.lr for run in sgd}) == 3
    # the first of seven is chosen where all are equal: one coefficient for each rate, the centre's among them
    assert len({str(run.rule) for run in sgd}) == 3


@pytest.mark.parametrize("name", BUDGETS)
def test_claims_on_text_stay_within_their_share_of_the_budget(name: str) -> None:
    budget = Budget.of(name, "fashion-mnist", "f")
    limits = {WhatToDecay: {"quick": 120, "full": 1200}, Migration: {"quick": 40, "full": 200}}
    for claim_class, limit in limits.items():
        claim = claim_class(budget)
        second = claim.second_runs(MadeUpRuns(lambda run: finished(0.5, run) | {"validation_loss": 2.0}))
        wanted = {run.identity: run for run in (*claim.runs(), *second)}.values()
        assert sum(run.cost for run in wanted) < limit[name]
        assert all(run.seed < 5000 for run in wanted)  # the pilots had larger ones


# from runs to outcomes


@pytest.mark.thorough
def test_migration_from_runs_to_an_outcome(tmp_path: Path) -> None:
    store, claim = Store(tmp_path), Migration(BUDGET)
    runs = FinishedRuns(execute(claim.runs(), store), store)
    needed = [*claim.runs(), *claim.second_runs(runs)]
    found = claim.outcome(FinishedRuns(execute(needed, store), store))
    assert found.verdict in ("reproduced", "partly", "not reproduced")
    assert found.exhibits.notes == []
    labels = {series.label for plot in found.exhibits.plots for series in plot.series}
    assert labels == {"recipe", "AWS twin", "no decay"}
