"""Training with DDP, fully_shard, tensor parallelism and ZeRO, beside training in one process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.distributed.comparison import assert_same_on_all_ranks, each_extent, whole
from tests.distributed.models import BATCHES, network, train, units_of
from tests.distributed.world import World, needs_fully_shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

pytestmark = pytest.mark.one_in(2)  # of two numbers of ranks

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD foreach": functools.partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": functools.partial(AdamW, lr=0.05, weight_decay=0.0),
    "AdamW fused": functools.partial(AdamW, lr=0.05, weight_decay=0.0, fused=True),
}
RULE = nw.AdaptiveWeightShrink(0.5)
MODES = ("flow", "explicit", "coupled")


def cells(full: bool, turn: int = 0) -> list[tuple[str, str]]:
    """Every optimizer with every mode, or each with one mode."""
    return [
        (name, mode)
        for (i, name), (j, mode) in itertools.product(enumerate(OPTIMIZERS), enumerate(MODES))
        if full or (i + j) % len(MODES) == turn
    ]


def trained(
    model: nn.Module, build: Callable[..., Optimizer], clip: float | None = None, **settings: Any
) -> list[torch.Tensor]:
    optimizer = build(model.parameters())
    decay = nw.Decay(optimizer, RULE, units_of(model), **settings)
    train(model, optimizer, BATCHES, clip)
    decay.flush()
    return [whole(param) for param in model.parameters()]


def compare(
    wrap: Callable[[nn.Module], nn.Module],
    build: Callable[..., Optimizer],
    what: str,
    tolerance: float = 2e-5,
    alone: Callable[..., Optimizer] | None = None,
    **settings: Any,
) -> None:
    """All ranks see the same batches, so the mean of their gradients is that of one process."""
    expected = trained(network(), alone or build, **settings)
    actual = trained(wrap(network()), build, **settings)
    assert_same_on_all_ranks(actual, what)
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            tensor, other, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
        )


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    fully_shard(model[2], **settings)  # type: ignore[index]
    fully_shard(model, **settings)
    return model


def fsdp(full: bool) -> None:
    for name, mode in cells(full):
        compare(sharded, OPTIMIZERS[name], f"{name}, {mode}", mode=mode)
    compare(sharded, OPTIMIZERS["AdamW"], "clipped", clip=0.1)
    compare(sharded, OPTIMIZERS["SGD foreach"], "rms", measure="rms")
    compare(sharded, OPTIMIZERS["AdamW"], "every 3, and a flush after 8 steps", every=3)
    offload = functools.partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    for mode in MODES if full else ("coupled",):
        compare(offload, OPTIMIZERS["AdamW"], f"offloaded, {mode}", mode=mode)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    compare(functools.partial(sharded, mp_policy=policy), OPTIMIZERS["SGD foreach"], "mixed", tolerance=0.05)


def from_meta() -> None:
    """A plan made before sharding, on a network that is initialised after it."""
    model = network()
    plan = nw.plan(model, BATCHES[:1], progress=False)
    with torch.device("meta"):
        other = network()
    sharded(other).to_empty(device="cpu")
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, param in other.named_parameters():
            assert isinstance(param, DTensor)
            local = param.to_local()
            part = torch.chunk(values[name], param.device_mesh.size())
            rank = param.device_mesh.get_local_rank()
            local.copy_(part[rank]) if rank < len(part) else None
    results = []
    for net in (model, other):
        applied = plan.apply_to(net)
        optimizer = SGD(applied.param_groups(), lr=0.1, momentum=0.9)
        applied.attach(optimizer, total_steps=5)
        train(net, optimizer, BATCHES)
        results.append([whole(param) for param in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)
    assert_same_on_all_ranks(results[1], "from meta")


def started() -> None:
    """Starting in equilibrium gives the same norms and weights as in one process, from any scale."""
    plan = nw.plan(network(), BATCHES[:1], progress=False)
    for name, build in OPTIMIZERS.items():
        results = []
        for wrap in (lambda model: model, sharded, DistributedDataParallel):
            model = network()
            with torch.no_grad():
                model[2].weight.mul_(1e3)  # type: ignore[operator]
            wrapped = wrap(model)
            applied = plan.apply_to(wrapped)
            optimizer = build(applied.param_groups())
            decay = applied.attach(optimizer, total_steps=8)
            assert isinstance(decay, nw.Decay)
            assert decay.start is not None
            train(wrapped, optimizer, BATCHES[:3])
            results.append([whole(param) for param in model.parameters()])
            placed = [bool(readings) for readings in decay.start.readings]
            assert all(placed), name
        for other in results[1:]:
            assert_same_on_all_ranks(other, f"started, {name}")
            torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-4, msg=name)


def tensor_parallel(*sizes: int) -> None:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "model")[-len(sizes) :])

    def wrap(model: nn.Module) -> nn.Module:
        layers = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["model"], layers)
        return sharded(model, mesh=mesh["data"]) if len(sizes) > 1 else model

    for mode in MODES:
        for name in ("SGD foreach", "AdamW"):
            compare_plain(wrap, OPTIMIZERS[name], f"{sizes}, {name}, {mode}", mode=mode)


def plain_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7, bias=False))


def compare_plain(
    wrap: Callable[[nn.Module], nn.Module], build: Callable[..., Optimizer], what: str, mode: str
) -> None:
    results = []
    for model in (plain_network(), wrap(plain_network())):
        optimizer = (
            build(model.parameters(), foreach=False)
            if "foreach" not in str(build)
            else build(model.parameters())
        )
        nw.Decay(optimizer, RULE, [model[0].weight, model[2].weight], mode=mode)  # type: ignore[index]
        train(model, optimizer, BATCHES)
        results.append([whole(param) for param in model.parameters()])
    assert_same_on_all_ranks(results[1], what)
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)


def ddp(full: bool) -> None:
    for name, mode in cells(full, 1):
        compare(DistributedDataParallel, OPTIMIZERS[name], f"{name}, {mode}", mode=mode)


def zero() -> None:
    from torch.distributed.optim import (
        ZeroRedundancyOptimizer,
    )  # warns on import that torch.jit is deprecated

    for mode in MODES:
        build = functools.partial(ZeroRedundancyOptimizer, optimizer_class=SGD, lr=0.1, momentum=0.9)
        alone = functools.partial(SGD, lr=0.1, momentum=0.9)
        compare(DistributedDataParallel, build, f"ZeRO, {mode}", mode=mode, alone=alone)


@each_extent
@needs_fully_shard
def test_fully_shard(world: World, full: bool) -> None:
    world.run(fsdp, full)


@needs_fully_shard
def test_plan_and_meta_device(world: World) -> None:
    world.run(from_meta)


@needs_fully_shard
def test_start_in_equilibrium(world: World) -> None:
    world.run(started)


def test_tensor_parallel(world: World) -> None:
    world.run(tensor_parallel, world.size)


@needs_fully_shard
def test_fully_shard_over_tensor_parallel(four: World) -> None:
    four.run(tensor_parallel, 2, 2)


@each_extent
def test_ddp(world: World, full: bool) -> None:
    world.run(ddp, full)


def test_zero_redundancy_optimizer(world: World) -> None:
    world.run(zero)
