"""The claims on networks of the paper's size: their runs, their verdicts, and from runs to outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.claims.made_up_runs import MadeUpRuns
from tests.lab.sized import sized_budget

from normwise.lab.claims import all_claims, claims_named
from normwise.lab.claims.at_size.worst_case import all_runs
from normwise.lab.claims.budget import SIZED, Budget
from normwise.lab.claims.claim import Claim, Outcome
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.claims.networks import matched, recipe
from normwise.lab.claims.no_tuning import TUNED
from normwise.lab.claims.shrink import FREE
from normwise.lab.engine.execution import execute
from normwise.lab.engine.store import Store
from normwise.lab.runs.arms import AWS, EPSILON, L2, NONE, STARTED
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.text import TextRun

Summary = dict[str, Any]
LARGE = Budget.of("large", "fashion-mnist", "f")
PAPER = Budget.of("paper", "cifar100", "f")
FOLDER = Budget.of("paper", "imagefolder:/pictures", "f")


def claim_of(name: str, budget: Budget) -> Claim:
    (found,) = claims_named([name], budget.name)
    return found(budget)


# the lists of runs


def test_each_budget_has_its_claims_and_says_so() -> None:
    assert [claim.id for claim in all_claims("large")] == [
        "under-fitting",
        "initialization",
        "shrink",
        "what-to-decay",
        "no-tuning",
    ]
    assert [claim.id for claim in all_claims("paper")] == ["under-fitting", "shrink"]
    for name in SIZED:
        for claim in all_claims(name):
            small = next(one for one in all_claims() if one.id == claim.id)
            assert claim.question == small.question
            assert claim.arms != small.arms  # what was cut is in the registration
            assert claim.title == small.title
    with pytest.raises(
        ValueError, match="claim 'equilibrium' is not in --budget large, which has under-fitting, "
    ):
        claims_named(["equilibrium"], "large")
    with pytest.raises(ValueError, match="claim 'gravity' is not known: choose from constant-regularizer, "):
        claims_named(["gravity"], "large")


@pytest.mark.parametrize(
    ("budget", "data", "message"),
    [
        (
            "paper",
            "fashion-mnist",
            "--budget paper is not for --data fashion-mnist: give cifar10, cifar100 or image",
        ),
        (
            "large",
            "imagefolder:/x",
            "--budget large is not for --data imagefolder:/x: give fashion-mnist, cifar10, ",
        ),
        ("quick", "cifar10", "--budget quick is not for --data cifar10: give fashion-mnist or digits"),
    ],
)
def test_a_budget_that_is_not_for_these_data_is_one_line(budget: str, data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.of(budget, data, "")


def test_the_core_of_large_is_resnet20_on_all_images() -> None:
    runs = [
        run
        for run in all_runs([claim(LARGE) for claim in all_claims("large")])
        if isinstance(run, NetworkRun) and run.train_size == 60_000
    ]
    assert Counter(run.rule for run in runs) == {"none": 3, "aws": 3, "l2-filters": 6}
    assert {(run.network, run.width, run.epochs, run.augment) for run in runs} == {("resnet20", 0, 10, False)}
    assert {run.seed for run in runs} == {0, 1, 2}


def test_no_run_is_tuned_on_a_seed_that_is_compared() -> None:
    for budget in (LARGE, PAPER):
        assert not set(budget.tuning_seeds) & set(budget.seeds)
        for claim in all_claims(budget.name):
            tuned = [run for run in claim(budget).runs() if run.seed in budget.tuning_seeds]
            assert all(getattr(run, "validation_size", 1) for run in tuned)


def test_the_runs_of_paper_are_those_of_the_recipe() -> None:
    runs = [run for run in claim_of("shrink", PAPER).runs() if isinstance(run, NetworkRun)]
    assert Counter(run.rule for run in runs) == {
        "none": 54,
        "l2": 54,
        "epsilon": 54,
        "aws": 54,
        "aws-tuned": 54,
    }
    compared = [run for run in runs if run.seed in PAPER.seeds]
    assert {(run.epochs, run.batch_size, run.coefficient, run.validation_size) for run in compared} == {
        (200, 128, 5e-4, 0)
    }
    second = claim_of("shrink", PAPER).second_runs(MadeUpRuns(lambda run: _finished(0.5)))
    for run in second:
        assert isinstance(run, NetworkRun)
        assert run.validation_size == 0
        assert run.coefficient == pytest.approx(5e-3)
    for run in claim_of("shrink", FOLDER).runs():
        assert isinstance(run, NetworkRun)
        run.check()
        assert (run.batch_size, run.drops, run.coefficient) == (256, (30, 60, 90), 1e-4)


def test_arms_have_the_same_pull_at_norm_one() -> None:
    run = replace(LARGE.networks.sweep, train_size=1280)
    pulls = [matched(run, arm, 2.0).coefficient * run.total_time for arm in (AWS, L2)]
    assert pulls == pytest.approx([6.0, 6.0])
    assert [matched(run, arm).rule for arm in (NONE, STARTED)] == ["none", "aws"]
    assert {matched(run, arm).weight_decay for arm in (NONE, L2, AWS, STARTED)} == {0.0}
    assert [recipe(run, arm).rule for arm in (NONE, L2, EPSILON, STARTED)] == ["none", "l2", "epsilon", "aws"]
    with pytest.raises(ValueError, match="train_size=0 does not say how many steps there are"):
        matched(PAPER.networks.whole, AWS)


# the rules of judgement


def _finished(accuracy: float, **more: Any) -> Summary:
    return {
        "status": "finished",
        "step": 8,
        "seconds": 1.0,
        "train_accuracy": accuracy,
        "test_accuracy": accuracy,
        "validation_accuracy": 0.5,
        **more,
    }


def _noisy(accuracy: float, run: Any) -> Summary:
    return _finished(accuracy + 0.0005 * ((run.seed + len(run.rule)) % 3))


def under_fitting(run: NetworkRun, whole: float, sweep: float) -> Summary:
    if run.rule == "none":
        return _noisy(whole if run.train_size > 50_000 else sweep, run)
    return _noisy(0.9, run)


def initialization(run: NetworkRun, l2: float, aws: float) -> Summary:
    far = run.init_scale != 1
    return _noisy({"l2-filters": l2, "aws-tuned": aws}.get(run.rule, 0.8) if far else 0.9, run)


def shrink(run: NetworkRun, none: float, l2: float) -> Summary:
    return _noisy({"none": none, "l2-filters": l2, "l2": l2, "epsilon": l2}.get(run.rule, 0.9), run)


def no_tuning(run: NetworkRun, usual: float, fast: float) -> Summary:
    return _noisy(0.9 if run.rule == "aws" else fast if run.lr > 0.1 else usual, run)


CASES: list[tuple[str, Callable[..., Summary], tuple[float, ...], str]] = [
    ("under-fitting", under_fitting, (0.8, 0.8), "reproduced"),
    ("under-fitting", under_fitting, (0.9, 0.8), "partly"),
    ("under-fitting", under_fitting, (0.9, 0.89), "not reproduced"),
    ("initialization", initialization, (0.7, 0.88), "reproduced"),
    ("initialization", initialization, (0.86, 0.84), "not reproduced"),
    ("initialization", initialization, (0.89, 0.896), "partly"),
    ("shrink", shrink, (0.85, 0.85), "reproduced"),
    ("shrink", shrink, (0.85, 0.905), "partly"),
    ("shrink", shrink, (0.85, 0.95), "not reproduced"),
    ("no-tuning", no_tuning, (0.88, 0.88), "reproduced"),
    ("no-tuning", no_tuning, (0.87, 0.92), "partly"),
    ("no-tuning", no_tuning, (0.95, 0.95), "not reproduced"),
]


@pytest.mark.parametrize(("name", "make", "values", "verdict"), CASES)
def test_every_verdict_is_reached(
    name: str, make: Callable[..., Summary], values: tuple[float, ...], verdict: str
) -> None:
    claim = claim_of(name, LARGE)
    found = claim.outcome(MadeUpRuns(lambda run: make(run, *values)))
    assert found.verdict == verdict
    assert 5 < len(found.headline) <= 80
    known = found.as_dict()["statistics"]
    for place in found.thresholds:  # each names an estimate
        at = known
        for key in place.split(" / "):
            at = at[int(key)] if isinstance(at, list) else at[key]
        assert {"mean", "low", "high"} <= at.keys()


def test_the_answer_names_the_network_of_a_cell() -> None:
    def make(run: NetworkRun) -> Summary:
        worse = run.member == "weight_standardization" and run.rule != "none"
        return _noisy(0.5 if worse else 0.8 if run.rule == "none" else 0.9, run)

    answer = claim_of("under-fitting", LARGE).outcome(MadeUpRuns(make)).exhibits.answer
    assert answer.endswith("least, by -30.0 [-30.0, -30.0] points, with weight standardisation, scale 1.")


def test_what_is_decayed_is_shown_at_the_one_learning_rate() -> None:
    def make(run: TextRun) -> Summary:
        loss = (2.0 if run.rule is None else 1.8) + 0.001 * (run.seed % 3)
        return {"status": "finished", "step": 8, "test_loss": loss, "validation_loss": loss}

    exhibits = claim_of("what-to-decay", LARGE).outcome(MadeUpRuns(make)).exhibits
    plot = exhibits.plots[0]
    assert plot.title.startswith("Test loss at the learning rate 0.003")
    assert plot.categories is not None
    assert dict(zip(plot.categories, plot.series[0].y, strict=True)) == pytest.approx(
        {
            "no decay": 2.001,
            "L2 on all matrices": 1.801,
            "AWS on all matrices": 1.801,
            "L2 on what is invariant": 1.801,
            "AWS on what is invariant": 1.801,
        }
    )
    assert plot.reference == pytest.approx(2.001)
    assert exhibits.answer.startswith(
        "Decay on what is invariant lowers the test loss (nats) under L2 by +0.200"
    )


def test_one_network_decides_nothing_for_the_others() -> None:
    """In the paper's budget AWS must be ahead in every network."""

    def make(run: NetworkRun) -> Summary:
        better = run.network == "resnet110" and run.rule in ("none", "l2", "epsilon")
        return _noisy(0.95 if better else 0.9 if run.rule.startswith("aws") else 0.8, run)

    outcome = claim_of("shrink", PAPER).outcome(MadeUpRuns(make))
    assert outcome.verdict == "not reproduced"
    assert len(outcome.exhibits.plots) == 18
    assert len(outcome.exhibits.tables[0].rows) == 18 * 5


