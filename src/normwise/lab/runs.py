"""Carry out runs: those that are not finished yet, several at a time, each on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from joblib import Parallel, delayed

from normwise.lab.settings import Settings
from normwise.lab.store import Store

__all__ = ["carry_out"]

Summary = dict[str, Any]


def carry_out(
    wanted: Iterable[Settings],
    store: Store,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Summary]:
    """Return the summaries of all runs, by identity; carry out those that the store does not have.

    Each run takes one thread and its own random streams, so the numbers do not depend on ``jobs``.

    Args:
        wanted: The runs; one that is named twice is carried out once.
        store: Where finished runs are kept. Each is written when it ends, so that a job that is killed
            loses only the runs under way.
        jobs: How many runs go side by side, each in a process of its own; 1: all in this process.
        progress: Is called with the number of runs done in this job and of those to do.
    """
    distinct = {settings.identity: settings for settings in wanted}
    summaries = {identity: store.summary(settings) for identity, settings in distinct.items()}
    missing = [settings for identity, settings in distinct.items() if summaries[identity] is None]
    # The long ones first, so that no process ends with a long one alone.
    missing.sort(key=lambda settings: -settings.cost)
    progress(0, len(missing))
    if missing:
        parallel = Parallel(n_jobs=min(jobs, len(missing)), return_as="generator_unordered", batch_size=1)
        finished = parallel(delayed(_run)(settings, store) for settings in missing)
        for done, (identity, summary) in enumerate(finished, start=1):
            summaries[identity] = summary
            progress(done, len(missing))
    return {identity: summary for identity, summary in summaries.items() if summary is not None}


def _run(settings: Settings, store: Store) -> tuple[str, Summary]:
    """Carry out one run on one thread and keep it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics: list[dict[str, Any]] = []
    begin = time.perf_counter()
    try:
        summary = settings.carry_out(metrics.append)
    finally:
        torch.set_num_threads(threads)
    summary["seconds"] = round(time.perf_counter() - begin, 3)
    store.write_run(settings, metrics, summary)
    return settings.identity, summary
