"""Units of sharded parameters (DTensors): the part that this rank holds, and norms over all ranks.

Where every rank holds whole units (``Shard(0)`` with ``dim=0``, ``Replicate``) norms need no communication.
Elsewhere the squares of what each rank holds are summed in float64, those of all parameters of a mesh in one
all-reduce, so that every rank has the same bits.

Importing this module does not import torch.distributed: where no DTensor exists, it is not needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.collectives import sum_over
from normwise.units import Unit, row_norms, wide_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = [
    "LocalUnit",
    "dealt_meshes",
    "from_saved",
    "is_sharded",
    "is_summed",
    "like",
    "local_of",
    "meshes_of",
    "parts_of",
    "placed_as",
    "row_numbers",
    "take",
    "to_save",
    "whole_norms",
]


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether a tensor is a DTensor.

    Example:
        >>> is_sharded(torch.zeros(1))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there are none
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing its memory: the tensor itself if it is no DTensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(local: Tensor, whole: Tensor) -> Tensor:
    """Return the tensor that is sharded as ``whole`` is and of which this rank holds ``local``."""
    if not is_sharded(whole):
        return local
    return type(whole).from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def placed_as(whole: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter; some operations leave a sum to be done."""
    if is_sharded(whole) and is_sharded(gradient) and gradient.placements != whole.placements:
        return gradient.redistribute(whole.device_mesh, whole.placements)
    return gradient


def meshes_of(tensors: Iterable[Tensor]) -> list[DeviceMesh]:
    """Return the meshes of more than one rank that these tensors lie on, each once, in their order."""
    return list({t.device_mesh: None for t in tensors if is_sharded(t) and t.device_mesh.size() > 1})


def dealt_meshes(units: Iterable[tuple[Unit, ...]]) -> list[DeviceMesh]:
    """Return the meshes among whose ranks whole units are dealt out, so that ranks see different ones."""
    dealt = [
        part.whole.params[place]
        for parts in units
        for place, part in enumerate(parts)
        if isinstance(part, LocalUnit) and part.rows is not None
    ]
    return meshes_of(dealt)


class LocalUnit(Unit):
    """The part of a Unit that lies on this rank, as one of its parameters is laid out.

    Args:
        whole: The Unit.
        rows: The indices along ``dim`` that this rank holds, where they are split over ranks; else None.
        summed: Whether a norm needs what lies on other ranks.

    Attributes:
        params: What this rank holds of the parameters, as of the last ``refresh``.
        numel: The size of a whole unit, over all ranks.
    """

    def __init__(self, whole: Unit, rows: Tensor | None, summed: bool) -> None:
        self.whole, self.rows, self.summed = whole, rows, summed
        self.dim, self.numel = whole.dim, whole.numel
        self.count = whole.count if rows is None else len(rows)
        self.mask = whole.mask if whole.mask is None or rows is None else whole.mask[rows]
        self.refresh()

    def refresh(self) -> None:
        """Take the parameters as they are now: FSDP may have replaced their storage."""
        self.params = tuple(local_of(param) for param in self.whole.params)


def is_summed(unit: Unit) -> bool:
    """Return whether the norms of a unit need what lies on other ranks."""
    return isinstance(unit, LocalUnit) and unit.summed


def take(part: Unit, values: Tensor) -> Tensor:
    """Return, of values for all units, those of the units that this rank holds a part of."""
    return values[part.rows] if isinstance(part, LocalUnit) and part.rows is not None else values


def row_numbers(part: Unit) -> Tensor:
    """Return the indices along ``dim`` of the units that this rank holds a part of."""
    return take(part, torch.arange(part.whole.count if isinstance(part, LocalUnit) else part.count))


def parts_of(unit: Unit, called: Callable[[Tensor], str] | None = None) -> tuple[Unit, ...]:
    """Return, for each parameter of a Unit, the part that this rank holds; the Unit itself if all are dense.

    Args:
        unit: The Unit.
        called: Says how to call a parameter in an error.

    Raises:
        ValueError: A parameter has a placement that is neither a shard nor a replica.
    """
    if not any(is_sharded(param) for param in unit.params):
        return (unit,) * len(unit.params)
    for param in unit.params:
        for placement in param.placements if is_sharded(param) else ():
            if not placement.is_replicate() and _shard_dim(placement) is None:
                name = called(param) if called is not None else f"a parameter of shape {tuple(param.shape)}"
                raise ValueError(
                    f"{name} has placement {placement!r}, of which no rank knows the values: redistribute it "
                    "to Shard or Replicate first"
                )
    summed = any(_is_cut(param, unit.dim) for param in unit.params)
    summed = summed or len({_row_layout(param, unit.dim) for param in unit.params}) > 1
    return tuple(LocalUnit(unit, _rows(param, unit.dim), summed) for param in unit.params)


