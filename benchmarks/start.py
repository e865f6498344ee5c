"""The start in equilibrium: whether norms stay where they are placed, what placing costs, and warm-up.

    python -m benchmarks.start [--out FILE.md]

Norms: a perceptron with batch norm learns noisy labels at a constant rate under each optimizer, from
weights of a thousandth of the usual norm. A weight that starts in equilibrium should stay near its norm.
The table gives the root mean square of the norms of both layers over the second half of training, over
those at the start. Under SGD the gradient scale γ falls to 0.43 and 0.35 of its first value here, and norms
follow as γ^(2/5): 0.71, 0.65.

Cost: the time from before the first step to after it, with and without a start, on the parameters of a GPT-2
small, and the time to measure the optimizer.

Warm-up: the claim no-tuning found that runs without batch norm may diverge at the largest rate when they
start in equilibrium. The same runs, with the learning rate growing linearly over the first tenth.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarks.shapes import gpt2_small
from benchmarks.timing import machine
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

import normwise as nw
from normwise.lab.claims.budget import Budget
from normwise.lab.claims.no_tuning import SCALES, SETUPS, Cell
from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.data.datasets import load
from normwise.lab.runs.arms import AWS, from_equilibrium, with_arm
from normwise.lab.runs.train import TrainRun
from normwise.planning.stepping import stepping_of

STEPS = 1000
SEEDS = range(5)
WITHOUT_BATCH_NORM = "weight standardisation without batch norm, SGD"


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    described = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    lines = ["# The start in equilibrium", "", f"`python -m benchmarks.start`. {described}.", ""]
    for table in (norms, cost, warm_up):
        lines += [*table(), ""]
        print("\n".join(lines[-30:]), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")


# -- norms ---------------------------------------------------------------------------------------------------


def optimizers() -> dict[str, Callable[[Any], Optimizer]]:
    """Return optimizers by name; those of pytorch_optimizer where it is installed."""
    known: dict[str, Callable[[Any], Optimizer]] = {
        "SGD": lambda p: SGD(p, lr=0.05),
        "SGD, momentum 0.9": lambda p: SGD(p, lr=0.02, momentum=0.9),
        "SGD, Nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
        "AdamW": lambda p: AdamW(p, lr=2e-3, weight_decay=0),
        "Adam, β₁ 0.5": lambda p: Adam(p, lr=2e-3, betas=(0.5, 0.99)),
        "NAdam": lambda p: NAdam(p, lr=2e-3),
        "RMSprop": lambda p: RMSprop(p, lr=2e-3),
        "Muon": lambda p: Muon(p, lr=5e-3, weight_decay=0),
        "Muon, match_rms_adamw": lambda p: Muon(p, lr=2e-3, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        "torch's Adafactor": lambda p: torch.optim.Adafactor(p),
        "Adagrad": lambda p: torch.optim.Adagrad(p),
        "RAdam": lambda p: torch.optim.RAdam(p),
    }
    try:
        import pytorch_optimizer as peers
    except ImportError:
        return known
    plain = {"weight_decay": 0.0}
    known |= {
        "Lion": lambda p: peers.Lion(p, lr=5e-4, **plain),
        "SOAP": lambda p: peers.SOAP(p, lr=2e-3, **plain),
        "Adan": lambda p: peers.Adan(p, lr=2e-3, **plain),
        "AdEMAMix": lambda p: peers.AdEMAMix(p, lr=1e-3, **plain),
        "LAMB": lambda p: peers.Lamb(p, lr=2e-3, **plain),
        "LARS": lambda p: peers.LARS(p, lr=0.1, **plain),
        "Prodigy": lambda p: peers.Prodigy(p, **plain),
        "ScheduleFreeAdamW": lambda p: peers.ScheduleFreeAdamW(p, lr=2e-3, **plain),
    }
    return known


def norms() -> list[str]:
    """Return a table of measured over predicted norms."""
    lines = ["| optimizer | D per element | norm in training / norm at the start |", "|---|---|---|"]
    for name, make in optimizers().items():
        weights, batches, loss = problem()
        optimizer = make(weights)
        try:
            nw.attach(optimizer, weights, total_steps=STEPS)
        except ValueError as error:
            lines.append(f"| {name} | | refused: {str(error).split(': give')[0]} |")
            continue
        found = stepping_of(optimizer)
        assert not isinstance(found, str)
        started: list[Tensor] = []
        handle = optimizer.register_step_post_hook(lambda *_: started.append(norms_of(weights)))  # noqa: B023
        if hasattr(optimizer, "train"):
            optimizer.train()
        for batch in batches:
            optimizer.zero_grad()
            loss(weights, batch).backward()
            optimizer.step()
        handle.remove()
        first = 16 if found.grows_with_gradient else 0
        later = torch.stack(started[STEPS // 2 :]).square().mean(0).sqrt()
        ratios = (later / started[first]).tolist()
        per_element = f"{found.per_element:.3g}" if found.per_element == found.per_element else "by shape"
        lines.append(f"| {name} | {per_element} | {' and '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return lines


def norms_of(weights: list[nn.Parameter]) -> Tensor:
    """Return the norm of each tensor."""
    return torch.stack([w.detach().norm() for w in weights])


def problem() -> tuple[list[nn.Parameter], list[tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Return the two scale-invariant layers of a perceptron, batches with noisy labels, and the loss."""
    torch.manual_seed(0)
    weights = [nn.Parameter(1e-3 * torch.randn(64, n) / n**0.5) for n in (32, 64)]
    teacher, head = torch.randn(10, 32), torch.randn(10, 64) / 8
    batches = []
    for _ in range(STEPS):
        x = torch.randn(64, 32)
        labels = (x @ teacher.T).argmax(1)
        noisy = torch.rand(64) < 0.3
        batches.append((x, torch.where(noisy, torch.randint(10, (64,)), labels)))

    def loss(weights: list[nn.Parameter], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        for weight in weights:
            z = x @ weight.T
            x = ((z - z.mean(0)) / z.var(0, unbiased=False).add(1e-20).sqrt()).relu()
        return nn.functional.cross_entropy(4 * x @ head.T, y)

    return weights, batches, loss


# -- cost ----------------------------------------------------------------------------------------------------


def cost() -> list[str]:
    """Return a table of the seconds of a first step, and of measuring the optimizer, in fresh processes."""
    lines = ["| optimizer, GPT-2 small | measuring | first step | first step with a start | more memory |"]
    lines.append("|---|---|---|---|---|")
    for name in ("SGD, momentum 0.9", "AdamW"):
        rounds: list[list[tuple[float, float, float]]] = []
        for _ in range(3):
            with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
                rounds.append([pool.submit(first_step, name, starts).result() for starts in (False, True)])
        (_, plain, memory), (measuring, started, more) = (
            [statistics.median(values) for values in zip(*some, strict=True)]
            for some in zip(*rounds, strict=True)
        )
        lines.append(
            f"| {name} | {measuring:.1f} s | {plain:.2f} s | {started:.2f} s | {more - memory:.0f} MB |"
        )
    return lines


def first_step(name: str, starts: bool) -> tuple[float, float, float]:
    """Return the seconds of measuring the optimizer and of the first step, and the peak memory in MB."""
    torch.set_num_threads(1)
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in gpt2_small()]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    optimizer = optimizers()[name](params)
    begin = time.perf_counter()
    if starts:
        nw.attach(optimizer, [p for p in params if p.ndim > 1], total_steps=1000)
    measured = time.perf_counter()
    optimizer.step()
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return measured - begin, done - measured, peak


