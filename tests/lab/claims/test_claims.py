"""The rules of judgement, on made-up summaries: each verdict is reached where its text says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.lab.engine.made_up_runs import BUDGET, Summary, finished, judge

from normwise.lab.claims import all_claims, claims_named
from normwise.lab.claims.claim import BUDGETS, Budget, Claim, Finding, Table
from normwise.lab.claims.effective_learning_rate import EffectiveLearningRate
from normwise.lab.claims.initialization import Initialization
from normwise.lab.claims.under_fitting import UnderFitting
from normwise.lab.runs.arms import ARMS, AWS, L2, NONE, with_arm
from normwise.lab.runs.base import ImageRun


def _arm(settings: ImageRun) -> str:
    base = BUDGET.training
    for arm in ARMS:
        like = with_arm(replace(base, lr=settings.lr, epochs=getattr(settings, "epochs", 0)), arm)
        if (like.rule, like.mode) == (settings.rule, settings.mode):
            return arm
    raise AssertionError(settings)


CLAIMS = (
    "constant-regularizer",
    "under-fitting",
    "effective-learning-rate",
    "generalization",
    "global-minimum",
    "instability",
    "initialization",
    "coefficient",
    "equilibrium",
    "shrink",
    "migration",
    "what-to-decay",
    "no-tuning",
)


def test_claims_are_found_in_order_and_by_name() -> None:
    assert tuple(claim.id for claim in all_claims()) == CLAIMS
    assert [claim.id for claim in claims_named(["initialization"])] == ["initialization"]
    with pytest.raises(ValueError, match=f"claim 'gravity' is not known: choose from {CLAIMS[0]}, "):
        claims_named(["gravity"])


@pytest.mark.parametrize("claim", all_claims())
def test_every_claim_is_registered_in_full_and_compares_paired_seeds(claim: Claim) -> None:
    assert all(len(text) > 20 for name, text in claim.texts().items() if name != "title")
    runs = claim.runs(BUDGET)
    by_seed = [{replace(r, seed=0).identity for r in runs if r.seed == seed} for seed in BUDGET.seeds]
    assert all(others <= by_seed[0] for others in by_seed)  # what varies little may do with the first seed
    assert by_seed[0]


def test_claims_share_runs() -> None:
    counts = [len({s.identity for s in claim.runs(BUDGET)}) for claim in all_claims()]
    together = {s.identity for claim in all_claims() for s in claim.runs(BUDGET)}
    assert len(together) < sum(counts)


@pytest.mark.parametrize(
    ("aws_at_ends", "l2_at_ends", "verdict"),
    [
        (0.79, 0.70, "reproduced"),
        (0.79, 0.785, "partly"),
        (0.75, 0.60, "partly"),
        (0.75, 0.74, "not reproduced"),
    ],
)
def test_initialization_is_judged_by_its_rule(aws_at_ends: float, l2_at_ends: float, verdict: str) -> None:
    def make(settings: ImageRun) -> Summary:
        at_end = settings.init_scale in (1e-3, 1e3)
        end = {AWS: aws_at_ends, L2: l2_at_ends}.get(_arm(settings), 0.6)
        return finished(end if at_end else 0.80, settings)

    finding = judge(Initialization(), make)
    assert finding.verdict == verdict
    assert finding.statistics["weight_norm"]["spread"][AWS] == pytest.approx(
        100 * (0.80 - aws_at_ends), abs=0.01
    )


def test_a_refused_arm_is_noted_and_not_counted() -> None:
    def make(settings: ImageRun) -> Summary:
        if _arm(settings) == "AWS, explicit" and settings.init_scale == 1e3:
            return {"status": "refused", "step": 0, "reason": "t·c(n) ≥ 1"}
        return finished(0.8, settings)

    finding = judge(Initialization(), make)
    assert len(finding.notes) == 1
    assert (
        "AWS, explicit, initial norm 1000: 2 of 2 runs ended at step 0 (refused): t·c(n) ≥ 1"
        in finding.notes[0]
    )
    assert finding.statistics["weight_norm"]["spread"]["AWS, explicit"] == 0
    row = next(row for row in finding.tables[0].rows if row[0] == "AWS, explicit")
    assert row[-2] == "refused"


@pytest.mark.parametrize(
    ("at_one", "at_ten", "verdict"),
    [(0.70, 0.60, "reproduced"), (0.79, 0.60, "partly"), (0.79, 0.79, "not reproduced")],
)
def test_under_fitting_is_judged_by_its_rule(at_one: float, at_ten: float, verdict: str) -> None:
    def make(settings: ImageRun) -> Summary:
        if _arm(settings) != NONE:
            return finished(0.8, settings)
        return finished(at_one if settings.init_scale == 1 else at_ten, settings)

    assert judge(UnderFitting(), make).verdict == verdict


@pytest.mark.parametrize(
    ("replay", "twin", "naive", "differ", "verdict"),
    [
        (1e-13, 1e-13, 1.0, 0, "reproduced"),
        (1e-6, 1e-6, 1.0, 0, "partly"),
        (1e-6, 1e-13, 1.0, 0, "not reproduced"),
        (1e-13, 1e-13, 1e-3, 0, "not reproduced"),
        (1e-13, 1e-15, 1.0, 1, "not reproduced"),
    ],
)
def test_effective_learning_rate_is_judged_by_its_rule(
    replay: float, twin: float, naive: float, differ: int, verdict: str
) -> None:
    def make(settings: ImageRun) -> Summary:
        angles = {"replay": replay, "twin": twin, "naive": naive}
        found: Summary = {
            who: {"largest_angle": angle, "predictions_that_differ": differ} for who, angle in angles.items()
        }
        return found | {"status": "finished", "norm_change": 0.4, "test_images": 360}

    assert judge(EffectiveLearningRate(), make).verdict == verdict


def test_arms_have_the_same_pull_at_norm_one() -> None:
    from normwise.lab.runs.base import rule_from

    pulls = {}
    for arm in ARMS:
        rule = rule_from(with_arm(BUDGET.training, arm).rule)
        if rule is not None and arm != "sphere":
            pulls[arm] = float(rule.rate(1.0))
    expected = 3 / BUDGET.training.total_time
    assert pulls == pytest.approx(dict.fromkeys(pulls, expected))
    assert set(ARMS) - set(pulls) == {NONE, "sphere"}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("data", ["fashion-mnist", "digits"])
def test_budgets_fit_their_data(name: str, data: str) -> None:
    made = Budget.of(name, data, "f")
    side = {"fashion-mnist": 28, "digits": 8}[data]
    assert side % made.training.image_size == 0
    assert len(made.seeds) >= 3
    assert Budget.of(name, data, "f", seeds=4).seeds == (0, 1, 2, 3)


def test_budgets_that_are_not_possible_are_refused() -> None:
    with pytest.raises(ValueError, match="--budget endless is not known: choose from quick, full"):
        Budget.of("endless", "digits", "f")
    with pytest.raises(ValueError, match="--seeds 1 is not possible"):
        Budget.of("quick", "digits", "f", seeds=1)


def test_findings_have_no_number_that_json_has_not() -> None:
    finding = Finding("partly", "", {"a": float("nan")}, [], [Table("", ["x"], [[float("inf"), 1.0]])])
    plain = finding.as_dict()
    assert plain["statistics"] == {"a": None}
    assert plain["tables"][0]["rows"] == [[None, 1.0]]
