"""Processes that wait for test functions to run together, so that a world is started once for many tests."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

# imported once, in the process that all others are forked from
PRELOADED = [
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
    "normwise.decay.decay",
    "normwise.planning.plan",
]
TIMEOUT = 60.0

needs_fully_shard = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard before torch 2.7 does not train on a CPU",
)


class World:
    """A number of gloo processes on this machine.

    Each test function gets the same arguments on every rank; what it returns comes back as a list.
    """

    def __init__(self, size: int, directory: Path) -> None:
        self.size = size
        self._directory = directory
        self._starts = 0
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        results, problems = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} did not answer within {TIMEOUT:.0f} s")
            worked, result = connection.recv()
            results.append(result)
            if not worked:
                problems.append(f"rank {rank} of {self.size}:\n{result}")
        if problems:
            self.close()  # the ranks may not be in step any more
            raise AssertionError("\n".join(problems))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, __name__])
        self._starts += 1
        meeting = str(self._directory / f"{self.size}-{self._starts}")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, meeting), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._connections, self._processes = [], []


def _serve(connection: Connection, rank: int, size: int, meeting: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            connection.send((True, function(*arguments)))
        except Exception:  # the test fails with this text
            connection.send((False, traceback.format_exc()))
