"""A Monitor has the numbers of one process on every rank, and communicates once in an observed step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import BATCHES, network, train, units_of
from tests.distributed.world import World, needs_fully_shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

pytestmark = pytest.mark.one_in(2)  # of two numbers of ranks

BUILDS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": functools.partial(AdamW, lr=0.05, weight_decay=0.01),
}


class Kept:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def finding(self, finding: object) -> None:
        pass


def rows_of(model: nn.Module, units: list[nw.Unit], build: Callable[..., Optimizer]) -> tuple[Any, int]:
    optimizer = build(model.parameters())
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.5), units) if "SGD" in str(build) else None
    tracker = Kept()
    monitor = nw.Monitor(optimizer, units=units, every=3, trackers=tracker, per_unit="*")
    seen = []
    for batch in BATCHES:
        train(model, optimizer, [batch])
        assert monitor.last is not None
        seen.append(monitor.last.values(monitor.layers))
    return seen, len(tracker.rows)


def compare(wrap: Callable[[nn.Module], nn.Module], make: Any, units: Any) -> None:
    for name, build in BUILDS.items():
        alone = make()
        expected, _ = rows_of(alone, units(alone), build)
        model = wrap(make())
        actual, written = rows_of(model, units(model), build)
        assert written == (3 if dist.get_rank() == 0 else 0)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, [list(row.items()) for row in actual])
        assert all(theirs == gathered[0] for theirs in gathered), f"{name}: ranks differ"
        for row, reference in zip(actual, expected, strict=True):
            assert list(row.values()) == pytest.approx(list(reference.values()), rel=5e-4, abs=1e-6), name


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model[2])  # type: ignore[index]
    fully_shard(model)
    return model


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7, bias=False))


def both(model: nn.Module) -> list[nw.Unit]:
    return [nw.Unit(model[0].weight, 0), nw.Unit(model[2].weight, None)]  # type: ignore[index]


def ddp() -> None:
    compare(DistributedDataParallel, network, units_of)


def fsdp() -> None:
    compare(sharded, network, units_of)


def tensor_parallel(*sizes: int) -> None:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "model")[-len(sizes) :])

    def wrap(model: nn.Module) -> nn.Module:
        parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if len(sizes) > 1:
            fully_shard(model[2], mesh=mesh["data"])  # type: ignore[index]
            fully_shard(model, mesh=mesh["data"])
        return model

    for build in BUILDS.values():
        alone = plain()
        expected, _ = rows_of(alone, both(alone), functools.partial(build, foreach=False))
        model = wrap(plain())
        actual, _ = rows_of(model, both(model), functools.partial(build, foreach=False))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, [list(row.items()) for row in actual])
        assert all(theirs == gathered[0] for theirs in gathered)
        for row, reference in zip(actual, expected, strict=True):
            assert list(row.values()) == pytest.approx(list(reference.values()), rel=5e-4, abs=1e-6)


def one_reduction() -> None:
    model = sharded(network())
    optimizer = SGD(model.parameters(), lr=0.1)
    nw.Monitor(optimizer, units=units_of(model), every=2)
    counts = []
    for batch in BATCHES[:4]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        with CommDebugMode() as communication:
            optimizer.step()
        counts.append(sum(communication.get_comm_counts().values()))
    assert counts == [1, 1, 0, 1]


def test_ddp(world: World) -> None:
    world.run(ddp)


@needs_fully_shard
def test_fully_shard(world: World) -> None:
    world.run(fsdp)


@needs_fully_shard
def test_one_reduction_in_an_observed_step_and_none_between(world: World) -> None:
    world.run(one_reduction)


def test_tensor_parallel(world: World) -> None:
    world.run(tensor_parallel, world.size)


@needs_fully_shard
def test_fully_shard_over_tensor_parallel(four: World) -> None:
    four.run(tensor_parallel, 2, 2)
