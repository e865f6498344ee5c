"""A Dask scheduler and workers in processes of this machine, on loopback alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # seconds until a process of Dask must be up, on a machine with much else to do

_WORKER = """
{before}
from distributed.cli.dask_worker import main
main()
"""


class LocalCluster:
    """Processes are ended when the with-block is left."""

    def __init__(self, folder: Path, **config: str) -> None:
        self._folder = folder
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            **{f"DASK_DISTRIBUTED__{key}": value for key, value in config.items()},
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            "from distributed.cli.dask_scheduler import main; main()",
            "--port=0",
            f"--scheduler-file={file}",
        )
        deadline = time.monotonic() + PATIENCE
        self.address = ""
        while not self.address:
            assert time.monotonic() < deadline, "the scheduler does not come up"
            assert self.scheduler.poll() is None, "the scheduler has ended"
            time.sleep(0.02)
            try:
                self.address = json.loads(file.read_text(encoding="utf-8"))["address"]
            except (OSError, ValueError):  # not written yet, or not to the end
                continue

    def start_worker(self, name: str, threads: int = 1, before: str = "") -> subprocess.Popen[bytes]:
        return self._start(
            _WORKER.format(before=before),
            self.address,
            f"--name={name}",
            f"--nthreads={threads}",
            "--no-nanny",
            f"--local-directory={self._folder}",
        )

    def _start(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"log-{len(self._processes)}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments, "--host=127.0.0.1", "--no-dashboard"],
                env=self._env,
                cwd=self._folder,  # nothing there that a run could use
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("log-*")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
