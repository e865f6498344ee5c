"""What the ranks of a mesh say to each other: sums with the same bits everywhere, errors, settings.

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
    """Return the groups to communicate in, one after the other: the fewest that make up the mesh."""
    import torch.distributed as dist

    if mesh.get_coordinate() is None:  # this rank has no part in it
        return []
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None  # or there would be no mesh
        return [world]
    return mesh.get_all_groups()


def sum_over(mesh: DeviceMesh, values: Tensor) -> Tensor:
    """Return the sum over the ranks of a mesh, with the same bits on all of them."""
    import torch.distributed as dist

    groups = _groups(mesh)
    sums = values.to(mesh.device_type)  # parameters may be offloaded to a CPU that NCCL does not reach
    for group in groups:
        dist.all_reduce(sums, group=group)
    for group in groups[:-1]:  # the last reductions ran beside each other, perhaps in different orders
        dist.broadcast(sums, group=group, group_src=0)
    return sums.to(values.device)


def _gathered(mesh: DeviceMesh, mine: Any) -> list[Any]:
    """Return what the ranks of a mesh have, in the same order on all of them."""
    import torch.distributed as dist

    collected = [mine]
    for group in _groups(mesh):
        lists: list[Any] = [None] * group.size()
        dist.all_gather_object(lists, collected, group=group)
        collected = [one for some in lists for one in some]
    return collected


_ERRORS = {error.__name__: error for error in (TypeError, ValueError, RuntimeError)}


@contextmanager
def together(meshes: Sequence[DeviceMesh]) -> Iterator[None]:
    """Raise on every rank what a block of code raises on any: none goes on alone and waits for ever.

    Costs one reduction of one number for each mesh.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # carried to the other ranks, and raised below
        problem = error
    for mesh in meshes:
        failed = torch.tensor([float(problem is not None)])
        if not sum_over(mesh, failed).item():
            continue
        mine = None if problem is None else (type(problem).__name__, str(problem))
        name, text = next(one for one in _gathered(mesh, mine) if one is not None)
        problem = problem or _ERRORS.get(name, RuntimeError)(f"on another rank: {text}")
    if problem is not None:
        raise problem


def check_same(meshes: Sequence[DeviceMesh], what: str, settings: str) -> None:
    """Raise a ValueError on every rank if the ranks do not all have the same settings.

    Args:
        meshes: Over whose ranks to compare.
        what: What is being set, for the message.
        settings: The settings in words.
    """
    for mesh in meshes:
        every = _gathered(mesh, settings)
        other = next((k for k, one in enumerate(every) if one != every[0]), None)
        if other is not None:
            raise ValueError(
                f"{what} differs between ranks: rank 0 of the mesh has {every[0]}, rank {other} has "
                f"{every[other]}: construct the same on every rank, in the same order"
            )