def _shard_dim(placement: Any) -> int | None:
    """Return the dimension that Shard or _StridedShard (of FSDP over tensor parallel) splits, else None."""
    return None if placement.is_partial() else getattr(placement, "dim", None)


def _splits(param: Tensor) -> list[tuple[int, int]]:
    """Return (dimension of the mesh, dimension of the tensor) for each that is split."""
    if not is_sharded(param):
        return []
    pairs = ((k, _shard_dim(placement)) for k, placement in enumerate(param.placements))
    return [(k, dim) for k, dim in pairs if dim is not None and param.device_mesh.size(k) > 1]


def _is_cut(param: Tensor, dim: int | None) -> bool:
    """Return whether single units lie on several ranks."""
    return any(split != dim for _, split in _splits(param))


def _row_layout(param: Tensor, dim: int | None) -> object:
    """Return what tells two ways of dealing out units to ranks apart, the same on all ranks."""
    places = [(k, param.placements[k]) for k, split in _splits(param) if split == dim and is_sharded(param)]
    return (param.device_mesh, tuple(places)) if places and is_sharded(param) else None


def _rows(param: Tensor, dim: int | None) -> Tensor | None:
    """Return the indices of the units that this rank holds; None where every rank holds all."""
    if dim is None or not is_sharded(param) or _row_layout(param, dim) is None:
        return None
    from torch.distributed.tensor import distribute_tensor

    every = torch.arange(param.shape[dim], device=param.device_mesh.device_type)
    placements = _row_placements(param, dim)
    dealt = distribute_tensor(
        every, param.device_mesh, placements, src_data_rank=None
    )  # communicates nothing
    return dealt.to_local().to(param.device)


def _row_placements(param: DTensor, dim: int) -> list[Placement]:
    """Return the placements of a vector with one value per unit, dealt out as the units are."""
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


def to_save(values: Tensor, part: Unit, place: int) -> Tensor:
    """Return a copy of values, one per unit that this rank holds, in a form that checkpoints can reshard.

    That is a DTensor where units are dealt out to ranks.

    Args:
        values: One value per unit of ``part``.
        part: What this rank holds of a Unit.
        place: The index in it of the parameter to which the values belong.
    """
    if not isinstance(part, LocalUnit) or part.rows is None or part.dim is None:
        return values.clone()
    from torch.distributed.tensor import DTensor

    param = part.whole.params[place]
    assert is_sharded(param)  # or its units would not be dealt out
    placements, shape = _row_placements(param, part.dim), torch.Size([part.whole.count])
    return DTensor.from_local(
        values.clone(), param.device_mesh, placements, run_check=False, shape=shape, stride=(1,)
    )


def from_saved(values: Tensor, part: Unit) -> Tensor:
    """Return those values that this rank needs; the reverse of :func:`to_save`, for any sharding.

    Of DTensors every rank must ask.
    """
    return take(part, values.full_tensor() if is_sharded(values) else values)


@torch.no_grad()
def whole_norms(units: Sequence[tuple[Unit, ...]]) -> list[Tensor]:
    """Return the norms of whole Units on every rank, with one all-reduce for each mesh that they lie on.

    Args:
        units: Each Unit as :func:`parts_of` returned it. Every rank must give the same ones.

    Returns:
        For each Unit a tensor of the widest type and shape (count,), for all units of it.
    """
    squares: list[dict[DeviceMesh | None, Tensor]] = [{} for _ in units]
    for parts, its_squares in zip(units, squares, strict=True):
        for place, part in enumerate(parts):
            whole = part.whole if isinstance(part, LocalUnit) else part
            param, local = whole.params[place], part.params[place]
            mesh = param.device_mesh if is_sharded(param) and _splits(param) else None
            if mesh not in its_squares:
                its_squares[mesh] = torch.zeros(
                    whole.count, dtype=wide_dtype(local.device), device=local.device
                )
            if mesh is None or _contributes(param):
                rows = part.rows if isinstance(part, LocalUnit) and part.rows is not None else slice(None)
                its_squares[mesh][rows] += row_norms(local, whole.dim).reshape(-1).square()
    for mesh in dict.fromkeys(mesh for one in squares for mesh in one if mesh is not None):
        holders = [one for one in squares if mesh in one]
        sums = sum_over(mesh, torch.cat([one[mesh] for one in holders]))
        for one, its_sum in zip(holders, sums.split([len(one[mesh]) for one in holders]), strict=True):
            one[mesh] = its_sum
    return [torch.stack(list(one.values())).sum(0).sqrt_() for one in squares]


def _contributes(param: Tensor) -> bool:
    """Return whether this rank is the one, of those that hold the same part of a parameter, that counts."""
    if not is_sharded(param) or (place := param.device_mesh.get_coordinate()) is None:
        return False
    split = {k for k, _ in _splits(param)}
    return all(at == 0 for k, at in enumerate(place) if k not in split)
