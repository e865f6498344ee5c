"""The kernels for CUDA themselves, run by Triton's interpreter; skipped where Triton is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_read_the_table_as_the_stand_in_does() -> None:
    """In a process of its own, as Triton has to be told of the interpreter before it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.decay.interpreted"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
