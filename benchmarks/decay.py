"""What a decay rule costs per step, beside fused optimizers, other libraries and the speed of memory.

    python -m benchmarks.decay [--network resnet50|gpt2-small] [--device cpu|cuda]
                               [--rounds N] [--only TEXT] [--out FILE.md]

Every candidate steps the same parameters, in turns: in each round a candidate takes as many steps as its
``every`` says, right after as many steps of its baseline. The ratio reported is the median over these pairs.
Rules act on the weights with two or more dimensions. On a CPU one thread runs, and its own time is taken,
which a busy machine disturbs less. pytorch_optimizer is timed where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.shapes import gpt2_small, resnet50
from benchmarks.timing import machine, now
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

NETWORKS = {"resnet50": resnet50, "gpt2-small": gpt2_small}
LR, MOMENTUM, COEFFICIENT = 1e-3, 0.9, 1e-2
SGD_FUSED, ADAMW_FUSED = "SGD fused", "AdamW fused"


class Candidate(NamedTuple):
    """A step to be timed: an optimizer, and the rule that is attached while it steps."""

    baseline: str
    optimizer: Optimizer
    rule: nw.Rule | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012
    after: Callable[[], None] | None = None

    @property
    def steps(self) -> int:
        """How many steps make up one measurement."""
        return int(self.settings.get("every", 1))


def main() -> None:
    """Time the steps on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--device", default="cpu", help="cpu (as by default) or cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="time the candidates whose names contain this text")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    description = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    report = ["# What a decay rule costs per step", "", f"`python -m benchmarks.decay`. {description}.", ""]
    for network in arguments.network or NETWORKS:
        report += measure(network, arguments.device, arguments.rounds, arguments.only)
    print("\n".join(report))
    if arguments.out:
        arguments.out.write_text("\n".join(report), encoding="utf-8")


def measure(network: str, device: str, rounds: int, only: str | None) -> list[str]:
    """Time the candidates on one network and return a table as lines of Markdown."""
    params = [nn.Parameter(torch.randn(s, device=device) * 0.05) for s in NETWORKS[network]()]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    weights = [param for param in params if param.ndim > 1]
    known = candidates(params, weights)
    chosen = {name: candidate for name, candidate in known.items() if only is None or only in name}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    bandwidths, baseline = [], []
    for turn in range(rounds + 1):
        for name, candidate in chosen.items():
            before = timed(known[candidate.baseline]._replace(settings=candidate.settings), weights, device)
            seconds = timed(candidate, weights, device)
            if turn:  # the first turn allocates the optimizers' state
                times[name].append(seconds)
                ratios[name].append(seconds / before)
                baseline += [before] if candidate.baseline == SGD_FUSED else []
        bandwidths.append(bandwidth(params, device))
    elements, in_weights = (sum(p.numel() for p in some) for some in (params, weights))
    lines = [
        f"## {network} on {device}: {elements / 1e6:.1f} million elements, medians of {rounds} rounds",
        "",
        "| step | ms | ratio | quartiles | to |",
        "|---|---|---|---|---|",
    ]
    for name, candidate in chosen.items():
        low, _, high = statistics.quantiles(ratios[name], n=4)
        milliseconds, ratio = 1e3 * statistics.median(times[name]), statistics.median(ratios[name])
        lines.append(
            f"| {name} | {milliseconds:.2f} | {ratio:.2f} | {low:.2f}–{high:.2f} | {candidate.baseline} |"
        )
    if baseline:
        # SGD with momentum reads w, g, m and writes w, m; a rule reads w, reads it again and writes it
        speed = statistics.median(bandwidths)
        floor = 4 * (5 * elements + 3 * in_weights) / speed
        ratio = floor / statistics.median(baseline)
        lines.append(
            f"| SGD and a rule at the speed of memory, {speed / 1e9:.1f} GB/s "
            f"| {1e3 * floor:.2f} | {ratio:.2f} | | {SGD_FUSED} |"
        )
    return [*lines, ""]


