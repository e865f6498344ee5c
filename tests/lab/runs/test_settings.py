from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.lab.small import replaying, training

import normwise as nw
from normwise.decay.rules import RULES
from normwise.decay.weight_rules import WEIGHT_RULES
from normwise.lab.engine import run as run_module
from normwise.lab.runs.base import rule_from


@pytest.mark.parametrize(
    "change",
    [
        {"data": "fashion-mnist"},
        {"fingerprint": "0"},
        {"train_size": 75},
        {"image_size": 8},
        {"member": "plain"},
        {"batch_norm": False},
        {"width": 3},
        {"init_scale": 2.0},
        {"rule": nw.L2(0.1).settings()},
        {"mode": "explicit"},
        {"lr": 0.2},
        {"momentum": 0.8},
        {"batch_size": 20},
        {"seed": 1},
        {"epochs": 3},
        {"validation_size": 20},
        {"initialiser": "layers"},
        {"optimizer": "adam"},
        {"weight_decay": 0.1},
        {"schedule": "constant"},
        {"clock": "step"},
        {"measure": "rms"},
        {"dim": None},
        {"precision": "bfloat16"},
        {"relative_lr": ((1.0, 2.0), (1.0, 1.0), (1.0, 1.0))},
    ],
)
def test_every_setting_is_part_of_the_identity(change: dict[str, Any]) -> None:
    one = training()
    assert replace(one, **change).identity != one.identity
    assert (
        replace(replace(one, **change), **{key: getattr(one, key) for key in change}).identity == one.identity
    )


def test_identity_depends_on_class_and_source_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = training().identity
    assert replaying().identity != before
    monkeypatch.setattr(run_module, "source_hash", lambda cls: "another")
    assert training().identity != before


@pytest.mark.parametrize("kind", [*RULES, *WEIGHT_RULES])
def test_every_rule_is_rebuilt_from_its_settings(kind: type[nw.Rule]) -> None:
    given = {"Sphere": (2.0,), "PowerShrink": (0.1, 2.0)}.get(kind.__name__, (0.1,))
    rule = kind(*given)
    rebuilt = rule_from(json.loads(json.dumps(rule.settings())))
    assert rebuilt is not None
    assert rebuilt.settings() == rule.settings()
    assert type(rebuilt) is kind


def test_schedule_is_half_a_cosine() -> None:
    run = training(lr=0.3, epochs=5)
    assert run.steps == 5 * 4
    assert run.lr_at(0) == pytest.approx(0.3)
    assert run.lr_at(10) == pytest.approx(0.15)
    exact = sum(0.3 * 0.5 * (1 + math.cos(math.pi * k / 20)) for k in range(20))
    assert run.total_time == pytest.approx(exact, rel=1e-6)
