"""Errors: the same on every rank, with the parameter and the remedy, and nobody waits for ever."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.comparison import S0, S1, mesh_of, sharded
from tests.distributed.models import BATCHES, network, train, units_of
from tests.distributed.world import World, needs_fully_shard
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import normwise as nw
from normwise.sharding import local_tensor

RULE = nw.AdaptiveWeightShrink(0.1)


def message_of(function: Callable[[], object]) -> str:
    """Return the error that a function raises, after all ranks have met again."""
    try:
        function()
        message = "nothing was raised"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    dist.barrier()
    return message


def optimizer_of(*placements: Placement) -> tuple[nn.Parameter, SGD]:
    mesh = mesh_of(dist.get_world_size())
    param = sharded(torch.arange(1.0, 21).view(5, 4), mesh, placements)
    param.grad = sharded(torch.ones(5, 4), mesh, placements).detach()
    return param, SGD([("weight", param)], lr=0.1)


def too_strong() -> str:
    """Only the last row is too long, which the last rank holds."""
    param, optimizer = optimizer_of(S0)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), param, mode="explicit")
    before = local_tensor(param).clone()
    message = message_of(optimizer.step)
    assert torch.equal(local_tensor(param), before)
    return message


def not_finite() -> str:
    param, optimizer = optimizer_of(S0)
    with torch.no_grad():
        if dist.get_rank() == 0:
            local_tensor(param)[1, 0] = torch.nan
    nw.Decay(optimizer, RULE, param, nonfinite="raise")
    return message_of(optimizer.step)


def other_rules() -> str:
    param, optimizer = optimizer_of(S0)
    return message_of(lambda: nw.Decay(optimizer, nw.L2(0.1 * (1 + dist.get_rank())), param))


def wrong_on_one_rank() -> str:
    param, optimizer = optimizer_of(S1)
    return message_of(
        lambda: nw.Decay(optimizer, RULE, param, mode="none" if dist.get_rank() == 1 else "flow")
    )


def unknown_values() -> str:
    mesh = mesh_of(dist.get_world_size())
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    return message_of(lambda: nw.Decay(SGD([param], lr=0.1), RULE, param))


def cut(setting: str) -> str:
    param, optimizer = optimizer_of(S1)
    rules = {
        "compensated": RULE,
        "rotate": nw.RotatingSphere(1.0),
        "std": nw.PublishedEpsilonShift(0.1),
    }
    mode = "coupled" if setting == "std" else "flow"
    return message_of(
        lambda: nw.Decay(optimizer, rules[setting], param, mode=mode, compensated=setting == "compensated")
    )


def sharded_afterwards() -> str:
    model = network()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    nw.Decay(optimizer, RULE, units_of(model))
    fully_shard(model)
    return message_of(lambda: train(model, optimizer, BATCHES[:1]))


def replaced_in_the_optimizer() -> str:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    nw.Decay(optimizer, RULE, units_of(model))
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return message_of(lambda: train(model, optimizer, BATCHES[:1]))


def not_in_the_optimizer() -> str:
    model = network()
    units = units_of(model)
    fully_shard(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    return message_of(lambda: nw.Decay(optimizer, RULE, units))


def flattened(original: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = SGD(model.parameters(), lr=0.1)
    return message_of(lambda: nw.Decay(optimizer, RULE, next(model.parameters()), dim=None))


def overlapping() -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, overlap_with_ddp=True, lr=0.1)
    return message_of(lambda: nw.Decay(optimizer, RULE, list(model.parameters())[:1], dim=None))


def sphere_through_zero() -> str:
    mesh = mesh_of(dist.get_world_size())
    param = sharded(torch.eye(5), mesh, [S0])
    with torch.no_grad():
        local_tensor(param).mul_(0.0 if dist.get_rank() == 0 else 1.0)
    return message_of(lambda: nw.Decay(SGD([param], lr=0.1), nw.Sphere(), param))


CASES: list[Any] = [  # a function that provokes an error, its arguments, the error
    (
        too_strong,
        (),
        r"ValueError: .*parameter 'weight' of shape \(5, 4\): mode=\"explicit\" .* use mode=\"flow\"",
    ),
    (not_finite, (), r"RuntimeError: .*parameter 'weight' .* its unit 1 along dim=0 is not finite"),
    (other_rules, (), r"ValueError: what a Decay is given differs .*coefficient=0.1.*coefficient=0.2"),
    (wrong_on_one_rank, (), r"ValueError: .*mode='none' is not known: choose from"),
    (unknown_values, (), r"ValueError: parameter .* placement Partial.*redistribute it"),
    (
        cut,
        ("compensated",),
        r"ValueError: parameter 'weight' .* compensated=True needs whole units on one rank",
    ),
    (
        cut,
        ("rotate",),
        r"ValueError: parameter 'weight' .*RotatingSphere.* needs whole units",
    ),
    (
        cut,
        ("std",),
        r"ValueError: parameter 'weight' .*PublishedEpsilonShift.* needs whole units",
    ),
    pytest.param(
        sharded_afterwards,
        (),
        r"RuntimeError: parameter '0.bias' .*fully_shard .* construct the optimizer",
        marks=needs_fully_shard,
    ),
    pytest.param(
        replaced_in_the_optimizer,
        (),
        r"RuntimeError: a parameter of shape .*no longer in the optimizer.*fully_shard",
        marks=needs_fully_shard,
    ),
    (not_in_the_optimizer, (), r"ValueError: params holds a tensor .*not in the optimizer"),
    (flattened, (False,), r"ValueError: .*flattened by FullyShardedDataParallel \(FSDP1\).*fully_shard"),
    (flattened, (True,), r"ValueError: .*flattened by FullyShardedDataParallel \(FSDP1\).*fully_shard"),
    (overlapping, (), r"ValueError: ZeroRedundancyOptimizer with overlap_with_ddp=True"),
    (sphere_through_zero, (), r"ValueError: .*norm is zero or not finite"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "expected"), CASES, ids=lambda one: getattr(one, "__name__", None)
)
@pytest.mark.one_in(2)
def test_error_on_every_rank(
    function: Callable[..., str], arguments: tuple[object, ...], expected: str, world: World
) -> None:
    for rank, message in enumerate(world.run(function, *arguments)):
        assert re.match(expected, message), f"rank {rank}: {message}"
