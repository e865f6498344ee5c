"""Reproduce claims: execute their runs, judge them, and write results and report into a folder."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import normwise as nw
from normwise.lab.claims import claims_named
from normwise.lab.claims.budget import BUDGETS, SIZED, Budget
from normwise.lab.claims.claim import Claim
from normwise.lab.claims.finished_runs import FinishedRuns, StoredRuns
from normwise.lab.data.catalog import CATALOG, is_known, load_images
from normwise.lab.data.datasets import DATASETS
from normwise.lab.engine.cluster import connected
from normwise.lab.engine.execution import Progress, Workers, execute, local_workers
from normwise.lab.engine.forecast import Forecast
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store, naming_errors, write_atomically
from normwise.lab.report.html_report import write_report
from normwise.lab.report.reference_comparison import Reference, compare, read_reference
from normwise.lab.report.results_file import read_results
from normwise.lab.runs.devices import Execution, device_named

__all__ = [
    "check_request",
    "environment_of",
    "execute_all",
    "rebuild_report",
    "reproduce",
    "write_results",
]

Results = dict[str, Any]
Announce = Callable[[str], None]


def reproduce(
    names: list[str],
    *,
    out: Path,
    data: str = "fashion-mnist",
    budget: str = "quick",
    seeds: str | int | None = None,
    jobs: int | None = 1,
    offline: bool = False,
    cluster: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    reference: Path | None = None,
    announce: Announce = lambda line: None,
    progress: Progress = lambda done, total, left: None,
) -> Results:
    """Test claims and write ``results.json`` and ``report.html``.

    Runs that the folder already holds are not repeated, so the same call resumes a killed job. Claims that
    earlier calls judged in this folder stay in the results, each with its own protocol.

    Args:
        names: Identifiers of claims; empty for all.
        out: The folder: new, empty, or of an earlier call.
        data: Name of the data set.
        budget: "quick" or "full"; or "large" or "paper", on networks of the paper's size, whose runs keep
            checkpoints and need the extra "scale".
        seeds: Number of seeds, or the first and the last such as "500-504"; None for those of the budget.
        jobs: Number of runs at a time; None for one per core, with a cluster two per worker, and on a GPU
            one. More than one
            job starts processes, so a script must then call this function under ``if __name__ ==
            "__main__":``.
        offline: Forbids downloads.
        cluster: Address of a Dask scheduler whose workers execute the runs; None for this machine.
        device: Where the networks of "large" and "paper" are trained.
        precision: "float32", or for these networks "bf16".
        reference: A ``results.json``, or a folder that holds one, to compare with
            (:func:`normwise.lab.report.reference_comparison.compare`).
        announce: Called with a line for everything that takes time or is downloaded.
        progress: Called as :data:`normwise.lab.engine.execution.Progress` says. The number of finished runs
            starts from 0 again for the runs whose settings the first runs determine; the time left covers
            both.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: A claim, data set, budget or number is not allowed, the folder holds something else, the
            data are missing or damaged, the cluster or the reference cannot be used, a run failed, or a file
            cannot be written. Nothing has been overwritten, and finished runs are kept.
    """
    check_request(budget, data, seeds, device, precision, cluster)
    named = claims_named(names, budget)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs} is not possible: give 1 or more")
    compared_with = None if reference is None else read_reference(reference, [c.id for c in named], data)
    begin = time.perf_counter()
    with nullcontext() if cluster is None else connected(cluster, announce) as connection:
        store = Store(out)
        _earlier_results(out)  # damaged results are said before the runs
        images = load_images(data, offline=offline, announce=announce)
        fingerprint = images.fingerprint
        spent = Budget.of(budget, data, fingerprint, seeds).with_precision(precision)
        execution = Execution(device) if budget in SIZED else None
        claims = [claim(spent) for claim in named]
        started: AbstractContextManager[Workers] = (
            local_workers(jobs or _at_once(device), execution)
            if connection is None
            else nullcontext(connection.workers(data, fingerprint, offline, jobs))
        )
        with started as workers:
            runs = execute_all(claims, store, workers, announce, progress, len(images.classes))
    protocol = {
        "data": data,
        "budget": budget,
        "seeds": list(spent.seeds),
        "experiments": spent.experiments,
        "environment": environment_of(device, precision),
    }
    return write_results(claims, runs, protocol, out, time.perf_counter() - begin, compared_with)


def write_results(
    claims: Sequence[Claim],
    runs: FinishedRuns,
    protocol: dict[str, Any],
    out: Path,
    seconds: float,
    compared_with: Reference | None = None,
) -> Results:
    """Judge claims, add them to the results of a folder, and write ``results.json`` and ``report.html``.

    Args:
        claims: The claims.
        runs: All of their runs.
        protocol: How the runs were made.
        out: The folder.
        seconds: What it took.
        compared_with: The content of another ``results.json`` to compare with.
    """
    results = _earlier_results(out)
    for claim in claims:
        results["claims"][claim.id] = _judged(claim, runs) | {"protocol": protocol}
    results.pop("comparison", None)  # of an earlier call
    if compared_with is not None:
        results["comparison"] = compare(results, compared_with, [claim.id for claim in claims])
    results["seconds"] = round(seconds, 1)
    results["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with naming_errors(out / "results.json"):
        write_atomically(out / "results.json", _json(results))
    write_report(results, out / "report.html")
    return results


def _at_once(device: str) -> int:
    """Return the number of runs at a time: one per core, on a GPU one."""
    return _cores() if device_named(device).type == "cpu" else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute_all(
    claims: list[Claim],
    store: Store,
    workers: Workers,
    announce: Announce,
    progress: Progress,
    classes: int = 10,
) -> FinishedRuns:
    """Execute the runs of the claims, then the runs whose settings the first ones determine.

    Args:
        claims: The claims.
        store: Where the runs are kept.
        workers: What executes them.
        announce: As for :func:`reproduce`, like ``progress``.
        progress: See above.
        classes: Number of classes of the images.
    """
    first: list[Run] = [run for claim in claims for run in claim.runs()]
    forecast = Forecast(later=_later_cost(claims, first, store))
    runs = FinishedRuns(execute(first, store, workers, progress, announce, forecast), store, classes)
    forecast.later = 0.0
    second: list[Run] = [run for claim in claims for run in claim.second_runs(runs)]
    if second:
        announce("now the runs with what the first ones have chosen")
        summaries = execute([*first, *second], store, workers, progress, announce, forecast)
        runs = FinishedRuns(summaries, store, classes)
    return runs


def _later_cost(claims: list[Claim], first: list[Run], store: Store) -> float:
    """Return the cost of the second runs; where the stored runs determine them, only missing ones count."""
    stored = StoredRuns(store)
    cost, chosen = 0.0, dict[str, Run]()
    for claim in claims:
        try:
            chosen |= {run.identity: run for run in claim.second_runs(stored)}
        except KeyError:
            cost += claim.second_cost()
    for run in first:
        chosen.pop(run.identity, None)
    return cost + sum(run.cost for run in chosen.values() if run not in stored)


def rebuild_report(results: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` and ``figures/`` again from ``results.json``; return the path of the page.

    Args:
        results: The ``results.json``, or the folder that holds it.
        out: Where to write: a new or empty folder, or one of an earlier call. None: where the results are.

    Raises:
        ValueError: There are no results, they are damaged, or ``out`` cannot be used.
    """
    content = read_results(results)
    target = out or (results if results.is_dir() else results.parent)
    return write_report(content, Store(target).folder / "report.html")


