from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.lab.engine.made_up_runs import BUDGET, MadeUpRuns, Summary, judge

from normwise.lab.claims.global_minimum import CLAIM, EPS, SCALES


@pytest.mark.parametrize(
    ("l2_ends", "shift_ends", "verdict"),
    [(0.5, EPS, "reproduced"), (0.99, EPS, "partly"), (0.5, 0.2, "partly"), (0.99, 0.2, "not reproduced")],
)
def test_it_is_judged_by_its_rule(
    l2_ends: float, shift_ends: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(settings: Any) -> Summary:
        shifted = settings.rule["name"] == "EpsilonShiftedL2"
        ray = [
            {
                "scale": a,
                "loss": 1.0,
                "objective": 1 + (a - EPS) ** 2 if shifted else 1 + a,
                "gradient": 1 / a,
            }
            for a in SCALES
        ]
        end = shift_ends if shifted else l2_ends
        return {"status": "finished", "ray": ray, "at_half": shift_ends if shifted else 1.0, "end": end}

    lines = [{"step": k, "objective": 1.0, "norm": 1.0} for k in (1, 2)]
    monkeypatch.setattr(MadeUpRuns, "metrics", lambda self, settings: lines)
    assert judge(CLAIM, make).verdict == verdict


@pytest.mark.parametrize("rule", ["L2", "AWS", "ε-shifted L2"])
@pytest.mark.parametrize("member", ["weight_norm", "weight_standardization"])
def test_descent_never_climbs_and_rays_are_flat_in_the_loss(rule: str, member: str) -> None:
    run = replace(CLAIM._runs(BUDGET, member)[rule], width=2, length=40, image_size=4)
    lines: list[dict[str, Any]] = []
    found = run.run(lines.append)
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
