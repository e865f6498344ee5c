"""Train a network of the paper's size; stop and go on at any time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from normwise.lab.data.catalog import CATALOG, load_images
from normwise.lab.engine.run import Metrics
from normwise.lab.engine.store import CHECKPOINT, MisfitError, Store
from normwise.lab.runs.devices import DEFAULT, Execution
from normwise.lab.runs.estimate import estimate
from normwise.lab.runs.network import NetworkRun

__all__ = ["train", "train_from"]

Announce = Callable[[str], None]

_EVERY = 20.0  # seconds between lines of progress, within an epoch


def train_from(
    run: NetworkRun,
    *,
    out: Path,
    execution: Execution = DEFAULT,
    offline: bool = False,
    dry_run: bool = False,
    announce: Announce = lambda line: None,
) -> Metrics | None:
    """Do what ``normwise train`` says: fetch the data, then :func:`train`, or with ``dry_run`` estimate.

    Args:
        run: The run, without the fingerprint of its data.
        out: As for :func:`train`.
        execution: As for :func:`train`.
        offline: Forbids downloads.
        dry_run: Measure a few steps instead. Only a folder of pictures must be there then.
        announce: As for :func:`train`.

    Returns:
        The summary of the run, or the estimate. None in all processes of torchrun but the first.

    Raises:
        ValueError: As for :func:`train`.
    """
    run.check()
    needed = not dry_run or run.data.startswith("imagefolder:")
    fingerprint = (
        load_images(run.data, offline=offline, announce=announce).fingerprint
        if needed or run.data not in CATALOG
        else ""
    )
    run = replace(run, fingerprint=fingerprint)
    if dry_run:
        announce("measuring a few steps")
        answer: Metrics = estimate([run], execution).as_dict()
    else:
        (answer,) = train([run], out=out, execution=execution, announce=announce)
    return answer if _first() else None


def _first() -> bool:
    """Return whether this is the only process, or under torchrun the first: the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def train(
    runs: Sequence[NetworkRun],
    *,
    out: Path,
    execution: Execution = DEFAULT,
    announce: Announce = lambda line: None,
) -> list[Metrics]:
    """Execute runs one after the other, each with checkpoints, and keep them in a folder.

    Finished runs are not repeated, and a run that was interrupted goes on from its last checkpoint, so the
    same call resumes a killed job. OUT/runs/<identity>/ holds config.json, metrics.jsonl (one line an epoch)
    and summary.json of a run, and checkpoint.pt while it is not finished.

    Args:
        runs: The runs. Their data sets must be on this machine.
        out: The folder: new, empty, or of an earlier call.
        execution: The device, and how.
        announce: Called with a line for each epoch, and every 20 seconds.

    Returns:
        The summary of each run, with its identity.

    Raises:
        ValueError: As for ``NetworkRun.train``; or the folder holds something else or cannot be written.
    """
    for run in runs:
        run.check()
    say = announce if _first() else _ignore
    store = Store(out)
    summaries = []
    for number, run in enumerate(runs):
        name = f"run {number + 1} of {len(runs)} ({run.identity}): " if len(runs) > 1 else ""
        summary = _stored(store, run, say)
        if summary is None:
            summary = _executed(store, run, execution, partial(_say, say, name))
        else:
            say(f"{name}is finished already")
        summaries.append({"identity": run.identity, **summary})
    return summaries


def _ignore(line: str) -> None:
    pass


def _say(announce: Announce, name: str, line: str) -> None:
    announce(name + line)


def _stored(store: Store, run: NetworkRun, say: Announce) -> Metrics | None:
    try:
        return store.summary(run)
    except MisfitError as error:
        say(f"a stored run is executed again, as it cannot be trusted: {error}")
        return None


def _executed(store: Store, run: NetworkRun, execution: Execution, say: Announce) -> Metrics:
    folder = store.run_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Metrics] = []
    progress = _Progress(run, say)
    if (folder / CHECKPOINT).exists():
        say("goes on from its checkpoint")
    summary = run.train(execution, checkpoint=folder / CHECKPOINT, log=lines.append, seen=progress)
    if _first():
        store.write_run(run, lines, summary)
    return summary


class _Progress:
    """Says how far a run is, after each epoch and every 20 seconds."""

    def __init__(self, run: NetworkRun, say: Announce) -> None:
        self._run, self._say = run, say
        self._begin, self._from = time.monotonic(), 0
        self._last, self._epoch = self._begin, 0

    def __call__(self, step: int, steps: int, line: dict[str, Any]) -> None:
        now = time.monotonic()
        if not self._from:  # the first step of this sitting; those before it took no time here
            self._from, self._begin = step, now
            self._epoch = line.get("epoch", 0) if step != line.get("step") else 0
        left = (now - self._begin) / max(1, step - self._from) * (steps - step)
        rest = f"about {_duration(left)} left" if step > self._from else "time left not known yet"
        epoch = line.get("epoch", 0)
        if epoch > self._epoch:
            self._epoch, self._last = epoch, now
            part = "validation" if self._run.validation_size else "test"
            key = f"{part}_accuracy"
            self._say(
                f"epoch {epoch} of {self._run.epochs}: training loss {line['train_loss']:.4f}, "
                + (f"{part} accuracy {line[key]:.2%}, " if key in line else "")
                + rest
            )
        elif now - self._last >= _EVERY:
            self._last = now
            self._say(f"step {step:,} of {steps:,}, {rest}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