def _earlier_results(out: Path) -> Results:
    exists = (out / "results.json").exists()
    return read_results(out) if exists else {"format": 1, "claims": {}}


def _judged(claim: Claim, runs: FinishedRuns) -> dict[str, Any]:
    needed = [*claim.runs(), *claim.second_runs(runs)]
    statuses = {run.identity: runs.status(run) for run in needed}
    failed = {identity: status for identity, status in statuses.items() if status != "finished"}
    return {
        **claim.texts(),
        "changes": [asdict(change) for change in claim.changes()],
        "order": claim.order,
        "failures_are_the_subject": claim.failures_are_the_subject,
        **claim.outcome(runs).as_dict(),
        "runs": {
            "count": len(statuses),
            "not_finished": len(failed),
            "failed": failed,
            "identities": list(statuses),
        },
    }


def _json(results: Results) -> str:
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_request(
    budget: str, data: str, seeds: str | int | None, device: str, precision: str, cluster: str | None
) -> None:
    """Check what can be known before anything is downloaded or written."""
    if not is_known(data):
        known = DATASETS if budget in BUDGETS else CATALOG
        raise ValueError(f"--data {data} is not known: choose from {', '.join(known)}")
    Budget.of(budget, data, "", seeds).with_precision(precision)
    if budget not in SIZED and device != "cpu":
        raise ValueError(
            f"--device {device} is not for --budget {budget}, whose networks are small: give cpu"
        )
    if cluster is not None and device != "cpu":
        raise ValueError(f"--device {device} is not possible with --cluster, whose workers use their CPUs")
    device_named(device)


def environment_of(device: str, precision: str) -> dict[str, str]:
    """Return what the last digits of results depend on: versions, processor, device."""
    where = device_named(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    return {
        **({} if name == "cpu" and precision == "float32" else {"device": f"{name}, {precision}"}),
        "normwise": nw.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "instructions": _instructions(),
    }


# How each library of torch can be kept from using all the instructions of the processor.
_LIMITS = {"oneDNN": "ONEDNN_MAX_CPU_ISA", "MKL": "MKL_ENABLE_INSTRUCTIONS"}


def _instructions() -> str:
    """Return the vector instructions that torch and its libraries use, which the last digits depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _cpuinfo("flags").split()
    widest = next((name for name, flag in (("AVX512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "")
    libraries = [
        f"{name} at most {os.environ[variable]}"
        if variable in os.environ
        else f"{name} {widest or 'unknown'}"
        for name, variable in _LIMITS.items()
    ]
    return f"torch {capability}, {', '.join(libraries)}"


def _processor() -> str:
    """Return the name of the processor, or "unknown"."""
    return _cpuinfo("model name") or platform.processor() or "unknown"


def _cpuinfo(entry: str) -> str:
    """Return an entry of the first processor in /proc/cpuinfo, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(entry)), "")
