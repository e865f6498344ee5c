"""Carry out runs: those that are not finished yet, several at a time, each on one thread."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import BrokenProcessPool

from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store

if TYPE_CHECKING:
    from normwise.lab.engine.cluster import Cluster

__all__ = ["Outcome", "Progress", "RunError", "attempt", "carry_out", "describe"]

Summary = dict[str, Any]
Progress = Callable[[int, int, float], None]
"""Is called with the number of runs done, that of runs to do, and the share of the expected time done."""

# The number of threads and the state of torch's generator belong to the process: two runs in one process
# would not have the numbers of one.
_ONE_AT_A_TIME = threading.Lock()


class RunError(ValueError):
    """A run ended in an error of its own, or what carried it out died. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Outcome:
    """What comes back from a run: what it logged and its summary, or the error in which it ended.

    Attributes:
        settings: The run.
        metrics: What it logged.
        summary: What came out; None where the run ended in an error.
        error: The error in a line; "" where there was none.
        details: The error's traceback.
    """

    settings: Run
    metrics: list[dict[str, Any]]
    summary: Summary | None
    error: str = ""
    details: str = ""


def carry_out(
    wanted: Iterable[Run],
    store: Store,
    jobs: int | None = 1,
    progress: Progress = lambda done, total, share: None,
    cluster: Cluster | None = None,
) -> dict[str, Summary]:
    """Return the summaries of all runs, by identity; carry out those that the store does not have.

    Each run takes one thread and its own random streams, so the numbers depend neither on ``jobs`` nor on
    ``cluster``. Runs come back to this process, which alone writes to the store, each run when it arrives: a
    job that is killed loses only the runs under way. After a run that ended in an error no other is
    begun; those under way are finished and kept.

    Args:
        wanted: The runs; one that is named twice is carried out once.
        store: Where finished runs are kept.
        jobs: How many runs go side by side, each in a process of its own; 1: all in this process. With a
            cluster, how many of its workers are used at a time; None: all of them.
        progress: Is called at the start and after each run.
        cluster: Where the runs are carried out; None: on this machine.

    Raises:
        RunError: A run ended in an error, or a process that carries out runs died for good.
    """
    distinct = {settings.identity: settings for settings in wanted}
    summaries = {identity: store.summary(settings) for identity, settings in distinct.items()}
    missing = [settings for identity, settings in distinct.items() if summaries[identity] is None]
    # The long ones first, so that no process ends with a long one alone.
    missing.sort(key=lambda settings: -settings.cost)
    progress(0, len(missing), 0.0)
    if not missing:
        return {identity: summary for identity, summary in summaries.items() if summary is not None}
    failures: list[Outcome] = []
    if cluster is None:
        jobs = min(jobs or 1, len(missing))
        pool = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        task = delayed(attempt)
    else:
        pool, task = cluster.parallel(jobs), delayed(cluster.task)
    # joblib takes the next one when one is done, so none is begun after a failure
    tasks = (task(settings, settings.identity) for settings in missing if not failures)
    done, spent, whole = 0, 0.0, sum(settings.cost for settings in missing)
    try:
        for outcome in pool(tasks):
            if outcome.summary is None:
                failures.append(outcome)
                store.write_failure(outcome.settings, outcome.details or outcome.error)
                continue
            store.write_run(outcome.settings, outcome.metrics, outcome.summary)
            summaries[outcome.settings.identity] = outcome.summary
            done += 1
            spent += outcome.settings.cost
            progress(done, len(missing), min(1.0, spent / whole))  # the sum was in another order
    except BrokenProcessPool as error:
        raise RunError(
            f"a process that carried out runs was killed, as when memory runs out; {done} finished runs are "
            f"kept: give the same command again, with fewer than --jobs {jobs}"
        ) from error
    if failures:
        raise _error(failures, done, store)
    return {identity: summary for identity, summary in summaries.items() if summary is not None}


def attempt(settings: Run, identity: str) -> Outcome:
    """Carry out one run on one thread; an error becomes part of the outcome.

    Args:
        settings: The run.
        identity: That of the settings where the run was asked for. It is another one here if the versions
            are, and then nothing is run.
    """
    metrics: list[dict[str, Any]] = []
    if settings.identity != identity:
        versions = settings.as_dict()["versions"]
        return Outcome(settings, metrics, None, f"the worker has other versions than asked for: {versions}")
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        begin = time.perf_counter()
        try:
            summary = settings.run(metrics.append)
        except Exception as error:  # whatever it is, the other runs must not be lost for it
            line = traceback.format_exception_only(error)[-1].strip()
            return Outcome(settings, metrics, None, line, traceback.format_exc())
        finally:
            torch.set_num_threads(threads)
    summary["seconds"] = round(time.perf_counter() - begin, 3)
    return Outcome(settings, metrics, summary)


def describe(settings: Run) -> str:
    """Return a run's identity and what is not at its default, in a line."""
    changed = [
        f"{field.name}={getattr(settings, field.name)}"
        for field in fields(settings)
        if field.name not in ("fingerprint", "seed")
        and (field.default is MISSING or getattr(settings, field.name) != field.default)
    ]
    return (
        f"{settings.identity} ({type(settings).__name__}: {', '.join([*changed, f'seed={settings.seed}'])})"
    )


def _error(failures: list[Outcome], done: int, store: Store) -> RunError:
    first = failures[0]
    others = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
    return RunError(
        f"run {describe(first.settings)} failed: {first.error}{others}; more in "
        f"{store.run_folder(first.settings) / 'failure.txt'}; {done} finished runs are kept, the same "
        "command goes on from here"
    )
