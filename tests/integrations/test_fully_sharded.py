"""Models that a trainer shards with FSDP2: two processes train as one, and a resume is to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.distributed.world import needs_fully_shard
from tests.integrations.test_two_processes import run

thorough = pytest.mark.thorough
RULES = ["nothing given", *(pytest.param(rule, marks=thorough) for rule in ("scheduled", "sphere", "every"))]


@needs_fully_shard
@pytest.mark.parametrize("rule", [*RULES, pytest.param("one file", marks=thorough)])
@thorough
def test_lightning(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    first, second = run("fully_sharded", f"lightning, {rule}", tmp_path)
    assert first == second
    assert first["sharded"]
    assert first["resumed"]
    assert first["off"] < 2e-5  # the bound of tests/distributed
    assert (first["steps"], first["observed"]) == (16, 16)


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


@needs_fully_shard
@pytest.mark.parametrize("rule", RULES)
def test_accelerate(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    first, second = run("fully_sharded", f"accelerate, {rule}", tmp_path)
    assert first == second
    assert first["sharded"]
    assert first["resumed"]
    assert first["off"] < 2e-5
    assert first["steps"] == 16


@needs_fully_shard
@pytest.mark.parametrize("rule", RULES)
@thorough
def test_transformers(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first, second = run("fully_sharded", f"transformers, {rule}", tmp_path)
    assert first == second
    assert first["sharded"]
    assert first["resumed"]
    assert first["off"] < 2e-5
    assert (first["steps"], first["observed"]) == (16, 16)