# -- warm-up -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WarmRun(TrainRun):
    """A training run whose learning rate grows linearly over a first share of the steps."""

    warmup: float = 0.0

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return super().lr_at(step) * min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))


def warm_up() -> list[str]:
    """Return a table of accuracies at the largest rate, and of how many seeds finished."""
    budget = Budget.of("full", "fashion-mnist", load("fashion-mnist").fingerprint)
    lines = ["| no batch norm, lr × 4 | warm-up | AWS from equilibrium | AWS from the norms as they are |"]
    lines.append("|---|---|---|---|")
    for scale in SCALES:
        plain = SETUPS[WITHOUT_BATCH_NORM].run(budget, Cell(4.0, scale))
        for share in (0.0, 0.1):
            warm = WarmRun(**{**vars(plain), "warmup": share})
            cells = [score(from_equilibrium(warm)), score(with_arm(warm, AWS))]
            lines.append(f"| norm {scale:g} | {100 * share:.0f} % | {' | '.join(cells)} |")
    return lines


def score(run: TrainRun) -> str:
    """Return the mean test accuracy; guessing for runs that do not finish."""
    summaries = [replace(run, seed=seed).run(lambda line: None) for seed in SEEDS]
    finished = [s["test_accuracy"] for s in summaries if s["status"] == "finished"]
    values = [100 * a for a in finished] + [10.0] * (len(summaries) - len(finished))
    return f"{mean_with_interval(values)} ({len(finished)} of {len(summaries)} finished)"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
