"""Small trainings that are healthy, and what can be planted into them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tests.monitor.common import Kept
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw
from normwise.lab.models.gpt import GPT

STEPS = 150


class Block(nn.Module):
    """Two normalised convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [
            (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)) for _ in "ab"
        ]
        self.body = nn.Sequential(*layers[0], nn.ReLU(), *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Task:
    """A model, its loss on random batches, and its optimizer."""

    def __init__(self, model: Any, batch: Callable[[], tuple[Tensor, Tensor]], loss: Any) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        with torch.random.fork_rng():
            self.plan = nw.plan(model, [batch()[0]], progress=False)


def resnet() -> Task:
    torch.manual_seed(0)
    stem = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    tail = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    model = nn.Sequential(*stem, Block(8), Block(8), *tail)
    patterns = torch.randn(5, 1, 8, 8)

    def batch() -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 5, (32,))
        return patterns[labels] + torch.randn(32, 1, 8, 8), labels

    return Task(model, batch, F.cross_entropy)


def gpt() -> Task:
    torch.manual_seed(0)
    text = inspect.getsource(nn.Linear)
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    model = GPT(len(characters), width=32, heads=2, depth=2, context=16)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.stack([data[i : i + 17] for i in torch.randint(0, len(data) - 17, (16,)).tolist()])
        return rows[:, :-1], rows[:, 1:]

    return Task(model, batch, lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten()))


def vocoder() -> Task:
    """Weight-normalised convolutions over time, without any other normalisation."""
    torch.manual_seed(0)

    def layer(before: int, after: int) -> nn.Module:
        return nw.weight_norm(nn.Conv1d(before, after, 5, padding=2))

    model = nn.Sequential(
        layer(1, 16),
        nn.LeakyReLU(0.1),
        layer(16, 16),
        nn.LeakyReLU(0.1),
        layer(16, 16),
        nn.LeakyReLU(0.1),
        layer(16, 1),
    )

    def batch() -> tuple[Tensor, Tensor]:
        time = torch.linspace(0, 6.28, 64)
        x = torch.sin(time * (1 + 4 * torch.rand(16, 1, 1))) + 0.1 * torch.randn(16, 1, 64)
        return x, torch.tanh(3 * x.roll(2, -1))

    return Task(model, batch, F.mse_loss)


TASKS: dict[str, Callable[[], Task]] = {"resnet": resnet, "gpt": gpt, "vocoder": vocoder}


def optimizer_of(name: str, task: Task, **settings: Any) -> Optimizer:
    if name == "gpt":
        return AdamW(task.plan.param_groups(weight_decay=0.01), **{"lr": 3e-3, **settings})
    return SGD(task.plan.param_groups(weight_decay=5e-4), **{"lr": 0.05, "momentum": 0.9, **settings})


def run(
    task: Task,
    optimizer: Optimizer,
    scheduler: Any = None,
    steps: int = STEPS,
    every: int = 5,
    at: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> tuple[nw.Monitor, Kept]:
    """Train, and return the monitor and what it found. ``at(step)`` is called before each step."""
    tracker = Kept()
    given = {"plan": task.plan, "total_steps": steps, "scheduler": scheduler, **settings}
    monitor = nw.Monitor(optimizer, **given, every=every, trackers=tracker)
    torch.manual_seed(1)
    for step in range(steps):
        at(step)
        x, y = task.batch()
        loss = task.loss(task.model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        monitor.record(loss=loss)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return monitor, tracker


def kinds(tracker: Kept) -> set[str]:
    return {finding.kind for finding in tracker.findings}


def batches(task: Task, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    return (task.batch() for _ in range(count))
