"""The claim `equilibrium`: its rule of judgement, and a real run against a hand-made count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.lab.engine.made_up_runs import Summary, judge
from tests.lab.small import fingerprint

import normwise as nw
from normwise.lab.claims.equilibrium import HEAVY, Equilibrium
from normwise.lab.runs.equilibrium import EVERY, EquilibriumRun

BALANCED = {"L2": 1.0, "AdaptiveWeightShrink": 1.2, "EpsilonShiftedL2": 1.2, "Sphere": 2.0}


def _layer(norm: float, turn: float, ratio: float) -> dict[str, float]:
    return {
        "gradient_scale": 0.1,
        "norm": norm,
        "predicted_norm": norm / ratio,
        "norm_ratio": ratio,
        "turn": turn,
        "predicted_turn": turn,
        "turn_ratio": 1.0,
        "drift": 1.0,
    }


@pytest.mark.parametrize(
    ("calm", "heavy", "sphere", "verdict"),
    [
        (0.95, 0.85, 2.0, "reproduced"),
        (0.85, 0.85, 2.0, "partly"),  # without momentum 10 % are allowed, with it 20 %
        (0.95, 0.75, 2.0, "partly"),
        (0.95, 0.95, 1.1, "partly"),  # the sphere more even than AWS
        (0.75, 0.75, 1.1, "not reproduced"),
    ],
)
def test_equilibrium_is_judged_by_its_rule(calm: float, heavy: float, sphere: float, verdict: str) -> None:
    def make(settings: EquilibriumRun) -> Summary:
        assert settings.rule is not None
        ratio = heavy if settings.momentum == HEAVY else calm
        fastest = {**BALANCED, "Sphere": sphere}[settings.rule["name"]] * 0.01
        layers = {"one": _layer(0.4, 0.01, ratio), "two": _layer(0.4, fastest, ratio)}
        return {"status": "finished", "layers": layers}

    assert judge(Equilibrium(), make).verdict == verdict


def test_a_setting_of_which_a_run_failed_does_not_agree() -> None:
    def make(settings: EquilibriumRun) -> Summary:
        assert settings.rule is not None
        if settings.momentum == HEAVY and settings.seed == 0:
            return {"status": "not finite", "step": 3, "reason": "made up"}
        fastest = BALANCED[settings.rule["name"]] * 0.01
        return {"status": "finished", "layers": {"one": _layer(0.4, 0.01, 1), "two": _layer(0.4, fastest, 1)}}

    finding = judge(Equilibrium(), make)
    assert (finding.verdict, finding.statistics["agree"], finding.statistics["of"]) == ("partly", 4, 10)


def _run() -> EquilibriumRun:
    run = EquilibriumRun(
        data="digits",
        fingerprint=fingerprint(),
        train_size=400,
        image_size=4,
        width=2,
        batch_size=10,
        init_scale=0.4,
        momentum=0.0,
        length=300,
        measured=200,
    )
    return run.with_rule(nw.L2(0.1))


def test_norms_and_turns_of_a_real_run_are_those_of_theory() -> None:
    lines: list[Summary] = []
    summary = _run().run(lines.append)
    assert [line["step"] for line in lines] == list(range(EVERY, 301, EVERY))
    for layer in summary["layers"].values():
        assert layer["norm_ratio"] == pytest.approx(1, abs=0.1)
        assert layer["turn_ratio"] == pytest.approx(1, abs=0.1)
        assert layer["predicted_turn"] == pytest.approx((2 * 0.1 * 0.1) ** 0.5)


def test_without_a_rule_there_is_no_equilibrium() -> None:
    with pytest.raises(ValueError, match="rule=None: without decay norms grow for ever"):
        replace(_run(), rule=None, length=20, measured=10).run(lambda line: None)