def test_a_folder_compares_aws_with_nothing_tuned() -> None:
    outcome = claim_of("shrink", FOLDER).outcome(MadeUpRuns(lambda run: shrink(run, 0.8, 0.85)))
    for found in outcome.statistics.values():
        assert set(found["AWS_minus"]) == {NONE, L2, EPSILON}
        assert FREE in found["test_accuracy"]
    published = outcome.exhibits.tables[1]  # beside ours
    assert "ImageNet" in published.title
    assert [row[2] for row in published.rows[1::2]] == ["76.86", "78.29", "70.73"]
    assert outcome.verdict == "reproduced"


def test_a_run_that_does_not_finish_scores_what_guessing_among_the_classes_scores() -> None:
    run = PAPER.networks.whole
    runs = FinishedRuns({run.identity: {"status": "not finite"}}, Store, 100)  # type: ignore[arg-type]
    assert runs.scores(run, [0]) == [1.0]


def test_on_all_images_l2_takes_the_multiple_that_was_chosen_on_a_part() -> None:
    claim = claim_of("no-tuning", LARGE)

    def make(run: NetworkRun) -> Summary:
        strong = run.rule == "l2-filters" and run.coefficient > matched(run, L2).coefficient * 5
        return _noisy(0.9, run) | {"validation_accuracy": 0.9 if strong else 0.5}

    second = [run for run in claim.second_runs(MadeUpRuns(make)) if isinstance(run, NetworkRun)]
    assert len(second) == 12
    for run in second:
        assert run.coefficient == pytest.approx(30 / run.total_time)
    found = claim.outcome(MadeUpRuns(make)).statistics["ResNet-20, SGD"]
    assert all(f"{STARTED} minus {TUNED}" in cell for cell in found.values())


