"""Where the slices of a DTensor lie: which of them this rank holds, and whether it holds them whole.

This module knows placements, not units. It does not import torch.distributed: a process that has no DTensor
does not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = [
    "check_placements",
    "is_primary_holder",
    "is_sharded",
    "like",
    "local_slices",
    "local_tensor",
    "meshes_of",
    "placed_as",
    "reduction_mesh",
    "slice_layout",
    "slice_placements",
    "splits_slices",
]


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether a tensor is a DTensor.

    Example:
        >>> is_sharded(torch.zeros(1))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # if nobody has imported it, no DTensor exists
    dtensor = getattr(module, "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory. A plain tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(local: Tensor, whole: Tensor) -> Tensor:
    """Return a tensor that is placed like ``whole`` and whose part on this rank is ``local``."""
    if not is_sharded(whole):
        return local
    return type(whole).from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def placed_as(whole: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter. Some operations leave a pending sum."""
    if is_sharded(whole) and is_sharded(gradient) and gradient.placements != whole.placements:
        return gradient.redistribute(whole.device_mesh, whole.placements)
    return gradient


def meshes_of(tensors: Iterable[Tensor]) -> list[DeviceMesh]:
    """Return each mesh of more than one rank that these tensors lie on, once, in order of appearance."""
    return list({t.device_mesh: None for t in tensors if is_sharded(t) and t.device_mesh.size() > 1})


def check_placements(param: Tensor, name: str) -> None:
    """Raise a ValueError that names the parameter if no rank knows its values (a pending sum)."""
    for placement in param.placements if is_sharded(param) else ():
        if not placement.is_replicate() and _shard_dim(placement) is None:
            raise ValueError(
                f"{name} has placement {placement!r}, of which no rank knows the values: redistribute it "
                "to Shard or Replicate first"
            )


def splits_slices(param: Tensor, dim: int | None) -> bool:
    """Return whether single slices along ``dim`` are split over several ranks."""
    return any(split != dim for _, split in _splits(param))


def slice_layout(param: Tensor, dim: int | None) -> object:
    """Return a value that is equal for two tensors if ranks hold the same slices of both.

    The value is the same on all ranks; None if every rank holds (a part of) every slice.
    """
    places = [(k, param.placements[k]) for k, split in _splits(param) if split == dim and is_sharded(param)]
    return (param.device_mesh, tuple(places)) if places and is_sharded(param) else None


def local_slices(param: Tensor, dim: int | None) -> Tensor | None:
    """Return the indices along ``dim`` of the slices on this rank, or None if every rank holds all."""
    if dim is None or not is_sharded(param) or slice_layout(param, dim) is None:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    indices = torch.arange(param.shape[dim], device=mesh.device_type)
    # every rank has them all and keeps its part: nothing is communicated
    everywhere = DTensor.from_local(indices, mesh, [Replicate()] * mesh.ndim, run_check=False)
    mine = everywhere.redistribute(mesh, slice_placements(param, dim)).to_local()
    return mine.to(param.device)


def slice_placements(param: DTensor, dim: int) -> list[Placement]:
    """Return the placements of a vector with one value per slice, sharded as the slices are."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placements: list[Placement] = []
    for placement in param.placements:
        if _shard_dim(placement) != dim:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(0, split_factor=placement.split_factor))
        else:
            placements.append(Shard(0))
    return placements


def reduction_mesh(param: Tensor) -> DeviceMesh | None:
    """Return the mesh to reduce over for a norm of a sharded tensor; None if every rank holds all of it."""
    return param.device_mesh if is_sharded(param) and _splits(param) else None


def is_primary_holder(param: Tensor) -> bool:
    """Return whether this rank is the first of those that hold the same part of a sharded tensor."""
    if not is_sharded(param) or (coordinate := param.device_mesh.get_coordinate()) is None:
        return False
    split = {k for k, _ in _splits(param)}
    return all(at == 0 for k, at in enumerate(coordinate) if k not in split)


def _shard_dim(placement: Any) -> int | None:
    """Return the dimension that Shard or _StridedShard (FSDP over tensor parallel) splits, else None."""
    return None if placement.is_partial() else getattr(placement, "dim", None)


def _splits(param: Tensor) -> list[tuple[int, int]]:
    """Return (dimension of the mesh, dimension of the tensor) for each split."""
    if not is_sharded(param):
        return []
    pairs = ((k, _shard_dim(placement)) for k, placement in enumerate(param.placements))
    return [(k, dim) for k, dim in pairs if dim is not None and param.device_mesh.size(k) > 1]
