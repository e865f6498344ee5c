"""``NetworkRun`` and ``TextRun`` on a CUDA device. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.lab.small import text

from normwise.lab.data.catalog import load_images
from normwise.lab.engine.run import Metrics
from normwise.lab.runs.devices import Execution
from normwise.lab.runs.network import NetworkRun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("lightning")
    fingerprint = load_images("digits").fingerprint
    run = NetworkRun(data="digits", fingerprint=fingerprint, epochs=2, train_size=256, precision=precision)
    execution = Execution(device="cuda", checkpoint_steps=1)
    whole = run.train(execution)

    def killed(step: int, steps: int, line: Metrics) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(execution, checkpoint=tmp_path / "checkpoint.pt", seen=killed)
    resumed = run.train(execution, checkpoint=tmp_path / "checkpoint.pt")
    for summary in (whole, resumed):
        del summary["training_seconds"]
    assert resumed == whole


def test_too_large_a_batch_says_which_would_fit() -> None:
    pytest.importorskip("lightning")
    fingerprint = load_images("digits").fingerprint
    run = NetworkRun(data="digits", fingerprint=fingerprint, network="resnet110", batch_size=1437, width=4096)
    with pytest.raises(ValueError, match=r"batch of 1437 images is too large for cuda:0: .* were free; "):
        run.train(Execution(device="cuda"))


@pytest.mark.parametrize("changes", [{"decayed": "invariant", "start": "equilibrium"}, {"optimizer": "muon"}])
def test_the_language_model_learns_as_on_a_cpu(changes: dict[str, str]) -> None:
    run = text(**changes)
    here = run.run_in(None, Execution(device="cpu"), lambda line: None)
    there = run.run_in(None, Execution(device="cuda"), lambda line: None)
    assert here["status"] == there["status"] == "finished"
    assert there["test_loss"] == pytest.approx(here["test_loss"], abs=0.02)
