"""From the names of claims to verdicts in a folder."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import normwise as nw
from normwise.lab.claims import claims_named
from normwise.lab.claims.claim import Budget, Claim, Runs
from normwise.lab.data.datasets import DATASETS, load
from normwise.lab.data.text import load_text
from normwise.lab.engine.cluster import Cluster, check_address, connected
from normwise.lab.engine.execution import Progress, carry_out
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store, write_atomically
from normwise.lab.report.compare import compare, read_reference
from normwise.lab.report.page import write_report

__all__ = ["read_results", "rebuild_report", "reproduce"]

Results = dict[str, Any]


def reproduce(
    names: list[str],
    *,
    out: Path,
    data: str = "fashion-mnist",
    budget: str = "quick",
    seeds: int | None = None,
    jobs: int | None = 1,
    offline: bool = False,
    cluster: str | None = None,
    reference: Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, share: None,
) -> Results:
    """Put claims to the test and write ``results.json`` and ``report.html``.

    Runs that the folder already holds are not repeated, so the same call resumes a job that was killed.
    Claims that were judged in this folder by earlier calls stay in the results, each with its own protocol.

    Args:
        names: Identifiers of claims; none: all of them.
        out: The folder: new, empty, or of an earlier call.
        data: Name of the data set.
        budget: "quick" or "full".
        seeds: Number of seeds; None: that of the budget.
        jobs: How many runs go side by side; None: one per core, or with a cluster one per worker.
        offline: Forbids fetching data.
        cluster: Address of a Dask scheduler whose workers carry out the runs; None: this machine does.
        reference: A ``results.json``, or a folder that holds one, to compare with
            (:func:`normwise.lab.report.compare.compare`).
        announce: Is called with a line for each thing that takes time or is fetched.
        progress: Is called as :data:`normwise.lab.engine.execution.Progress` says, from 0 again for the runs
            whose settings the first ones choose.

    Returns:
        What is in ``results.json``.

    Raises:
        ValueError: A claim, data set, budget or number is not allowed, the folder holds something else, the
            data are missing or damaged, the cluster or the reference cannot be used, or a run ended in an
            error. Nothing has been written over, and finished runs are kept.
    """
    claims = claims_named(names)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs} is not possible: give 1 or more")
    if data not in DATASETS:
        raise ValueError(f"--data {data} is not known: choose from {', '.join(DATASETS)}")
    Budget.of(budget, data, "", seeds)  # before anything is fetched or written
    compared_with = None if reference is None else read_reference(reference, [c.id for c in claims], data)
    if cluster is not None:
        check_address(cluster)
    begin = time.perf_counter()
    with nullcontext() if cluster is None else connected(cluster, announce) as workers:
        store = Store(out)
        fingerprint = load(data, offline=offline, announce=announce).fingerprint
        spent = Budget.of(budget, data, fingerprint, seeds)
        needed = {data: fingerprint}
        if any(claim.needs_text for claim in claims):
            text = spent.text.data
            needed[text] = load_text(text, offline=offline, announce=announce).fingerprint
        if workers is not None:
            workers.prepare(needed, offline)
        runs = _all_runs(claims, spent, store, _side_by_side(jobs, workers), workers, announce, progress)
    protocol = {"data": data, "budget": budget, "seeds": list(spent.seeds), "environment": _environment()}
    results = read_results(store) or {"format": 1, "claims": {}}
    for claim in claims:
        results["claims"][claim.id] = _judged(claim, spent, runs) | {"protocol": protocol}
    results.pop("comparison", None)  # that of an earlier call
    if compared_with is not None:
        results["comparison"] = compare(results, compared_with, [claim.id for claim in claims])
    results["seconds"] = round(time.perf_counter() - begin, 1)
    results["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_atomically(out / "results.json", _json(results))
    write_report(results, out / "report.html")
    return results


def _all_runs(
    claims: list[Claim],
    budget: Budget,
    store: Store,
    jobs: int | None,
    cluster: Cluster | None,
    announce: Callable[[str], None],
    progress: Progress,
) -> Runs:
    """Carry out what the claims need, then what they need once they know that."""
    first: list[Run] = [settings for claim in claims for settings in claim.runs(budget)]
    runs = Runs(carry_out(first, store, jobs, progress, cluster), store)
    second: list[Run] = [settings for claim in claims for settings in claim.second_runs(budget, runs)]
    if second:
        announce("now the runs with what the first ones have chosen")
        runs = Runs(carry_out([*first, *second], store, jobs, progress, cluster), store)
    return runs


def _side_by_side(jobs: int | None, cluster: Cluster | None) -> int | None:
    if jobs is not None or cluster is not None:
        return jobs
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_results(store: Store) -> Results | None:
    """Return what ``results.json`` of a folder holds, None where there is none yet.

    Raises:
        ValueError: The file is damaged.
    """
    path = store.folder / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["claims"], dict) or results["format"] != 1:
            raise ValueError("it is not of format 1")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and repeat the normwise reproduce that wrote it, which "
            "keeps the finished runs"
        ) from error
    return dict(results)


def rebuild_report(out: Path) -> Path:
    """Write ``report.html`` anew from ``results.json``; return its path.

    Raises:
        ValueError: The folder is not one of results, or has none yet.
    """
    results = read_results(Store.existing(out))
    if results is None:
        raise ValueError(f"{out} has no results.json yet: run normwise reproduce --out {out} to the end")
    return write_report(results, out / "report.html")


def _judged(claim: Claim, budget: Budget, runs: Runs) -> dict[str, Any]:
    needed = [*claim.runs(budget), *claim.second_runs(budget, runs)]
    identities = list(dict.fromkeys(settings.identity for settings in needed))
    ends = {identity: runs.status(identity) for identity in identities}
    failed = {identity: end for identity, end in ends.items() if end != "finished"}
    return {
        **claim.texts(),
        "order": claim.order,
        **claim.judge(budget, runs).as_dict(),
        "runs": {
            "count": len(identities),
            "not_finished": len(failed),
            "failed": failed,
            "identities": identities,
        },
    }


def _json(results: Results) -> str:
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _environment() -> dict[str, str]:
    return {
        "normwise": nw.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
    }


def _processor() -> str:
    """Return the name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
