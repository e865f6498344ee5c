"""What a budget of networks of the paper's size would take on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from normwise.lab.claims import claims_named
from normwise.lab.claims.at_size.worst_case import all_runs
from normwise.lab.claims.budget import SIZED, Budget
from normwise.lab.data.catalog import load_images
from normwise.lab.data.image_folder import ImageFolder
from normwise.lab.reproduce import check_request
from normwise.lab.runs.devices import Execution
from normwise.lab.runs.estimate import estimate
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.text import TextRun

__all__ = ["dry_run"]


def dry_run(
    names: list[str],
    *,
    data: str = "fashion-mnist",
    budget: str = "large",
    seeds: str | int | None = None,
    device: str = "cpu",
    precision: str = "float32",
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a few steps of each kind of run and add up, by claim and in all.

    Runs whose settings follow from the first runs are counted at their most. The claims share runs, so that
    all of them take less than their sum. No data set is needed, except a folder of pictures.

    Args:
        names: As for :func:`normwise.lab.reproduce.reproduce`, like the others.
        data: See above.
        budget: "large" or "paper".
        seeds: See above.
        device: See above.
        precision: See above.
        announce: See above.

    Returns:
        runs, steps, the mean seconds_per_step, hours on one core (or the device) one run after the other, and
        memory_gib of the largest run; and claims, the runs and hours of each by itself.

    Raises:
        ValueError: As for ``reproduce``, or the budget is of small networks.
    """
    check_request(budget, data, seeds, device, precision, None)
    if budget not in SIZED:
        raise ValueError(
            f"--dry-run is not for --budget {budget}, which takes minutes: give {' or '.join(SIZED)}"
        )
    named = claims_named(names, budget)
    images = load_images(data, offline=True) if data.startswith("imagefolder:") else None
    fingerprint = images.fingerprint if isinstance(images, ImageFolder) else ""
    spent = Budget.of(budget, data, fingerprint, seeds).with_precision(precision)
    claims = {claim.id: all_runs([claim(spent)]) for claim in named}
    every = list({run.identity: run for runs in claims.values() for run in runs}.values())
    announce(f"measuring a few steps for {len(every)} runs")
    sized = [run for run in every if isinstance(run, NetworkRun | TextRun)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs will have
    try:
        measured = estimate(sized, Execution(device))
    finally:
        torch.set_num_threads(threads)
    return measured.as_dict() | {
        "claims": {
            claim: {"runs": len(runs), "hours": _hours(measured.by_run[run.identity] for run in runs)}
            for claim, runs in claims.items()
        },
    }


def _hours(seconds: Iterable[float]) -> float:
    return round(sum(seconds) / 3600, 2)
