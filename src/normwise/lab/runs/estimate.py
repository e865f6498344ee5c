"""What a list of trainings takes on this machine, from a few measured steps of each kind."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from normwise.lab.data.catalog import load_images
from normwise.lab.data.datasets import Dataset
from normwise.lab.data.image_folder import ImageFolder
from normwise.lab.runs.devices import DEFAULT, Execution, device_named
from normwise.lab.runs.feeds import Feed, MemoryFeed
from normwise.lab.runs.memory import footprint
from normwise.lab.runs.network import Footing, NetworkRun
from normwise.lab.runs.text import TextRun

__all__ = ["Estimate", "estimate"]

_METRICS = 1.2  # a step of the language model with its share of metrics, in steps
_CHARACTERS = 100  # of a text, roughly; the memory hardly depends on it

# channels, height and width, classes, training images, test images
_SIZES = {
    "fashion-mnist": ((1, 28, 28), 10, 60_000, 10_000),
    "digits": ((1, 8, 8), 10, 1437, 360),
    "cifar10": ((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": ((3, 32, 32), 100, 50_000, 10_000),
}


@dataclass(frozen=True)
class Estimate:
    """What trainings take.

    Attributes:
        runs: Number of runs.
        steps: Training steps of all of them.
        seconds: Time of all of them, one after the other, with the evaluation after each epoch.
        seconds_per_step: Mean time of a training step.
        memory: Largest number of bytes that a step takes.
        by_run: Seconds of each run by its identity.
    """

    runs: int
    steps: int
    seconds: float
    seconds_per_step: float
    memory: float
    by_run: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, in hours and GiB where that is usual."""
        return {
            "runs": self.runs,
            "steps": self.steps,
            "seconds_per_step": round(self.seconds_per_step, 5),
            "hours": round(self.seconds / 3600, 3),
            "memory_gib": round(self.memory / 2**30, 3),
        }


@dataclass(frozen=True)
class _Cost:
    """What one run takes, with ``training`` and ``rest`` (evaluation and metrics) in seconds."""

    steps: int
    training: float
    rest: float
    memory: float


@dataclass(frozen=True)
class _Measured:
    step: float
    evaluation: float  # of one batch
    memory: float
    train_size: int
    test_size: int


@dataclass(frozen=True)
class _MeasuredText:
    step: float
    memory: float


def estimate(
    runs: Iterable[NetworkRun | TextRun],
    execution: Execution = DEFAULT,
    *,
    measured_steps: int = 3,
) -> Estimate:
    """Measure a few steps of each kind of run, on random images or on the text, and add up.

    Runs that differ in seed, rule, coefficients, rates or length only are of one kind. No data set of images
    is needed, except the folder of an "imagefolder"; the time to decode its pictures is not counted.

    Args:
        runs: The runs; duplicates count once.
        execution: The device, and how.
        measured_steps: Steps to measure, after two that are not.

    Raises:
        ValueError: As for ``NetworkRun.train``.

    Example:
        >>> run = NetworkRun(data="digits", fingerprint="", width=2, epochs=10, batch_size=16)
        >>> estimate([run, replace(run, seed=1)], Execution(device="cpu"), measured_steps=1).steps
        1780
    """
    networks: dict[NetworkRun, _Measured] = {}
    texts: dict[str, _MeasuredText] = {}
    costs: dict[str, _Cost] = {}
    for run in {run.identity: run for run in runs}.values():
        if isinstance(run, NetworkRun):
            run.check()
            kind = _kind_of_network(run)
            if kind not in networks:
                networks[kind] = _measured(kind, execution, measured_steps)
            costs[run.identity] = _network_cost(run, networks[kind])
        else:
            text = _kind_of_text(run)
            if text.identity not in texts:
                texts[text.identity] = _measured_text(text, execution, measured_steps)
            costs[run.identity] = _text_cost(run, texts[text.identity])
    return _sum(costs)


def _sum(costs: dict[str, _Cost]) -> Estimate:
    seconds = {identity: cost.training + cost.rest for identity, cost in costs.items()}
    steps = sum(cost.steps for cost in costs.values())
    training = sum(cost.training for cost in costs.values())
    memory = max((cost.memory for cost in costs.values()), default=0.0)
    return Estimate(len(costs), steps, sum(seconds.values()), training / max(1, steps), memory, seconds)


