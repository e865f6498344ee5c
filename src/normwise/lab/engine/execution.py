"""Execute the runs that are not finished yet, several at a time, each on one thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, dataclass, fields
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from normwise.lab.engine.forecast import Forecast
from normwise.lab.engine.run import Metrics, Run
from normwise.lab.engine.store import MisfitError, Store

__all__ = ["HERE", "Outcome", "Progress", "RunError", "Workers", "attempt", "execute", "local_workers"]

Progress = Callable[[int, int, float], None]
"""Called with the number of finished runs, of runs to execute, and roughly the seconds left."""

# Threads and torch's random state belong to the process: two runs at once would disturb each other.
_ONE_AT_A_TIME = threading.Lock()


class RunError(ValueError):
    """A run failed, or the process that executed it died. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Outcome:
    """What comes back from a run: its metrics and its summary, or an error.

    Attributes:
        metrics: The lines that it logged.
        summary: The summary; None if the run failed.
        error: The error in one line; "" if there was none.
        traceback: The traceback of the error.
    """

    metrics: list[Metrics]
    summary: Metrics | None
    error: str = ""
    traceback: str = ""


def attempt(run: Run, identity: str, folder: Path | None = None, execution: Any = None) -> Outcome:
    """Execute one run on one thread and return its outcome, even if it fails.

    Args:
        run: The run.
        identity: The identity of the run in the process that asked for it. If it differs here, as with
            another version of normwise or torch, nothing is executed.
        folder: As for ``Run.run_in``, like ``execution``.
        execution: See above.
    """
    metrics: list[Metrics] = []
    if run.identity != identity:
        versions = run.as_dict()["versions"]
        return Outcome(metrics, None, f"the worker has other versions than asked for: {versions}")
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        begin = time.perf_counter()
        try:
            summary = run.run_in(folder, execution, metrics.append)
        except Exception as error:  # no error of one run may stop the others
            line = traceback.format_exception_only(error)[-1].strip()
            return Outcome(metrics, None, line, traceback.format_exc())
        finally:
            torch.set_num_threads(threads)
    summary["seconds"] = round(time.perf_counter() - begin, 3)
    return Outcome(metrics, summary)


