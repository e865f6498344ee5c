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
from normwise.lab.runs.network import Footing, NetworkRun
from normwise.lab.runs.text import TextRun

__all__ = ["Estimate", "estimate", "text_seconds"]

_METRICS = 1.2  # a step of the language model with its share of metrics, in steps

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
class _Measured:
    step: float
    evaluation: float  # of one batch
    memory: float
    train_size: int
    test_size: int


def estimate(
    runs: Iterable[NetworkRun],
    execution: Execution = DEFAULT,
    *,
    measured_steps: int = 3,
) -> Estimate:
    """Measure a few steps of each kind of run on random images, and add up.

    Runs that differ in seed, rule, coefficients, rates or length only are of one kind. No data set is needed,
    except the folder of an "imagefolder"; the time to decode its pictures is not counted.

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
    measured: dict[NetworkRun, _Measured] = {}
    steps, training, memory = 0, 0.0, 0.0
    seconds: dict[str, float] = {}
    distinct = list({run.identity: run for run in runs}.values())
    for run in distinct:
        run.check()
        kind = replace(
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
        if kind not in measured:
            measured[kind] = _measured(kind, execution, measured_steps)
        found = measured[kind]
        train_size = run.train_size or found.train_size - run.validation_size
        own = run.steps(train_size)
        held_out = run.validation_size or found.test_size
        evaluated = held_out * -(-run.epochs // run.evaluate_every) + min(train_size, 10_000)
        evaluated += found.test_size if run.validation_size else 0
        steps += own
        seconds[run.identity] = own * found.step + evaluated / run.batch_size * found.evaluation
        memory = max(memory, found.memory)
        training += own * found.step
    every = sum(seconds.values())
    return Estimate(len(distinct), steps, every, training / max(1, steps), memory, seconds)


def text_seconds(run: TextRun, execution: Execution, measured_steps: int = 3) -> float:
    """Return the seconds of a run of the language model, from a few steps without decay.

    To each step comes a share for the metrics, and to the whole the evaluation at the end.
    """
    few = replace(run, rule=None, start="as is", decayed="nothing", warmup=1, measured=1)
    device = device_named(execution.device)
    times = []
    for length in (1, 1, 1 + measured_steps):  # the first loads the text
        replace(few, length=length).run_in(None, execution, lambda line: None)
        times.append(_now(device))
    step = (times[2] - 2 * times[1] + times[0]) / measured_steps
    return step * (run.length * _METRICS + 2 * run.measured / run.batch_size / 3)


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
