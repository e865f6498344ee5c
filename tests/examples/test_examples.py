from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

import normwise as nw
from examples import small_gpt, small_resnet, watch_gpt, watch_vocoder
from normwise.monitor.log import Log


def _shrunk(audit: nw.Audit) -> set[str]:
    return {p.name for p in audit.rows if any("AdaptiveWeightShrink" in pull.source for pull in p.pulls)}


def test_the_small_gpt_learns_and_decays_its_stream_by_plan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "normwise")
    audit, loss = small_gpt.train(steps=60)
    assert loss < 2.9  # the entropy of single characters is 3.2
    writers = {f"layers.{i}.{x}.weight" for i in (0, 1) for x in ("self_attn.out_proj", "linear2")}
    assert _shrunk(audit) == {"embedding.weight", "position", *writers}
    assert not any(finding.serious for finding in audit.findings)
    assert "in equilibrium, from the first step on; the steps of AdamW were measured" in caplog.text


@pytest.mark.thorough
def test_the_small_resnet_learns_and_decays_its_convolutions_by_plan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "normwise")
    audit, accuracy = small_resnet.train(epochs=3)
    assert accuracy > 0.9
    assert math.isfinite(accuracy)
    blocks = {f"{b}.body.{k}.0.weight" for b in (1, 2) for k in (0, 2)}
    assert _shrunk(audit) == {"0.0.weight", *blocks}
    assert not any(finding.serious for finding in audit.findings)
    assert "because the steps of SGD grow with the gradient" in caplog.text


@pytest.mark.thorough
def test_watch_finds_queries_and_keys_that_do_not_turn(tmp_path: Path) -> None:
    watch_gpt.train(tmp_path, steps=150)
    (finding,) = Log.open(tmp_path).present()
    assert finding.kind == "effective rate vanished"
    assert set(finding.layers) == {f"blocks.{k}.{x}" for k in (0, 1) for x in ("query", "key")}


@pytest.mark.thorough
def test_watch_finds_decay_that_bfloat16_swallows_and_none_where_it_is_compensated(tmp_path: Path) -> None:
    monitor = watch_vocoder.train(tmp_path / "lost", steps=60)
    (finding,) = Log.open(tmp_path / "lost").present()
    assert finding.kind == "decay lost to rounding"
    assert finding.layers == monitor.layers
    assert watch_vocoder.train(tmp_path / "kept", steps=60, compensated=True).findings == []
