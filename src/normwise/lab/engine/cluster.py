"""Runs on the workers of a Dask cluster, through joblib's own backend.

A worker needs what this process has: the same normwise, torch and Python, and the data set. It needs no file
of this machine: runs come back over the connection, and this process keeps them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

import torch
from joblib import Parallel

import normwise as nw
from normwise.lab.data.datasets import load
from normwise.lab.data.text import TEXTS, load_text
from normwise.lab.engine.execution import Outcome, RunError, attempt
from normwise.lab.engine.run import REVISION, Run

__all__ = ["Cluster", "ClusterError", "check_address", "connected"]

PATIENCE = 10.0  # seconds for the scheduler to answer, and for a first worker to be there

Versions = dict[str, Any]


class ClusterError(ValueError):
    """A cluster cannot be used. The message is one line."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(" ".join(f"--cluster {address} {problem}".split()))


def check_address(address: str) -> None:
    """Check what can be known without a connection.

    Raises:
        ClusterError: The address has not the form of one, or Dask is not installed.
    """
    form = re.fullmatch(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):(\d{1,5})", address)
    if form is None or not 0 < int(form[3]) < 65536:
        raise ClusterError(address, "is no address: give tcp://HOST:PORT, as the scheduler prints it")
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ClusterError(address, "needs a package more: pip install normwise[cluster]") from error


@contextlib.contextmanager
def connected(
    address: str, announce: Callable[[str], None] = lambda line: None, patience: float | None = None
) -> Iterator[Cluster]:
    """Connect to a scheduler whose workers all have this process's versions, and leave it at the end.

    Args:
        address: ``tcp://HOST:PORT`` of the scheduler, or ``tls://``.
        announce: Is called with a line on what was found.
        patience: Seconds to wait for the scheduler and for a first worker; None: ``PATIENCE``.

    Raises:
        ClusterError: There is no such cluster, or it has no workers, or one that cannot be used.
    """
    check_address(address)
    patience = PATIENCE if patience is None else patience
    from distributed import Client

    with _quiet("distributed.client"):  # of a lost connection we say a line; it logs a traceback
        try:
            client = Client(address, timeout=patience, set_as_default=False)
        except (
            OSError,
            ValueError,
        ) as error:  # no answer in time is an OSError too; tls may lack certificates
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
    """A scheduler with its workers, as :func:`connected` gives it."""

    def __init__(self, address: str, client: Any) -> None:
        self._address = address
        self._client = client
        # what a task does on its worker; with the data set once it is known
        self.task: Callable[[Run, str], Outcome] = attempt

    def check_workers(self, patience: float) -> None:
        """Wait for a first worker; refuse those that would not give this process's numbers.

        Raises:
            ClusterError: There are none, or one that is not as this process is.
        """
        try:
            self._client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            problem = f"has no workers (waited {patience:.0f} s): start some with"
            raise ClusterError(self._address, f"{problem} {self._command()}") from error
        for worker, threads in self._client.nthreads().items():
            if threads != 1:
                problem = (
                    f"has a worker, {worker}, of {threads} threads, and a run wants a process of its own"
                )
                raise ClusterError(self._address, f"{problem}: start {self._command(threads)} in its place")
        # Dask's own report first: it sends no code, which another version of Python could not read.
        found = self._client.get_versions(packages=["normwise", "torch"])
        mine = _of_packages(found["client"])
        for worker, theirs in found["workers"].items():
            self._refuse_other_versions(worker, mine, _of_packages(theirs))
        for worker, versions in self._ask(_versions).items():
            self._refuse_other_versions(worker, _versions(), versions)

    def other_processors(self) -> list[str]:
        """Return a line for each worker whose processor has other vector instructions than this one's."""
        mine = _processor()
        return [
            f"worker {worker} computes with {theirs}, this machine with {mine}: the numbers may differ in "
            "their last digits"
            for worker, theirs in self._ask(_processor).items()
            if theirs != mine
        ]

    def prepare(self, needed: dict[str, str], offline: bool) -> None:
        """Have every worker get the data, from its own cache or else, not ``offline``, the network.

        A worker that joins later does the same before its first run. What is fetched is said in the
        worker's own log.

        Args:
            needed: The fingerprint that each data set or text has here, by name.
            offline: Forbids the network.

        Raises:
            ClusterError: A worker cannot have the data, or has others.
        """
        self.task = partial(_attempt_with_data, tuple(needed), offline)
        for name, here in needed.items():
            for worker, theirs in self._ask(_fingerprint_in_thread, name, offline).items():
                if theirs != here:
                    raise ClusterError(
                        self._address,
                        f"has a worker, {worker}, whose {name} is another one (SHA-256 {theirs[:12]}…, here "
                        f"{here[:12]}…): install the same normwise and scikit-learn there",
                    )

    def parallel(self, at_once: int | None) -> Parallel:
        """Return the joblib.Parallel that carries out tasks here, by default two handed to each worker."""
        return Parallel(
            n_jobs=-1,
            backend=_backend(self._client),
            return_as="generator_unordered",
            batch_size=1,
            pre_dispatch=at_once or "2*n_jobs",
        )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Return each worker's answer; a worker that dies meanwhile has none."""
        answers = self._client.run(question, *arguments, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, BaseException) and worker in self._client.nthreads():
                raise ClusterError(
                    self._address, f"has a worker, {worker}, that cannot carry out runs: {_line(answer)}"
                )
        return {k: answer for k, answer in answers.items() if not isinstance(answer, BaseException)}

    def _refuse_other_versions(self, worker: str, mine: Versions, theirs: Versions) -> None:
        for name, version in mine.items():
            if version is not None and theirs.get(name) != version:
                raise ClusterError(
                    self._address,
                    f"has a worker, {worker}, with {name} {theirs.get(name) or '(none)'}, and here it is "
                    f"{version}: its numbers would be others; install {name} {version} there",
                )

    def _command(self, workers: int = 1) -> str:
        return f"dask worker {self._address} --nthreads 1 --nworkers {workers}"


