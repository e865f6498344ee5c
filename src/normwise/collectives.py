"""Communication between the ranks of a mesh: bit-equal sums, shared errors, a check of equal settings.

Importing this module does not import torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["check_same", "sum_over", "together"]


def _groups(mesh: DeviceMesh) -> list[ProcessGroup]:
    """Return the process groups to reduce over in sequence: the fewest that cover the mesh."""
    import torch.distributed as dist

    if mesh.get_coordinate() is None:  # this rank is not in the mesh
        return []
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None  # a mesh exists, so torch.distributed is initialised
        return [world]
    return mesh.get_all_groups()


def sum_over(mesh: DeviceMesh, values: Tensor) -> Tensor:
    """Return the sum of ``values`` over the ranks of a mesh, with the same bits on every rank."""
    import torch.distributed as dist

    groups = _groups(mesh)
    sums = values.to(mesh.device_type)  # NCCL does not reach parameters that are offloaded to a CPU
    for group in groups:
        dist.all_reduce(sums, group=group)
    # The last reductions ran in parallel, possibly in different orders, so their bits may differ.
    for group in groups[:-1]:
        dist.broadcast(sums, group=group, group_src=0)
    return sums.to(values.device)


def _gather(mesh: DeviceMesh, value: Any) -> list[Any]:
    """Return the values of all ranks of a mesh, in the same order on every rank."""
    import torch.distributed as dist

    collected = [value]
    for group in _groups(mesh):
        lists: list[Any] = [None] * group.size()
        dist.all_gather_object(lists, collected, group=group)
        collected = [item for items in lists for item in items]
    return collected


_ERRORS = {error.__name__: error for error in (TypeError, ValueError, RuntimeError)}


@contextmanager
def together(meshes: Sequence[DeviceMesh]) -> Iterator[None]:
    """Raise an error on every rank if a block of code raises it on any rank.

    Otherwise the ranks without an error would go on alone and wait for ever. Costs one reduction of one
    number per mesh.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # sent to the other ranks and raised below
        problem = error
    for mesh in meshes:
        failed = torch.tensor([float(problem is not None)])
        if not sum_over(mesh, failed).item():
            continue
        description = None if problem is None else (type(problem).__name__, str(problem))
        name, text = next(found for found in _gather(mesh, description) if found is not None)
        problem = problem or _ERRORS.get(name, RuntimeError)(f"on another rank: {text}")
    if problem is not None:
        raise problem


def check_same(meshes: Sequence[DeviceMesh], what: str, settings: str) -> None:
    """Raise a ValueError on every rank if the settings differ between ranks.

    Args:
        meshes: The meshes whose ranks are compared.
        what: The name of the settings in the error message.
        settings: The settings of this rank as text.
    """
    for mesh in meshes:
        by_rank = _gather(mesh, settings)
        other = next((k for k, theirs in enumerate(by_rank) if theirs != by_rank[0]), None)
        if other is not None:
            raise ValueError(
                f"{what} differs between ranks: rank 0 of the mesh has {by_rank[0]}, rank {other} has "
                f"{by_rank[other]}: construct the same on every rank, in the same order"
            )
