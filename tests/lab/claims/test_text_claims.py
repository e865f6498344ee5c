"""The rules of judgement of the claims on text, on made-up summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.small import budget

import normwise as nw
from normwise.lab.claims.claim import BUDGETS, Budget, Claim, Runs
from normwise.lab.claims.migration import PULL, Migration
from normwise.lab.claims.what_to_decay import ARMS, CENTRE, MULTIPLES, WhatToDecay, with_rule
from normwise.lab.claims.what_to_decay_shown import AWS, INVARIANT, L2, MATRICES, NOTHING
from normwise.lab.engine.execution import execute
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store
from normwise.lab.runs.base import rule_from
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

Summary = dict[str, Any]
BUDGET = budget()
KEY_WORDS = {"AdaptiveWeightShrink": AWS, "L2": L2}


class _MadeUp(Runs):
    """Runs whose summaries and metrics are computed from their settings."""

    def __init__(self, make: Callable[[Any], Summary], norm: Callable[[Any], float]) -> None:
        super().__init__({}, None)  # type: ignore[arg-type]
        self.make, self.norm = make, norm

    def __getitem__(self, settings: Run) -> Summary:
        return self.make(settings)

    def metrics(self, settings: Run) -> list[Summary]:
        layer = {"norm": self.norm(settings), "effective_lr": 0.1, "turn": 0.01}
        line = {"train_loss": 1.0, "layers": {"one": layer, "two": layer}}
        return [{"step": k, **line} for k in range(1, 9)]


def _judge(
    claim: Claim, make: Callable[[Any], Summary], norm: Callable[[Any], float] = lambda run: 2.0
) -> Any:
    return claim.judge(BUDGET, _MadeUp(make, norm))


def _loss(loss: float, run: TextRun) -> Summary:
    noise = 0.001 * run.seed
    return {"status": "finished", "step": 8, "test_loss": loss + noise, "validation_loss": loss + noise}


def _rule(run: TextRun) -> str | None:
    return None if run.rule is None else KEY_WORDS[run.rule["name"]]


def _multiple(run: TextRun) -> float:
    base = replace(run, rule=None)
    found = [m for m in MULTIPLES["quick"] if with_rule(base, str(_rule(run)), m).rule == run.rule]
    return found[0]


# what to decay


@pytest.mark.parametrize(
    ("matrices", "invariant", "aws_large", "l2_large", "verdict"),
    [
        (1.9, 1.8, 1.84, 2.2, "reproduced"),
        (1.9, 1.8, 1.90, 2.2, "partly"),  # a large scale costs AWS 0.1
        (1.9, 1.8, 1.84, 1.8, "partly"),  # L2 does as well from there
        (1.7, 1.8, 1.84, 2.2, "partly"),  # all matrices are better
        (1.7, 1.8, 1.90, 2.2, "not reproduced"),
        (1.9, 2.1, 2.20, 2.3, "not reproduced"),  # worse than nothing
    ],
)
def test_what_to_decay_is_judged_by_its_rule(
    matrices: float, invariant: float, aws_large: float, l2_large: float, verdict: str
) -> None:
    def make(run: TextRun) -> Summary:
        if run.init_scale != 1:
            return _loss({AWS: aws_large, L2: l2_large}.get(str(_rule(run)), 2.4), run)
        return _loss({NOTHING: 2.0, MATRICES: matrices, INVARIANT: invariant}[run.decayed], run)

    finding = _judge(WhatToDecay(), make)
    assert finding.verdict == verdict
    gain = finding.statistics["gain"]["AWS: matrices − invariant"]["mean"]["mean"]
    assert gain == pytest.approx(matrices - invariant)


@pytest.mark.parametrize("best", MULTIPLES["quick"])
def test_multiples_are_chosen_on_validation_loss_by_other_seeds(best: float) -> None:
    def make(run: TextRun) -> Summary:
        if run.rule is None:
            return _loss(2.0, run)
        found = _loss(1.5 if _multiple(run) == best else 1.9, run)
        # what the claim's own seeds say of validation plays no role
        return found if run.seed in BUDGET.tuning_seeds else found | {"validation_loss": 9.0}

    claim, runs = WhatToDecay(), _MadeUp(make, lambda run: 1.0)
    second = claim.second_runs(BUDGET, runs)
    assert {_multiple(run) for run in second if isinstance(run, TextRun)} == {best}
    assert {run.seed for run in second} == set(BUDGET.seeds)
    finding = claim.judge(BUDGET, runs)
    ends = (MULTIPLES["quick"][0], MULTIPLES["quick"][-1])
    assert any("an end of the grid" in note for note in finding.notes) == (best in ends)


def test_every_arm_is_tuned_with_the_same_budget_and_matched() -> None:
    runs = [run for run in WhatToDecay().runs(BUDGET) if run.seed in BUDGET.tuning_seeds]
    counts: dict[tuple[str, str | None], int] = {}
    for run in runs:
        assert isinstance(run, TextRun)
        counts[run.decayed, _rule(run)] = counts.get((run.decayed, _rule(run)), 0) + 1
    assert counts == dict.fromkeys(ARMS[1:], len(MULTIPLES["quick"]) * len(BUDGET.tuning_seeds))
    base = replace(BUDGET.text, lr=CENTRE)
    reference = base.total_squares**0.5
    for name in (L2, AWS):
        rule = rule_from(with_rule(base, name, 1.0).rule)
        assert rule is not None
        assert float(rule.rate(reference)) == pytest.approx(3 / base.total_time)


def test_a_run_that_did_not_finish_is_noted() -> None:
    def make(run: TextRun) -> Summary:
        if run.init_scale != 1 and _rule(run) == L2:
            return {"status": "not finite", "step": 3, "reason": "the training loss was nan"}
        return _loss(2.0, run)

    finding = _judge(WhatToDecay(), make)
    assert any("ended at step 3 (not finite): the training loss was nan" in note for note in finding.notes)
    assert finding.verdict == "not reproduced"


@pytest.mark.parametrize("name", BUDGETS)
def test_claims_on_text_stay_within_their_share_of_the_budget(name: str) -> None:
    spent = Budget.of(name, "fashion-mnist", "f")
    made = _MadeUp(lambda run: _loss(2.0, run) | {"test_accuracy": 0.5}, lambda run: 1.0)
    for claim, limit in (
        (WhatToDecay(), {"quick": 60, "full": 1000}),
        (Migration(), {"quick": 40, "full": 200}),
    ):
        wanted = {run.identity: run for run in (*claim.runs(spent), *claim.second_runs(spent, made))}
        assert sum(run.cost for run in wanted.values()) < limit[name]
        pilots = {run.seed for run in wanted.values() if run.seed >= 5000}
        assert not pilots


# migration


@pytest.mark.parametrize(
    ("twin_norm", "none_norm", "points", "nats", "verdict"),
    [
        (2.2, 8.0, 0.0, 0.0, "reproduced"),
        (3.0, 8.0, 0.0, 0.0, "partly"),  # norms 50 % apart
        (2.2, 2.3, 0.0, 0.0, "partly"),  # no nearer than half of what no decay is
        (2.2, 8.0, 2.0, 0.0, "partly"),
        (3.0, 8.0, 2.0, 0.0, "partly"),
        (3.0, 8.0, 2.0, 0.2, "not reproduced"),
    ],
)
def test_migration_is_judged_by_its_rule(
    twin_norm: float, none_norm: float, points: float, nats: float, verdict: str
) -> None:
    def twin(run: Any) -> bool:
        return _rule(run) == AWS

    def make(run: Any) -> Summary:
        noise = 0.0001 * run.seed
        accuracy = 0.8 - noise - (points / 100 if twin(run) else 0)
        return {
            "status": "finished",
            "step": 8,
            "test_accuracy": accuracy,
            "test_loss": 1.8 + noise + (nats if twin(run) else 0),
        }

    def norm(run: Any) -> float:
        return none_norm if run.rule is None else twin_norm if twin(run) else 2.0

    finding = _judge(Migration(), make, norm)
    assert finding.verdict == verdict
    found = finding.statistics["text"]
    assert found["largest_relative_difference"]["norm"]["mean"] == pytest.approx(twin_norm / 2 - 1)
    assert found["twin_minus_recipe"]["difference"]["mean"] == pytest.approx(nats, abs=1e-12)
    assert len(finding.traces) == 6


def test_twins_have_the_pull_of_the_recipe_at_the_norm_that_it_had_half_way() -> None:
    norm = 1.7
    made = _MadeUp(lambda run: _loss(2.0, run), lambda run: norm)
    claim = Migration()
    recipes = [run for run in claim.runs(BUDGET) if getattr(run, "rule", None)]
    twins = claim.second_runs(BUDGET, made)
    for kind, coupling in ((TrainRun, 0.1), (TextRun, 1.0)):
        recipe = next(run for run in recipes if isinstance(run, kind))
        twin = next(run for run in twins if isinstance(run, kind))
        old, new = rule_from(recipe.rule), rule_from(twin.rule)
        assert isinstance(new, nw.AdaptiveWeightShrink)
        assert old is not None
        assert float(new.rate(norm)) == pytest.approx(float(old.rate(norm)) / coupling)
        assert float(new.rate(norm)) * recipe.total_time == pytest.approx(PULL)
        assert (recipe.mode, twin.mode) == ("coupled" if coupling == 0.1 else "explicit", "flow")
        assert replace(twin, rule=recipe.rule, mode=recipe.mode, seed=recipe.seed) == recipe


# from run to verdict


def test_migration_from_runs_to_a_finding(tmp_path: Path) -> None:
    store, claim = Store(tmp_path), Migration()
    runs = Runs(execute(claim.runs(BUDGET), store), store)
    needed = [*claim.runs(BUDGET), *claim.second_runs(BUDGET, runs)]
    finding = claim.judge(BUDGET, Runs(execute(needed, store), store))
    assert finding.verdict in ("reproduced", "partly", "not reproduced")
    assert finding.notes == []
    assert {series.label for plot in finding.plots for series in plot.series} == {
        "recipe",
        "AWS twin",
        "no decay",
    }