# from runs to outcomes


def _carried_out(claim: Claim, folder: Path) -> Outcome:
    store = Store(folder)
    runs = FinishedRuns(execute(claim.runs(), store), store)
    needed = [*claim.runs(), *claim.second_runs(runs)]
    return claim.outcome(FinishedRuns(execute(needed, store), store))


@pytest.mark.parametrize("name", ["under-fitting"])
@pytest.mark.thorough
def test_a_claim_from_runs_to_an_outcome(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    found = _carried_out(claim_of(name, sized_budget()), tmp_path)
    assert found.verdict in ("reproduced", "partly", "undecided", "not reproduced")
    assert found.exhibits.plots
    assert found.exhibits.tables
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["initialization", "shrink", "no-tuning", "what-to-decay"])
def test_the_other_claims_from_runs_to_an_outcome(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    found = _carried_out(claim_of(name, sized_budget()), tmp_path)
    assert found.verdict in ("reproduced", "partly", "undecided", "not reproduced")


def test_the_language_model_of_large_is_a_gpt_of_six_blocks() -> None:
    runs = [run for run in claim_of("what-to-decay", LARGE).runs() if isinstance(run, TextRun)]
    assert {(run.depth, run.width, run.lr) for run in runs} == {(6, 256, 0.003)}
    assert {run.seed for run in runs} == {0, 1, 2, 1000}
