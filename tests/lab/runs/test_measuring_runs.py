"""Runs that measure a theory: regulariser, descent, equilibrium and dead units, on real networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.lab.small import budget, fingerprint

import normwise as nw
from normwise.lab.claims.constant_regularizer import ConstantRegularizer
from normwise.lab.claims.global_minimum import EPS, SCALES, GlobalMinimum
from normwise.lab.engine.run import Run
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.equilibrium import EVERY, EquilibriumRun
from normwise.lab.runs.regularizer import RegularizerRun

Lines = list[dict[str, Any]]


def _execute(run: Run) -> tuple[dict[str, Any], Lines]:
    lines: Lines = []
    return run.run(lines.append), lines


def _regularizer(member: str) -> RegularizerRun:
    run = ConstantRegularizer(budget())._settings()["weight_norm"]
    return replace(run, member=member, train_size=100, width=2, length=8)


@pytest.mark.parametrize("member", ["weight_norm", "centered_weight_norm", "weight_standardization"])
def test_a_regulariser_is_constant_on_normalised_weights_and_not_on_the_weights(member: str) -> None:
    found, lines = _execute(_regularizer(member))
    assert len(lines) == 8
    for scales in found["static"].values():
        assert max(max(at["value"], at["gradient"]) for at in scales.values()) < 16
    assert found["angles"]["regularized"] < 1e-12
    assert found["angles"]["L2"] > 1e-3


def test_a_regulariser_that_depends_on_the_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_eps(self: RegularizerRun, weight: Any) -> Any:
        return weight / (weight.square().sum(1, keepdim=True) + 1e-3).sqrt()

    monkeypatch.setattr(RegularizerRun, "_normalized", with_eps)
    found, _ = _execute(_regularizer("weight_norm"))
    assert max(at["value"] for at in found["static"]["float64"].values()) > 1e6
    assert found["angles"]["regularized"] > 1e-6


@pytest.mark.parametrize("rule", ["L2", "AWS", "ε-shifted L2"])
@pytest.mark.parametrize("member", ["weight_norm", "weight_standardization"])
def test_descent_never_climbs_and_rays_are_flat_in_the_loss(rule: str, member: str) -> None:
    run = replace(GlobalMinimum(budget())._settings(member)[rule], width=2, length=40, image_size=4)
    found, lines = _execute(run)
    objectives = [line["objective"] for line in lines]
    assert objectives == sorted(objectives, reverse=True)
    assert len(objectives) == 40
    losses = [at["loss"] for at in found["ray"]]
    assert max(losses) - min(losses) < 1e-9 * min(losses)
    # the gradient is that of a scale-invariant loss: 1/scale
    slopes = [at["gradient"] * at["scale"] for at in found["ray"]]
    assert max(slopes) == pytest.approx(min(slopes), rel=1e-6)
    least = min(found["ray"], key=lambda at: float(at["objective"]))["scale"]
    assert least == (EPS if rule == "ε-shifted L2" else min(SCALES))


def _equilibrium(**changes: Any) -> EquilibriumRun:
    values = {"train_size": 400, "image_size": 4, "width": 2, "batch_size": 10, "init_scale": 0.4}
    values |= {"momentum": 0.0, "length": 300, "measured": 200} | changes
    return EquilibriumRun(data="digits", fingerprint=fingerprint(), **values)  # type: ignore[arg-type]


def test_norms_and_turns_of_a_real_run_are_those_of_theory() -> None:
    found, lines = _execute(_equilibrium().with_rule(nw.L2(0.1)))
    assert [line["step"] for line in lines] == list(range(EVERY, 301, EVERY))
    for layer in found["layers"].values():
        assert layer["norm_ratio"] == pytest.approx(1, abs=0.1)
        assert layer["turn_ratio"] == pytest.approx(1, abs=0.1)
        assert layer["predicted_turn"] == pytest.approx((2 * 0.1 * 0.1) ** 0.5)


def test_without_a_rule_there_is_no_equilibrium() -> None:
    with pytest.raises(ValueError, match="rule=None"):
        _execute(_equilibrium(length=20, measured=10))


def test_a_dead_unit_breaks_the_plain_formula_under_l2_and_ours_never() -> None:
    l2, lines = _execute(DeadUnitsRun(rule=nw.L2(2.0).settings(), length=400))
    aws, _ = _execute(DeadUnitsRun(rule=nw.AdaptiveWeightShrink(2.0).settings(), length=400))
    assert l2["torch_fails_at"] is not None
    assert l2["ours_fails_at"] is None
    assert aws["torch_fails_at"] is None
    assert aws["smallest_norm"] == pytest.approx(1 / (1 + 2 * 0.1 * 400), rel=1e-4)
    assert lines[0]["norm"] == pytest.approx(0.8187308**20, rel=1e-4)


def test_a_refused_coefficient_is_recorded() -> None:
    found, _ = _execute(DeadUnitsRun(rule=nw.L2(20.0).settings(), mode="explicit", length=20))
    assert found["status"] == "refused"