class _InProcess(Executor):
    """An executor that runs each task in this thread when it is submitted."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(task(*args, **kwargs))
        return future


@dataclass(frozen=True)
class Workers:
    """What executes runs.

    Attributes:
        executor: Any executor of ``concurrent.futures``.
        at_once: Number of runs that are submitted and not finished.
        task: What the executor calls for each run, with the run, its identity, and its folder or None.
        share_files: Whether they see the files of this machine, so that a run can keep checkpoints.
    """

    executor: Executor
    at_once: int = 1
    task: Callable[[Run, str, Path | None], Outcome] = attempt
    share_files: bool = True


HERE = Workers(_InProcess())
"""This process, one run at a time."""


@contextlib.contextmanager
def local_workers(jobs: int, execution: Any = None) -> Iterator[Workers]:
    """Start ``jobs`` processes on this machine that execute runs; for one job, use this process.

    The processes end with this one, however it ends.

    Args:
        jobs: Number of processes.
        execution: As for ``Run.run_in``.
    """
    task = partial(attempt, execution=execution)
    if jobs == 1:
        yield Workers(_InProcess(), task=task)
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        with _no_interrupt_in_children():
            for _ in range(jobs):
                executor.submit(os.getpid)  # starts a process
        yield Workers(executor, jobs, task)
    except BaseException:  # such as Ctrl-C: do not wait for the runs in progress
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt_in_children() -> Iterator[None]:
    """Let processes that start meanwhile never see Ctrl-C, even before they execute any code of ours.

    Processes inherit the signals that this thread blocks. A Ctrl-C meanwhile comes at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else it starts with the first process and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Let this worker process ignore Ctrl-C, which its parent handles, and end when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def execute(
    wanted: Iterable[Run],
    store: Store,
    workers: Workers = HERE,
    progress: Progress = lambda done, total, left: None,
    announce: Callable[[str], None] = lambda line: None,
    forecast: Forecast | None = None,
) -> dict[str, Metrics]:
    """Execute the runs that the store does not have, and return the summaries of all runs by identity.

    Each run uses one thread and its own random streams, so the numbers do not depend on ``workers``. Only
    this process writes finished runs to the store, each when it arrives, so a killed job loses only the runs
    in progress, and of those that keep checkpoints only the steps since the last one. After a run has failed
    no other run is submitted; those already submitted are finished and kept.

    Args:
        wanted: The runs; duplicates are executed once.
        store: Where finished runs are kept.
        workers: What executes the runs.
        progress: Called at the start and after each run.
        announce: Called with a line if stored runs do not fit, so that they are executed again.
        forecast: What was learned about the time of earlier runs, and the cost of later ones.

    Raises:
        RunError: A run failed, a worker process died, or the connection to a cluster was lost.
        ValueError: The store cannot be written.
    """
    distinct = {run.identity: run for run in wanted}
    summaries = _stored(distinct, store, announce)
    missing = [run for identity, run in distinct.items() if summaries[identity] is None]
    # Start the long runs first, so that no worker is left alone with a long one at the end.
    missing.sort(key=lambda run: -run.cost)
    forecast = Forecast() if forecast is None else forecast
    forecast.begin(missing)
    progress(0, len(missing), forecast.seconds / workers.at_once)
    queue = iter(missing)
    pending: dict[Future[Outcome], Run] = {}
    failures: list[tuple[Run, Outcome]] = []
    done = 0
    while True:
        if not failures:
            for run in islice(queue, workers.at_once - len(pending)):
                folder = store.run_folder(run) if workers.share_files else None
                pending[workers.executor.submit(workers.task, run, run.identity, folder)] = run
        if not pending:
            break
        lost: BaseException | None = None
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            run = pending.pop(future)
            try:
                outcome = future.result()
            except (BrokenProcessPool, CancelledError) as error:
                lost = error
                continue
            except Exception as error:  # the worker died too often, or its result could not be sent
                outcome = Outcome([], None, f"{type(error).__name__}: {' '.join(str(error).split())}")
            if outcome.summary is None:
                failures.append((run, outcome))
                store.write_failure(run, outcome.traceback or outcome.error)
                continue
            store.write_run(run, outcome.metrics, outcome.summary)
            summaries[run.identity] = outcome.summary
            done += 1
            forecast.finish(run, float(outcome.summary["seconds"]))
            progress(done, len(missing), forecast.seconds / workers.at_once)
        if lost is not None:
            raise _lost(lost, done, workers) from lost
    if failures:
        run, outcome = failures[0]
        others = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise RunError(
            f"run {_described(run)} failed: {outcome.error}{others}; more in "
            f"{store.run_folder(run) / 'failure.txt'}; {done} finished runs are kept, the same command goes "
            "on from here"
        )
    return {identity: summary for identity, summary in summaries.items() if summary is not None}


def _stored(runs: dict[str, Run], store: Store, announce: Callable[[str], None]) -> dict[str, Metrics | None]:
    """Return the stored summaries by identity, None for a run that is not finished or does not fit."""
    summaries: dict[str, Metrics | None] = {}
    misfits: list[MisfitError] = []
    for identity, run in runs.items():
        try:
            summaries[identity] = store.summary(run)
        except MisfitError as error:
            summaries[identity] = None
            misfits.append(error)
    if misfits:
        announce(f"{len(misfits)} stored runs are executed again, as they cannot be trusted: {misfits[0]}")
    return summaries


def _lost(error: BaseException, done: int, workers: Workers) -> RunError:
    """Return the error for workers that are gone."""
    kept = f"{done} finished runs are kept"
    if isinstance(error, BrokenProcessPool):
        return RunError(
            f"a process that executed runs was killed, as when memory runs out; {kept}: give the same "
            f"command again, with fewer than --jobs {workers.at_once}"
        )
    return RunError(f"the connection to the cluster was lost; {kept}: the same command goes on from here")


def _described(run: Run) -> str:
    """Return identity, class and settings of a run in one line, without the settings at their default."""
    changed = [
        f"{field.name}={getattr(run, field.name)}"
        for field in fields(run)
        if field.name not in ("fingerprint", "seed")
        and (field.default is MISSING or getattr(run, field.name) != field.default)
    ]
    return f"{run.identity} ({type(run).__name__}: {', '.join([*changed, f'seed={run.seed}'])})"
