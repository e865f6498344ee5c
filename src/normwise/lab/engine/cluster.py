"""Runs on the workers of a Dask cluster.

A worker needs what this process has: the same normwise, torch and Python, and the data set. It needs no file
    of this
machine: outcomes come back over the connection, and this process stores them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import normwise as nw
from normwise.lab.data.catalog import load_images
from normwise.lab.engine.execution import Outcome, Workers, attempt
from normwise.lab.engine.run import Run

__all__ = ["Cluster", "ClusterError", "check_address", "connected"]

PATIENCE = 10.0  # seconds to wait for the scheduler and for a first worker


class ClusterError(ValueError):
    """A cluster cannot be used. The message is one line."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(" ".join(f"--cluster {address} {problem}".split()))


def check_address(address: str) -> None:
    """Check what can be known without a connection.

    Raises:
        ClusterError: The address is malformed, or Dask is not installed.
    """
    form = re.fullmatch(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):(\d{1,5})", address)
    if form is None or not 0 < int(form[3]) < 65536:
        raise ClusterError(address, "is no address: give tcp://HOST:PORT, as the scheduler prints it")
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ClusterError(address, "needs another package: pip install normwise[cluster]") from error


@contextlib.contextmanager
def connected(
    address: str, announce: Callable[[str], None] = lambda line: None, patience: float | None = None
) -> Iterator[Cluster]:
    """Connect to a scheduler whose workers all have the versions of this process, and disconnect at the end.

    Args:
        address: ``tcp://HOST:PORT`` of the scheduler, or ``tls://``.
        announce: Called with a line about the workers.
        patience: Seconds to wait for the scheduler and for a first worker. None means ``PATIENCE``.

    Raises:
        ClusterError: There is no such cluster, or it has no workers, or a worker that cannot be used.
    """
    check_address(address)
    patience = PATIENCE if patience is None else patience
    from distributed import Client

    with _silenced("distributed.client"):  # it logs a traceback for a lost connection; we raise one line
        try:
            client = Client(address, timeout=patience, set_as_default=False)
        except (OSError, ValueError) as error:  # no answer in time; no certificates for tls
            problem = f"does not answer ({_line(error)}): start one there with dask scheduler"
            raise ClusterError(address, problem) from error
        try:
            cluster = Cluster(address, client)
            cluster.check_workers(patience)
            announce(f"cluster {address}: {len(client.nthreads())} workers")
            for line in cluster.other_processors():
                announce(line)
            yield cluster
        finally:
            client.close(timeout=patience)


class Cluster:
    """A connection to a scheduler and its workers; :func:`connected` makes it."""

    def __init__(self, address: str, client: Any) -> None:
        self._address = address
        self._client = client

    def check_workers(self, patience: float) -> None:
        """Wait for a first worker, and refuse workers that would compute other numbers.

        Raises:
            ClusterError: There is no worker, or one that differs from this process.
        """
        try:
            self._client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            problem = f"has no workers (waited {patience:.0f} s): start some with {self._command()}"
            raise ClusterError(self._address, problem) from error
        for worker, threads in self._client.nthreads().items():
            if threads != 1:
                problem = (
                    f"has a worker, {worker}, of {threads} threads, and a run needs a process of its own"
                )
                raise ClusterError(self._address, f"{problem}: start {self._command(threads)} in its place")
        for worker, versions in self._ask(_versions).items():
            for name, mine in _versions().items():
                if mine is not None and versions.get(name) != mine:
                    raise ClusterError(
                        self._address,
                        f"has a worker, {worker}, with {name} {versions.get(name) or '(none)'}, and here it "
                        f"is {mine}: its numbers would differ; install the same version there",
                    )

    def other_processors(self) -> list[str]:
        """Return a line for each worker whose processor has other vector instructions than this one."""
        here = _processor()
        return [
            f"worker {worker} computes with {there}, this machine with {here}: the numbers may differ in "
            "their last digits"
            for worker, there in self._ask(_processor).items()
            if there != here
        ]

    def workers(
        self, data: str, fingerprint: str, offline: bool = False, at_once: int | None = None
    ) -> Workers:
        """Let every worker get the data set, and return the workers.

        A worker takes the data set from its own cache or, unless ``offline``, from the network. A worker that
        joins later does so before its first run. Downloads are announced in the log of the worker.

        Args:
            data: Name of the data set.
            fingerprint: Its fingerprint on this machine.
            offline: Forbids the network.
            at_once: Number of runs submitted and not finished. None means two per worker.

        Raises:
            ClusterError: A worker cannot get the data set, or has another one.
        """
        for worker, there in self._ask(_fingerprint_in_thread, data, offline).items():
            if there != fingerprint:
                raise ClusterError(
                    self._address,
                    f"has a worker, {worker}, whose {data} differs (SHA-256 {there[:12]}…, here "
                    f"{fingerprint[:12]}…): install the same normwise and scikit-learn there",
                )
        executor = self._client.get_executor(pure=False)
        return Workers(
            executor, at_once or 2 * len(self._client.nthreads()), partial(_attempt, data, offline), False
        )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Return the answer of each worker, except of workers that die meanwhile."""
        answers = self._client.run(question, *arguments, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, BaseException) and worker in self._client.nthreads():
                problem = f"has a worker, {worker}, that cannot execute runs: {_line(answer)}"
                raise ClusterError(self._address, problem)
        return {k: answer for k, answer in answers.items() if not isinstance(answer, BaseException)}

    def _command(self, workers: int = 1) -> str:
        return f"dask worker {self._address} --nthreads 1 --nworkers {workers}"


def _attempt(data: str, offline: bool, run: Run, identity: str, folder: Path | None) -> Outcome:
    """Execute a run on a worker, which may have joined after the others got the data set."""
    try:
        _fingerprint(data, offline)
    except ValueError as error:
        return Outcome([], None, _line(error))
    return attempt(run, identity)


async def _fingerprint_in_thread(data: str, offline: bool) -> str:
    """Get the data set while the worker keeps answering the scheduler."""
    return await asyncio.to_thread(_fingerprint, data, offline)


@lru_cache
def _fingerprint(data: str, offline: bool) -> str:
    """Get the data set, once per process, and return its fingerprint."""
    return load_images(data, offline=offline).fingerprint


def _versions() -> dict[str, str | None]:
    """Return the versions that must be the same everywhere. Each run also compares the hash of its code."""
    try:
        peer = version("pytorch-optimizer")
    except PackageNotFoundError:
        peer = None
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "Python": python,
        "normwise": nw.__version__,
        "torch": torch.__version__,
        "pytorch-optimizer": peer,
    }


def _processor() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Silence a logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