def _kind_of_network(run: NetworkRun) -> NetworkRun:
    return replace(
        run,
        seed=0,
        rule="none",
        lr=0.01,
        init_scale=1.0,
        coefficient=0.0,
        fingerprint="",
        train_size=0,
        validation_size=0,
        epochs=1,
        evaluate_every=1,
        drops=(),
        schedule="cosine",
    )


def _network_cost(run: NetworkRun, found: _Measured) -> _Cost:
    train_size = run.train_size or found.train_size - run.validation_size
    steps = run.steps(train_size)
    held_out = run.validation_size or found.test_size
    evaluated = held_out * -(-run.epochs // run.evaluate_every) + min(train_size, 10_000)
    evaluated += found.test_size if run.validation_size else 0
    rest = evaluated / run.batch_size * found.evaluation
    return _Cost(steps, steps * found.step, rest, found.memory)


def _kind_of_text(run: TextRun) -> TextRun:
    """Return a run whose steps cost the same: without decay, and with one sequence to evaluate."""
    return replace(
        run,
        seed=0,
        rule=None,
        start="as is",
        decayed="nothing",
        lr=1e-3,
        scaled="",
        init_scale=1.0,
        frozen="",
        length=1,
        warmup=1,
        measured=1,
    )


def _text_cost(run: TextRun, found: _MeasuredText) -> _Cost:
    """Return the cost: each step has its share of the metrics, and the run an evaluation at its end."""
    training = run.steps * found.step
    rest = (_METRICS - 1.0) * training + 2 * run.measured / run.batch_size / 3 * found.step
    return _Cost(run.steps, training, rest, found.memory)


def _measured_text(run: TextRun, execution: Execution, measured_steps: int) -> _MeasuredText:
    device = device_named(execution.device)
    times = []
    for length in (1, 1, 1 + measured_steps):  # the first loads the text
        replace(run, length=length).run_in(None, execution, lambda line: None)
        times.append(_now(device))
    step = max(0.0, times[2] - 2 * times[1] + times[0]) / measured_steps
    if device.type == "cuda":
        return _MeasuredText(step, float(torch.cuda.max_memory_allocated(device)))
    with torch.device("meta"):
        model = run.build(_CHARACTERS)
    found = footprint(model, (run.context,), buffers=2, dtype=torch.long)
    return _MeasuredText(step, found.bytes_for(run.batch_size))


def _measured(run: NetworkRun, execution: Execution, measured_steps: int) -> _Measured:
    if run.data in _SIZES:
        shape, classes, train_size, test_size = _SIZES[run.data]
    else:
        data = load_images(run.data, offline=True)
        assert isinstance(data, ImageFolder)
        shape, classes = (3, run.image_size, run.image_size), len(data.classes)
        train_size, test_size = len(data.train[1]), len(data.test[1])
    images = torch.randint(0, 256, (run.batch_size, *shape), dtype=torch.uint8)
    labels = torch.arange(run.batch_size) % classes
    names = tuple(map(str, range(classes)))
    random = Dataset(run.data, images, labels, images, labels, names, "")

    def supply(*, device: torch.device, room: float, rank: int, world: int) -> Feed:
        return MemoryFeed(
            random,
            augment=run.augment,
            device=device,
            batch_size=run.batch_size,
            seed=0,
            rank=rank,
            world=world,
        )

    with Footing(run, execution, supply) as footing:
        network, optimizer = footing.prepared(execution, 1.0)
        forward, stepper = footing.wrapped(network, optimizer, execution)
        times: list[float] = []
        for epoch in range(2 + measured_steps):
            for x, y in footing.feed.training(epoch):
                if execution.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                stepper.zero_grad()
                footing.fabric.backward(cross_entropy(forward(x), y))
                stepper.step()
            times.append(_now(footing.device))
        network.eval()
        with torch.no_grad(), footing.fabric.autocast():
            network(x)
            begin = _now(footing.device)
            network(x)
            evaluation = _now(footing.device) - begin
        memory = footing.footprint.bytes_for(run.batch_size // footing.fabric.world_size)
        if footing.device.type == "cuda":
            memory = float(torch.cuda.max_memory_allocated(footing.device))
    return _Measured((times[-1] - times[1]) / measured_steps, evaluation, memory, train_size, test_size)


def _now(device: torch.device) -> float:
    """Return the time in seconds; of one thread on a CPU its own, so that other work does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()