def candidates(params: list[nn.Parameter], weights: list[nn.Parameter]) -> dict[str, Candidate]:
    """Return the candidates by name; those that share an optimizer share its state."""
    sgd = SGD(params, lr=LR, momentum=MOMENTUM, fused=True)
    adamw = AdamW(params, lr=LR, weight_decay=COEFFICIENT, fused=True)
    bare = AdamW(params, lr=LR, weight_decay=0, fused=True)
    aws, published = nw.AdaptiveWeightShrink(COEFFICIENT), nw.PublishedEpsilonShift(COEFFICIENT)

    def norms_and_products() -> None:
        for weight in (w.detach().flatten(1) for w in weights):
            weight.mul_(1 - LR * torch.linalg.vector_norm(weight, dim=1, keepdim=True))

    def beside_sgd(rule: nw.Rule, **settings: Any) -> Candidate:
        return Candidate(SGD_FUSED, sgd, rule, settings)

    known = {
        SGD_FUSED: Candidate(SGD_FUSED, sgd),
        "SGD foreach": Candidate(SGD_FUSED, SGD(params, lr=LR, momentum=MOMENTUM, foreach=True)),
        "+ norms and products, no rule": Candidate(SGD_FUSED, sgd, after=norms_and_products),
        "+ L2 flow": beside_sgd(nw.L2(COEFFICIENT)),
        "+ L2 flow, every 8": beside_sgd(nw.L2(COEFFICIENT), every=8),
        "+ AWS flow": beside_sgd(aws),
        "+ AWS flow, every 8": beside_sgd(aws, every=8),
        "+ power flow": beside_sgd(nw.PowerShrink(COEFFICIENT, 1.5)),
        "+ epsilon-shift flow": beside_sgd(nw.EpsilonShiftedL2(COEFFICIENT)),
        "+ sphere": beside_sgd(nw.Sphere(1.0)),
        "+ rotating sphere": beside_sgd(nw.RotatingSphere(1.0)),
        "+ AWS explicit": beside_sgd(aws, mode="explicit"),
        "+ AWS coupled": beside_sgd(aws, mode="coupled"),
        "+ epsilon-shift as published": beside_sgd(published, mode="coupled"),
        ADAMW_FUSED: Candidate(ADAMW_FUSED, adamw),
        "AdamW fused + AWS flow, rms": Candidate(ADAMW_FUSED, bare, aws, {"measure": "rms"}),
        "AdamW fused + AWS flow, rms, every 8": Candidate(
            ADAMW_FUSED, bare, aws, {"measure": "rms", "every": 8}
        ),
    }
    try:
        import pytorch_optimizer as peers
    except ImportError:
        print("pytorch_optimizer is not installed: its optimizers are not timed.")
        return known
    adam: dict[str, Any] = {"lr": LR, "weight_decay": COEFFICIENT}
    known["peer SGDP"] = Candidate(SGD_FUSED, peers.SGDP(params, momentum=MOMENTUM, **adam))
    known["peer AdamP"] = Candidate(ADAMW_FUSED, peers.AdamP(params, **adam))
    known["peer AdamC"] = Candidate(ADAMW_FUSED, peers.AdamC(params, **adam))
    return known


def timed(candidate: Candidate, weights: list[nn.Parameter], device: str) -> float:
    """Return the seconds of one step, averaged over ``candidate.steps``; attaching is not timed."""
    decay = None
    if candidate.rule is not None:
        decay = nw.Decay(candidate.optimizer, candidate.rule, weights, **candidate.settings)
    start = now(device)
    for _ in range(candidate.steps):
        candidate.optimizer.step()
        if candidate.after is not None:
            candidate.after()
    seconds = (now(device) - start) / candidate.steps
    if decay is not None:
        decay.remove()
    return seconds


def bandwidth(params: list[nn.Parameter], device: str) -> float:
    """Return the bytes per second of reading and writing every parameter once."""
    start = now(device)
    for param in params:
        param.detach().mul_(1.0)
    return 8 * sum(p.numel() for p in params) / (now(device) - start)


if __name__ == "__main__":
    main()
