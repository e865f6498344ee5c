"""Trainers on two processes: the plan of one rank, the same weights on both, and a resume to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, job: str, folder: Path) -> list[dict[str, Any]]:
    finished = subprocess.run(
        [sys.executable, "-m", f"tests.integrations.{script}", job, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


# Trainer leaves the processes to Accelerate, of which `make test` has a sharded training
@pytest.mark.parametrize(
    "trainer",
    [
        "lightning",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("accelerate", "transformers")),
    ],
)
def test_two_processes(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning" if trainer == "lightning" else trainer)
    first, second = run("two_processes", trainer, tmp_path)
    assert first == second
    assert first["resumed"] == first["whole"]
    assert first["steps"] == 16
    if trainer == "accelerate":  # its schedule steps twice per step
        assert f"Σlr = {first['rates']:.4g} " in first["said"]
    if trainer == "lightning":
        assert "net.first.weight" in first["shrunk"]
