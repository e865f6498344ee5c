from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.lab.engine.made_up_runs import BUDGET, Summary, judge

from normwise.lab.claims.constant_regularizer import CLAIM
from normwise.lab.runs import regularizer


@pytest.mark.parametrize(
    ("epsilons", "regularized", "l2", "verdict"),
    [
        (2.0, 1e-14, 1.0, "reproduced"),
        (1e6, 1e-14, 1.0, "not reproduced"),
        (2.0, 1e-8, 1.0, "not reproduced"),
        (2.0, 1e-14, 1e-14, "not reproduced"),
    ],
)
def test_it_is_judged_by_its_rule(epsilons: float, regularized: float, l2: float, verdict: str) -> None:
    def make(settings: Any) -> Summary:
        at = {"value": epsilons, "gradient": 1.0, "exactly_zero": 0.5}
        static = {t: {f"{s:g}": at for s in regularizer.SCALES} for t in ("float32", "float64")}
        angles = {"regularized": regularized, "twin": 1e-14, "L2": l2}
        return {"status": "finished", "static": static, "angles": angles}

    assert judge(CLAIM, make).verdict == verdict


def _settings(member: str) -> regularizer.RegularizerRun:
    return replace(CLAIM._runs(BUDGET)["weight_norm"], member=member, train_size=100, width=2, length=8)


@pytest.mark.parametrize("member", ["weight_norm", "centered_weight_norm", "weight_standardization"])
def test_real_members_are_constant_and_the_weights_themselves_are_not(member: str) -> None:
    lines: list[dict[str, Any]] = []
    found = _settings(member).run(lines.append)
    assert len(lines) == 8
    for scales in found["static"].values():
        assert max(max(at["value"], at["gradient"]) for at in scales.values()) < 16
    assert found["angles"]["regularized"] < 1e-12
    assert found["angles"]["L2"] > 1e-3


def test_a_member_that_depends_on_the_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_eps(self: regularizer.RegularizerRun, weight: Any) -> Any:
        return weight / (weight.square().sum(1, keepdim=True) + 1e-3).sqrt()

    monkeypatch.setattr(regularizer.RegularizerRun, "_normalized", with_eps)
    found = _settings("weight_norm").run(lambda line: None)
    assert max(at["value"] for at in found["static"]["float64"].values()) > 1e6
    assert found["angles"]["regularized"] > 1e-6
