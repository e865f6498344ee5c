"""What a decay rule costs per step, beside fused optimizers, other libraries and the memory's own speed.

    python -m benchmarks.decay [--network resnet50|gpt2-small] [--rounds N] [--out FILE]

All candidates step the same parameters in turns, one step each in every round, right after a step of their
baseline; the ratio reported is the median over these pairs. Rules act on the weights with two or more
dimensions. On a machine with a GPU the same is timed there first. On a CPU one thread runs, and its own
time is taken, which a busy machine disturbs less. pytorch_optimizer is timed where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.shapes import gpt2_small, resnet50
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

NETWORKS = {"resnet50": resnet50, "gpt2-small": gpt2_small}
RATE, MOMENTUM, STRENGTH = 1e-3, 0.9, 1e-2


class Candidate(NamedTuple):
    """One step to be timed: an optimizer, and the rule that is attached while it steps."""

    baseline: str
    optimizer: Optimizer
    rule: nw.Rule | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012
    after: Callable[[], None] | None = None


def main() -> None:
    """Time the steps on every device of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine()}
    for device in ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]:
        for network in arguments.network or NETWORKS:
            results[f"{network} on {device}"] = report(network, device, arguments.rounds)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def report(network: str, device: str, rounds: int) -> dict[str, Any]:
    """Time all candidates on one network, print a table and return its numbers."""
    params = [nn.Parameter(torch.randn(s, device=device) * 0.05) for s in NETWORKS[network]()]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    weights = [param for param in params if param.ndim > 1]
    candidates = listed(params, weights)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    bandwidth = []
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            before = timed(candidates[candidate.baseline], weights, device)
            seconds = timed(candidate, weights, device)
            if turn:  # the first turn allocates the optimizers' state
                times[name].append(seconds)
                ratios[name].append(seconds / before)
        bandwidth.append(stream(params, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    elements, in_weights = (sum(p.numel() for p in some) for some in (params, weights))
    speed = statistics.median(bandwidth)
    # SGD with momentum reads w, g, m and writes w, m; a rule reads w, reads it again and writes it
    floor = 4 * (5 * elements + 3 * in_weights) / speed
    table: dict[str, Any] = {
        name: {
            "milliseconds": round(1e3 * median, 3),
            "ratio": round(statistics.median(ratios[name]), 2),
            "quartiles of the ratio": [round(q, 2) for q in statistics.quantiles(ratios[name], n=4)[::2]],
            "baseline": candidates[name].baseline,
        }
        for name, median in medians.items()
    }
    print(f"\n{network} on {device}: {elements / 1e6:.1f} million elements, medians of {rounds} rounds")
    print(f"{'':32}{'ms':>9} {'ratio':>6} {'its quartiles':>14}  to")
    for name, row in table.items():
        low, high = row["quartiles of the ratio"]
        numbers = f"{row['milliseconds']:9.2f} {row['ratio']:6.2f} {low:7.2f} {high:6.2f}"
        print(f"{name:32}{numbers}  {row['baseline']}")
    ratio = floor / medians["SGD fused"]
    print(f"{'floor of SGD and a rule':32}{1e3 * floor:9.2f} {ratio:6.2f} {'':14}  at {speed / 1e9:.1f} GB/s")
    table["floor of SGD and a rule"] = {
        "milliseconds": round(1e3 * floor, 3),
        "ratio": round(ratio, 2),
        "gigabytes per second": round(speed / 1e9, 2),
    }
    return table


def listed(params: list[nn.Parameter], weights: list[nn.Parameter]) -> dict[str, Candidate]:
    """Return the candidates by name; those that share an optimizer share its state."""
    sgd = SGD(params, lr=RATE, momentum=MOMENTUM, fused=True)
    adamw = AdamW(params, lr=RATE, weight_decay=STRENGTH, fused=True)
    bare = AdamW(params, lr=RATE, weight_decay=0, fused=True)
    aws = nw.AdaptiveWeightShrink(STRENGTH)

    def norms_and_products() -> None:
        for weight in (w.detach().flatten(1) for w in weights):
            weight.mul_(1 - RATE * torch.linalg.vector_norm(weight, dim=1, keepdim=True))

    found = {
        "SGD fused": Candidate("SGD fused", sgd),
        "SGD foreach": Candidate("SGD fused", SGD(params, lr=RATE, momentum=MOMENTUM, foreach=True)),
        "+ norms and products, no rule": Candidate("SGD fused", sgd, after=norms_and_products),
        "+ L2 flow": Candidate("SGD fused", sgd, nw.L2(STRENGTH)),
        "+ AWS flow": Candidate("SGD fused", sgd, aws),
        "+ power flow": Candidate("SGD fused", sgd, nw.PowerShrink(STRENGTH, 1.5)),
        "+ epsilon-shift flow": Candidate("SGD fused", sgd, nw.EpsilonShiftedL2(STRENGTH)),
        "+ sphere": Candidate("SGD fused", sgd, nw.Sphere(1.0)),
        "+ sphere, turned": Candidate("SGD fused", sgd, nw.RotatingSphere(1.0)),
        "+ AWS explicit": Candidate("SGD fused", sgd, aws, {"mode": "explicit"}),
        "+ AWS coupled": Candidate("SGD fused", sgd, aws, {"mode": "coupled"}),
        "+ epsilon-shift as published": Candidate(
            "SGD fused", sgd, nw.PublishedEpsilonShift(STRENGTH), {"mode": "coupled"}
        ),
        "AdamW fused": Candidate("AdamW fused", adamw),
        "AdamW fused + AWS flow, rms": Candidate("AdamW fused", bare, aws, {"measure": "rms"}),
    }
    try:
        import pytorch_optimizer as peers
    except ImportError:
        print("pytorch_optimizer is not installed: its optimizers are not timed.")
        return found
    adam: dict[str, Any] = {"lr": RATE, "weight_decay": STRENGTH}
    found["peer SGDP"] = Candidate("SGD fused", peers.SGDP(params, momentum=MOMENTUM, **adam))
    found["peer AdamP"] = Candidate("AdamW fused", peers.AdamP(params, **adam))
    found["peer AdamC"] = Candidate("AdamW fused", peers.AdamC(params, **adam))
    return found


def timed(candidate: Candidate, weights: list[nn.Parameter], device: str) -> float:
    """Return the seconds of one step; attaching the rule is not timed."""
    rule, optimizer = candidate.rule, candidate.optimizer
    decay = nw.Decay(optimizer, rule, weights, **candidate.settings) if rule else None
    start = now(device)
    optimizer.step()
    if candidate.after is not None:
        candidate.after()
    seconds = now(device) - start
    if decay is not None:
        decay.remove()
    return seconds


def stream(params: list[nn.Parameter], device: str) -> float:
    """Return the bytes per second of reading and writing every parameter once."""
    start = now(device)
    for param in params:
        param.detach().mul_(1.0)
    return 8 * sum(p.numel() for p in params) / (now(device) - start)


def now(device: str) -> float:
    """Return the time when all that was launched is done: this thread's own on a CPU, else the wall's."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> dict[str, Any]:
    """Describe the machine, and how busy it was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main()
