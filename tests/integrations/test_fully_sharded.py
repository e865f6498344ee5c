"""Models that a trainer shards with FSDP2: two processes train as one, and a resume is to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.distributed.world import needs_fully_shard
from tests.integrations.test_two_processes import run

thorough = pytest.mark.thorough
TRAININGS = {  # by the package of the trainer
    "accelerate": ("nothing given", "scheduled", "sphere", "every"),
    "lightning": ("nothing given", "scheduled", "sphere", "every", "one file"),
    "transformers": ("nothing given", "scheduled", "sphere", "every"),
}


@needs_fully_shard
@pytest.mark.parametrize(
    ("trainer", "rule"),
    [
        pytest.param(
            trainer, rule, marks=[] if (trainer, rule) == ("accelerate", "nothing given") else thorough
        )
        for trainer, rules in TRAININGS.items()
        for rule in rules
    ],
)
def test_two_processes_train_as_one(trainer: str, rule: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch" if trainer == "lightning" else trainer)
    first, second = run("fully_sharded", f"{trainer}, {rule}", tmp_path)
    assert first == second
    assert first["sharded"]
    assert first["resumed"]
    assert first["off"] < 2e-5  # the bound of tests/distributed
    assert first["steps"] == 16
    if trainer != "accelerate":  # the others have a callback, with a Monitor
        assert first["observed"] == 16


@needs_fully_shard
@thorough
def test_lightning_and_a_training_that_began_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    for found in run("fully_sharded", "lightning, began otherwise", tmp_path):
        assert "the model is sharded ('net.first.weight')" in found["no plan"]
        assert "give plan=nw.plan(model, batches), made before" in found["no plan"]
        assert "made without DecayCallback" in found["without"]
        assert found["adopted"] == [8, 0.0, 0.1]
        assert found["extended"] == [16, True]
