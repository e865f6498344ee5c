"""The claim `instability`: its rule of judgement on made-up runs, and real dead units."""

from __future__ import annotations

import pytest
from tests.lab.engine.made_up_runs import Summary, judge

import normwise as nw
from normwise.lab.claims.instability import Instability
from normwise.lab.engine.run import Run
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.train import TrainRun


def _is_l2(settings: TrainRun | DeadUnitsRun) -> bool:
    return settings.rule is not None and settings.rule["name"] == "L2"


def _made(dead: bool, large: bool, autocast: bool, spikes: bool) -> dict[str, bool]:
    return {"dead": dead, "large": large, "autocast": autocast, "spikes": spikes}


@pytest.mark.parametrize(
    ("worse", "verdict"),
    [
        (_made(True, True, True, True), "reproduced"),
        (_made(False, True, True, True), "partly"),
        (_made(True, False, True, True), "partly"),
        (_made(True, True, False, True), "partly"),
        (_made(True, True, True, False), "partly"),
        (_made(False, False, False, True), "partly"),
        (_made(False, False, False, False), "not reproduced"),
    ],
)
def test_instability_is_judged_by_its_rule(worse: dict[str, bool], verdict: str) -> None:
    def make(settings: Run) -> Summary:
        if isinstance(settings, DeadUnitsRun):
            fails = 1020 if _is_l2(settings) and worse["dead"] else None
            never = {"zero_at": None, "ours_fails_at": None}
            return {"status": "finished", "smallest_norm": 1e-9, "torch_fails_at": fails, **never}
        assert isinstance(settings, TrainRun)
        l2 = _is_l2(settings)
        found: Summary = {"status": "finished", "test_accuracy": 0.8 + 0.001 * settings.seed}
        found |= {"spikes": 0, "skipped_steps": 0}
        if settings.precision != "float32":
            return found | {"skipped_steps": int(l2 and worse["autocast"])}
        if settings.lr == 0.4:
            return found | {"spikes": 3 if l2 and worse["spikes"] else 0}
        return found | {"test_accuracy": 0.7 if l2 and worse["large"] else 0.8 + 0.001 * settings.seed}

    assert judge(Instability(), make).verdict == verdict


def test_a_dead_unit_breaks_the_plain_formula_under_l2_and_ours_never() -> None:
    lines: list[Summary] = []
    l2 = DeadUnitsRun(rule=nw.L2(2.0).settings(), length=400).run(lines.append)
    aws = DeadUnitsRun(rule=nw.AdaptiveWeightShrink(2.0).settings(), length=400).run(lambda line: None)
    assert l2["torch_fails_at"] is not None
    assert l2["ours_fails_at"] is None
    assert aws["torch_fails_at"] is None
    assert aws["smallest_norm"] == pytest.approx(1 / (1 + 2 * 0.1 * 400), rel=1e-4)
    assert lines[0]["norm"] == pytest.approx(0.8187308**20, rel=1e-4)


def test_a_refused_coefficient_is_recorded() -> None:
    run = DeadUnitsRun(rule=nw.L2(20.0).settings(), mode="explicit", length=20)
    assert run.run(lambda line: None)["status"] == "refused"