def _backend(client: Any) -> Any:
    """Return joblib's backend for Dask, but for three things that joblib 1.6 does with it.

    A cluster of one worker is left idle, and all is done in this process. Where Dask gives a task up (its
    worker died several times) no callback is called, and all waits for ever. Where the connection is lost
    the error is taken for a result.
    """
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, int(super().effective_n_jobs(n_jobs)))

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            settings: Run = func.items[0][1][0]

            def given_up(future: Future[Any]) -> None:
                error = future.exception()
                if error is not None and callback is not None:
                    callback([Outcome(settings, [], None, _line(error))])

            future.add_done_callback(given_up)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise RunError(
                    f"the connection to the cluster was lost ({_line(out)}); finished runs are kept: the "
                    "same command goes on from here"
                )
            return super().retrieve_result_callback(out)

    return Backend(client=client)


def _attempt_with_data(needed: tuple[str, ...], offline: bool, settings: Run, identity: str) -> Outcome:
    """Carry out a run on a worker that may have joined after all others were asked for the data."""
    try:
        for name in needed:
            _fingerprint(name, offline)
    except ValueError as error:
        return Outcome(settings, [], None, _line(error))
    return attempt(settings, identity)


async def _fingerprint_in_thread(name: str, offline: bool) -> str:
    """Do so while the worker goes on answering the scheduler."""
    return await asyncio.to_thread(_fingerprint, name, offline)


@lru_cache
def _fingerprint(name: str, offline: bool) -> str:
    """Get a data set or a text to this machine; once in a process."""
    if name in TEXTS:
        return load_text(name, offline=offline).fingerprint
    return load(name, offline=offline).fingerprint


def _versions() -> Versions:
    """Return what the identity of a run depends on, and so must be the same on all machines."""
    return {"normwise": nw.__version__, "revision": REVISION, "torch": torch.__version__} | _peers()


def _peers() -> Versions:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"pytorch-optimizer": version("pytorch-optimizer")}
    except PackageNotFoundError:
        return {}


def _processor() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _of_packages(report: dict[str, Any]) -> Versions:
    """Return the versions that matter of a report of Dask's; of Python's, the first two numbers do."""
    packages = report["packages"]
    python = ".".join(str(packages["python"]).split(".")[:2])
    return {"Python": python, "normwise": packages["normwise"], "torch": packages["torch"]}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger say nothing."""
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
