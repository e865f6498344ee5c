"""Converted networks train under DDP and fully_shard as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.distributed.world import World, needs_fully_shard
from tests.normalization.reference import KINDS, network
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def on_two_ranks(kind: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)  # in float32 the sums of two halves differ too much
    half = x.chunk(2)[dist.get_rank()]
    alone = network(kind).double()
    train(alone, x)
    parallel = DistributedDataParallel(network(kind).double())
    train(parallel, half)
    torch.testing.assert_close(parallel.module(x), alone(x))
    sharded = network(kind).double()
    for layer in sharded:  # 5 and 4 units over two processes: uneven shards
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(sharded)
    train(sharded, half)
    torch.testing.assert_close(sharded(x), alone(x))
    for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)  # type: ignore[attr-defined]


@needs_fully_shard
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_and_fully_shard_train_as_one_process_does(kind: str, worlds: dict[int, World]) -> None:
    worlds[2].run(on_two_ranks, kind)
