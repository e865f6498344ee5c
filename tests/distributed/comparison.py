"""A sharded training step beside the same step of one process."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import normwise as nw
from normwise.decay.rules import Rule

RULES: dict[str, Rule] = {
    "L2": nw.L2(0.5),
    "AdaptiveWeightShrink": nw.AdaptiveWeightShrink(0.5),
    "PowerShrink": nw.PowerShrink(0.3, 1.7),
    "EpsilonShiftedL2": nw.EpsilonShiftedL2(0.5, epsilon=0.5),
    "Sphere": nw.Sphere(1.5),
    "Sphere through the norms": nw.Sphere(),
}
CELLS = [
    (name, mode)
    for name, rule in RULES.items()
    for mode in ("flow", "explicit", "coupled")
    if mode in rule.modes
]
DIMS = (0, 1, None)
SHAPES = ((5, 4), (1, 7), (2, 3, 2))  # uneven shards, and ranks that hold nothing
S0, S1, R = Shard(0), Shard(1), Replicate()
LAYOUTS: dict[str, tuple[Placement, ...]] = {"Shard(0)": (S0,), "Shard(1)": (S1,), "Replicate": (R,)}
FLAT_LAYOUTS: dict[str, tuple[Placement, ...]] = {
    "Shard(0), Shard(1)": (S0, S1),
    "Shard(0), Replicate": (S0, R),
}
SQUARE_LAYOUTS: dict[str, tuple[Placement, ...]] = {
    "Shard(0), Shard(1)": (S0, S1),
    "Shard(1), Shard(0)": (S1, S0),
    "Shard(0), Shard(0)": (S0, S0),
    "Replicate, Shard(0)": (R, S0),
    "Replicate, Shard(1)": (R, S1),
}
# before torch 2.7 strided shards must be even, and full_tensor() of 2.9 puts uneven ones into a wrong order
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
    SQUARE_LAYOUTS["_StridedShard(0), Shard(0)"] = (_StridedShard(0, split_factor=2), S0)
# every rank has the whole value: from torch 2.7 on, distribute_tensor need not communicate
_LOCAL: dict[str, Any] = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
)
each_extent = pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["every pair", "full product"]
)


class Outcome(NamedTuple):
    """What a comparison measured."""

    ulps: list[float]  # the largest difference of each parameter, in ULP of the norm of its unit
    collectives: int  # in one step


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def sharded(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    # a copy, as a part without communication can be a view
    return nn.Parameter(distribute_tensor(value.clone(), mesh, placements, **_LOCAL))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, put together from the parts on all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_same_on_all_ranks(wholes: Sequence[Tensor], what: str) -> None:
    digest = hashlib.sha256(
        b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in wholes)
    ).hexdigest()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, digest)
    assert len(set(every)) == 1, f"{what}: ranks differ"


def ulps(actual: Tensor, expected: Tensor, dim: int | None) -> float:
    """Return the largest difference of an element, in ULP (relative spacing) of the norm of its unit."""
    unit = nw.Unit(expected.double(), dim)
    spacing = torch.finfo(expected.dtype).eps * unit.broadcast(unit.norms(), expected)
    return float(((actual.double() - expected.double()).abs() / spacing).nan_to_num(0.0).max())


def compare(
    layouts: Sequence[Callable[[Tensor], nn.Parameter]],
    values: Sequence[Tensor],
    units: Callable[[list[nn.Parameter]], list[nw.Unit]],
    rule: Rule,
    what: str,
    *,
    steps: int = 2,
    **settings: Any,
) -> Outcome:
    """Take steps of a sharded and of a dense optimizer from the same weights with the same gradients.

    Args:
        layouts: How each parameter is laid out.
        values: The initial parameters.
        units: Makes the units of either.
        rule: The rule.
        what: What is compared, for messages.
        steps: How many steps; the dense parameters are set to the sharded ones before each.
        settings: Further arguments of Decay.
    """
    generator = torch.Generator().manual_seed(5)
    params = [layout(value) for layout, value in zip(layouts, values, strict=True)]
    dense_params = [nn.Parameter(value.clone()) for value in values]
    optimizer, dense = (torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (params, dense_params))
    made = units(dense_params)
    nw.Decay(optimizer, rule, units(params), **settings)
    nw.Decay(dense, rule, made, **settings)
    dims = {id(p): unit.dim for unit in made for p in unit.params}
    worst = [0.0] * len(values)
    for _ in range(steps):
        for param, other, layout in zip(params, dense_params, layouts, strict=True):
            scale = other.detach().abs().max()
            other.grad = scale * torch.randn(other.shape, generator=generator).to(other.dtype)
            param.grad = layout(other.grad).detach()
        with CommDebugMode() as communication:
            optimizer.step()
        dense.step()
        wholes = [whole(param) for param in params]
        assert_same_on_all_ranks(wholes, what)
        for k, (actual, other) in enumerate(zip(wholes, dense_params, strict=True)):
            worst[k] = max(worst[k], ulps(actual, other.detach(), dims[id(other)]))
            other.data.copy_(actual)
    assert max(worst) <= 8, f"{what}: parameter {worst.index(max(worst))} is {max(worst):.3g} ULP off"
    return Outcome(worst, communication.get_total_counts())
