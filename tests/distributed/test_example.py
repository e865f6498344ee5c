"""examples/fsdp.py: other ranks continue its checkpoint, and under torchrun a killed rank ends the job."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from tests.distributed.world import World, needs_fully_shard

from examples import fsdp

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launched(size: int, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(size), str(EXAMPLE), "--checkpoint", str(directory / "run"), *arguments]
    return subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(job: subprocess.Popen[str]) -> str:
    try:
        output, _ = job.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return output


def ran(directory: Path, *arguments: str) -> str:
    """Run the example on the ranks of a world, and return what it prints."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fsdp.py", "--checkpoint", str(directory), *arguments]),
        mock.patch.object(fsdp, "Transformer", functools.partial(fsdp.Transformer, 16, 2, 1)),
        mock.patch.object(dist, "init_process_group"),  # the world has its group
        mock.patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(printed),
    ):
        fsdp.main()
    return printed.getvalue()


@needs_fully_shard
def test_a_job_continues_on_another_number_of_ranks(worlds: dict[int, World], tmp_path: Path) -> None:
    arguments = ("--save-every", "5", "--stop-after")
    first, second = worlds[2].run(ran, tmp_path, *arguments, "6")
    assert "step 5: loss" in first
    assert second == ""
    first, *_ = worlds[3].run(ran, tmp_path, *arguments, "10")
    assert first.startswith("continued from step 5 on 3 processes\nstep 10: loss")


@needs_fully_shard
@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux, to find the ranks of a job")
def test_a_killed_job_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    arguments = ("--steps", "4000", "--save-every", "5")
    job, latest = launched(2, tmp_path, *arguments), tmp_path / "run" / "latest"
    limit = time.monotonic() + 120
    while not (latest.exists() and latest.read_text()):
        assert job.poll() is None, finished(job)
        assert time.monotonic() < limit, "no checkpoint within two minutes"
        time.sleep(0.1)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = finished(job)
    assert job.returncode != 0
    assert "SIGKILL" in output, output
    done = int(latest.read_text())
    job = launched(3, tmp_path, *arguments, "--stop-after", str(done + 10))
    output = finished(job)
    assert job.returncode == 0, output
    assert f"continued from step {done} on 3 processes" in output
    assert f"step {done + 10}: loss" in output
