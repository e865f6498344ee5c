"""What a Monitor costs in a training step of ResNet-50 and GPT-2 small.

    python -m benchmarks.monitor [--network resnet50|gpt2-small] [--every 50] [--rounds N] [--out FILE.md]

The training step is real: forward pass, backward pass and optimizer on random data. An observed step and a
step between are timed as the optimizer takes them (`optimizer.step()` with a Monitor beside one without), in
turns, and the cost per training step is (observed + (every − 1)·between)/every. Memory: the largest number of
bytes that a Monitor holds beyond those between steps (torch's allocator on CUDA; the copies on a CPU).
On a CPU one thread runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        layers: list[nn.Module] = []
        for before, after, kernel, step in sizes:
            layers += [nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
        self.body = nn.Sequential(*layers[:-1])
        self.skip: nn.Module = nn.Identity()
        if inputs != 4 * width or stride > 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return F.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class GPTBlock(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after this block."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.packed(self.first(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        stream: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return stream


class GPT2(nn.Module):
    """GPT-2 small: 124 million parameters, the head tied to the embedding."""

    def __init__(
        self, width: int = 768, depth: int = 12, characters: int = 50257, context: int = 1024
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


class Network(NamedTuple):
    """A network, its data and its optimizer."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    optimizer: Callable[..., Optimizer]
    what: str


def _images(device: torch.device) -> tuple[Tensor, Tensor]:
    count = 64 if device.type == "cuda" else 8
    return torch.randn(count, 3, 224, 224, device=device), torch.randint(0, 1000, (count,), device=device)


def _text(device: torch.device) -> tuple[Tensor, Tensor]:
    count, length = (8, 1024) if device.type == "cuda" else (1, 512)
    ids = torch.randint(0, 50257, (count, length + 1), device=device)
    return ids[:, :-1], ids[:, 1:].flatten()


NETWORKS = {
    "resnet50": Network(resnet50, _images, lambda p: SGD(p, lr=0.01, momentum=0.9), "images of 224×224"),
    "gpt2-small": Network(GPT2, _text, lambda p: AdamW(p, lr=1e-4), "tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    lines = [
        "# What the monitor costs",
        "",
        f"`python -m benchmarks.monitor --rounds {arguments.rounds}`: {name}, torch {torch.__version__}, "
        f"every={arguments.every}, with the JSONL tracker; medians.",
        "",
        "| network | batch | training step, ms | observed step adds, ms | a step between adds, µs "
        "| per training step | copies / weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in arguments.network or NETWORKS:
        lines.append(_row(network, device, arguments.every, arguments.rounds))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _row(name: str, device: torch.device, every: int, rounds: int) -> str:
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build().to(device)
    x, y = network.batch(device)
    optimizer = network.optimizer(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        out = model(x)
        F.cross_entropy(out.flatten(0, -2), y).backward()
        optimizer.step()

    train()
    training = _median([_time(train, device) for _ in range(rounds)])
    with tempfile.TemporaryDirectory() as folder:
        plain = network.optimizer(model.parameters())
        tracker = nw.trackers.JSONL(folder)
        monitor = nw.Monitor(optimizer, model=model, every=10**9, trackers=tracker)
        optimizer.step()  # the first step is observed, and measures the optimizer
        plain.step()
        between, observed = [], []
        for _ in range(rounds):
            for _ in range(3):
                between.append(_time(optimizer.step, device) - _time(plain.step, device))
            monitor.every = monitor.steps + 1  # the next step is observed
            observed.append(_time(optimizer.step, device) - _time(plain.step, device))
            monitor.every = 10**9
        hooks = _hooks_alone(monitor)
        memory = _memory(monitor, optimizer, device)
        monitor.remove()
    weights = sum(
        p.numel() * p.element_size() for layer in monitor._watched.layers for p in layer.unit.params
    )
    share = (_median(observed) + (every - 1) * hooks) / every / training
    batch = f"{len(x)} {network.what}" if name == "resnet50" else f"{x.numel()} {network.what}"
    return (
        f"| {name} | {batch} | {1e3 * training:.0f} | {1e3 * _median(observed):.1f} | {1e6 * hooks:.1f} | "
        f"{share:.2%} | {memory / weights:.2f} |"
    )


def _hooks_alone(monitor: nw.Monitor) -> float:
    """Seconds that the two hooks take in a step that is not observed: too few to see beside a step."""
    watch, optimizer = monitor._watches[0], monitor.optimizers[0]
    begin = time.perf_counter()
    for _ in range(1000):
        watch._before_step(optimizer, (optimizer,), {})
        watch._after_step()
    return (time.perf_counter() - begin) / 1000


def _memory(monitor: nw.Monitor, optimizer: Optimizer, device: torch.device) -> float:
    """Bytes that a Monitor holds in an observed step beyond what the optimizer's own step needs."""
    watch = monitor._watches[0]
    if device.type != "cuda":
        watch._look()
        copies = [weight for found in (watch._before or {}).values() for weight, _ in found]
        held = sum(weight.numel() * weight.element_size() for weight in copies)
        watch._before = None
        return float(held)
    peaks = []
    for is_observed in (False, True):
        monitor.every = monitor.steps + 1 if is_observed else 10**9
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return float(peaks[1] - peaks[0])


def _time(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
