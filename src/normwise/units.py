"""Units: the slices that are normalised together, and the part of them that a rank holds.

A *unit* is the slice of a parameter that a normalisation takes together: a row (``dim=0``, one output
filter), a column (``dim=1``, the filters of a transposed convolution), the whole tensor (``dim=None``),
or the same slice of several tensors jointly.

Of sharded parameters (DTensors) each rank works on a :class:`LocalUnit`. Where every rank holds whole units
(``Shard(0)`` with ``dim=0``, ``Replicate``), norms need no communication. Elsewhere the ranks sum their
squares in float64, in one all-reduce for all parameters of a mesh, so that every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.collectives import sum_over
from normwise.norms import check_dim, check_tensor, of_shape, slice_norms
from normwise.sharding import (
    check_placements,
    is_primary_holder,
    is_sharded,
    local_slices,
    local_tensor,
    meshes_of,
    reduction_mesh,
    slice_layout,
    slice_placements,
    splits_slices,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "LocalUnit",
    "Unit",
    "from_checkpoint",
    "global_norms",
    "global_sums",
    "local_indices",
    "local_units",
    "local_values",
    "meshes_with_distributed_units",
    "needs_reduction",
    "to_checkpoint",
]


class Unit:
    """One parameter, or several taken jointly, and the slices of it that a rule acts on.

    Args:
        params: A tensor, or several tensors taken jointly. The norm of a joint unit is √Σₖ‖wₖ‖² over the
            same slice of each tensor.
        dim: What a unit is: 0 a row, 1 a column, ..., None the whole tensor (of joint tensors: all elements
            of all of them together).
        mask: One boolean per unit along ``dim``; a rule acts on the True ones. None selects all units.

    Attributes:
        params: The tensors, as a tuple.
        dim: The dimension, non-negative; None for the whole tensor.
        mask: A bool tensor of shape (count,), or None.
        count: The number of units along ``dim`` (1 for ``dim=None``).
        numel: The number of elements of one unit, over all tensors.

    Raises:
        TypeError: A parameter is not a real floating-point tensor, or ``dim`` is not an int or None.
        ValueError: A parameter is not dense or overlaps itself in memory, ``dim`` or ``mask`` does not fit,
            or joint tensors have different numbers of slices.

    Example:
        >>> query, key = torch.ones(4, 3), torch.ones(4, 2)
        >>> Unit([query, key]).norms()
        tensor([2.2361, 2.2361, 2.2361, 2.2361], dtype=torch.float64)
        >>> Unit([query, key], dim=None).numel
        20
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        dim: int | None = 0,
        mask: Tensor | Iterable[bool] | None = None,
    ) -> None:
        self.params = (params,) if isinstance(params, Tensor) else tuple(params)
        if not self.params:
            raise ValueError("params is empty: a Unit needs at least one tensor")
        for param in self.params:
            check_tensor(param, f"a tensor{of_shape(param)}")
        if len({id(param) for param in self.params}) < len(self.params):
            raise ValueError("params holds the same tensor twice: give each tensor of a joint unit once")
        shapes = [tuple(param.shape) for param in self.params]
        dims = {check_dim(dim, len(shape), f"a tensor of shape {shape}") for shape in shapes}
        if len(dims) > 1:
            raise ValueError(
                f"dim={dim} means different dimensions of tensors with shapes {shapes}: give dim >= 0"
            )
        self.dim = dims.pop()
        counts = {1 if self.dim is None else param.shape[self.dim] for param in self.params}
        if len(counts) > 1:
            raise ValueError(
                f"tensors of shapes {shapes} have different numbers of slices along dim={dim}, so they "
                "cannot be taken jointly slice by slice: give dim=None to take the whole tensors jointly"
            )
        self.count = counts.pop()
        self.numel = sum(p.numel() // max(1, self.count) for p in self.params)
        self.mask = self._checked_mask(mask)

    def _checked_mask(self, mask: Tensor | Iterable[bool] | None) -> Tensor | None:
        if mask is None:
            return None
        if self.dim is None:
            raise ValueError("mask selects rows or columns, and dim=None has none: give dim, or no mask")
        mask = mask if isinstance(mask, Tensor) else torch.tensor(list(mask))
        if mask.dtype != torch.bool or mask.shape != (self.count,):
            raise ValueError(
                f"mask must hold {self.count} booleans, one per slice along dim={self.dim}, "
                f"not {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if not bool(mask.any()):
            raise ValueError("mask selects nothing: give at least one True, or leave the unit out")
        return mask.to(self.params[0].device)

    def norms(self) -> Tensor:
        """Return the norm of every unit, also of those outside the mask: shape (count,), widest type.

        For sharded parameters all ranks must call this together; each gets the norms of all units.
        """
        if any(is_sharded(param) for param in self.params):
            return global_norms([local_units(self)])[0]
        norms = slice_norms(self.params[0], self.dim).reshape(-1)
        for param in self.params[1:]:
            norms = torch.hypot(norms, slice_norms(param, self.dim).reshape(-1))
        return norms

    def broadcast(self, values: Tensor, param: Tensor) -> Tensor:
        """View ``values`` of shape (count,) so that they broadcast against ``param``, one per unit."""
        return values.view([-1 if k == self.dim else 1 for k in range(param.ndim)])

    def overlaps(self, other: Unit) -> bool:
        """Return whether the two units share an element of some parameter."""
        mine = {id(param) for param in self.params}
        if not any(id(param) in mine for param in other.params):
            return False
        if self.mask is None or other.mask is None or self.dim != other.dim:
            return True
        return bool((self.mask & other.mask.to(self.mask.device)).any())

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(param.shape)) for param in self.params)
        masked = "" if self.mask is None else f", mask={int(self.mask.sum())} of {self.count}"
        return f"Unit({shapes}, dim={self.dim}{masked})"

    def describe(self) -> dict[str, Any]:
        """Return shapes, dim and mask as plain values, for a state_dict."""
        mask = None if self.mask is None else self.mask.tolist()
        return {"shapes": [list(param.shape) for param in self.params], "dim": self.dim, "mask": mask}


class LocalUnit(Unit):
    """This rank's part of a Unit, as one of its parameters is sharded.

    Args:
        whole: The Unit.
        rows: The indices along ``dim`` of the units on this rank, if units are distributed over ranks; else
            None.
        needs_reduction: Whether the norm of a unit depends on elements on other ranks.

    Attributes:
        params: This rank's part of each parameter, as of the last ``refresh``.
        numel: The number of elements of a whole unit, over all ranks.
    """

    def __init__(self, whole: Unit, rows: Tensor | None, needs_reduction: bool) -> None:
        self.whole, self.rows, self.needs_reduction = whole, rows, needs_reduction
        self.dim, self.numel = whole.dim, whole.numel
        self.count = whole.count if rows is None else len(rows)
        self.mask = whole.mask if whole.mask is None or rows is None else whole.mask[rows]
        self.refresh()

    def refresh(self) -> None:
        """Look up the local tensors again: FSDP may have replaced their storage."""
        self.params = tuple(local_tensor(param) for param in self.whole.params)


def local_units(unit: Unit, name_of: Callable[[Tensor], str] | None = None) -> tuple[Unit, ...]:
    """Return this rank's part of a Unit, once for each parameter; the Unit itself if none is sharded.

    Args:
        unit: The Unit.
        name_of: Returns the name of a parameter for an error message.

    Raises:
        ValueError: A parameter has a placement that is neither a shard nor a replica.
    """
    if not any(is_sharded(param) for param in unit.params):
        return (unit,) * len(unit.params)
    for param in unit.params:
        name = name_of(param) if name_of is not None else f"a parameter of shape {tuple(param.shape)}"
        check_placements(param, name)
    reduced = any(splits_slices(param, unit.dim) for param in unit.params)
    reduced = reduced or len({slice_layout(param, unit.dim) for param in unit.params}) > 1
    return tuple(LocalUnit(unit, local_slices(param, unit.dim), reduced) for param in unit.params)


def needs_reduction(unit: Unit) -> bool:
    """Return whether the norm of a unit depends on elements on other ranks."""
    return isinstance(unit, LocalUnit) and unit.needs_reduction


def local_values(unit: Unit, values: Tensor) -> Tensor:
    """Return the values that belong to the units on this rank, given one value for each unit of the whole."""
    return values[unit.rows] if isinstance(unit, LocalUnit) and unit.rows is not None else values


def local_indices(unit: Unit) -> Tensor:
    """Return the indices along ``dim`` of the units of which this rank holds a part."""
    return local_values(unit, torch.arange(unit.whole.count if isinstance(unit, LocalUnit) else unit.count))


def meshes_with_distributed_units(units: Iterable[tuple[Unit, ...]]) -> list[DeviceMesh]:
    """Return the meshes over which whole units are distributed, so that ranks see different units."""
    distributed = [
        local.whole.params[place]
        for locals_ in units
        for place, local in enumerate(locals_)
        if isinstance(local, LocalUnit) and local.rows is not None
    ]
    return meshes_of(distributed)


def to_checkpoint(values: Tensor, unit: Unit, place: int) -> Tensor:
    """Return a copy of per-unit values in a form that distributed checkpoints can reshard.

    The result is a DTensor where units are distributed over ranks, else a plain tensor.

    Args:
        values: One value per unit on this rank.
        unit: This rank's part of a Unit.
        place: The index of the parameter to which the values belong.
    """
    if not isinstance(unit, LocalUnit) or unit.rows is None or unit.dim is None:
        return values.clone()
    from torch.distributed.tensor import DTensor

    param = unit.whole.params[place]
    assert is_sharded(param)  # only units of DTensors are distributed
    placements, shape = slice_placements(param, unit.dim), torch.Size([unit.whole.count])
    return DTensor.from_local(
        values.clone(), param.device_mesh, placements, run_check=False, shape=shape, stride=(1,)
    )


def from_checkpoint(values: Tensor, unit: Unit) -> Tensor:
    """Return this rank's values: the inverse of :func:`to_checkpoint`, for any sharding.

    If ``values`` is a DTensor, all ranks must call this together.
    """
    return local_values(unit, values.full_tensor() if is_sharded(values) else values)


@torch.no_grad()
def global_sums(units: Sequence[tuple[Unit, ...]], sums: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add up over ranks, and over the parameters of joint units, what each rank has summed over its parts.

    Takes one all-reduce per mesh; every rank gets the same bits.

    Args:
        units: Each Unit as :func:`local_units` returned it, the same on every rank.
        sums: For each Unit and each of its parameters, a tensor of the widest type and shape (units on this
            rank, columns): sums over this rank's elements of that parameter.

    Returns:
        For each Unit a tensor of shape (count, columns).
    """
    by_mesh: list[dict[DeviceMesh | None, Tensor]] = [{} for _ in units]
    for locals_, parts, totals in zip(units, sums, by_mesh, strict=True):
        for place, (local, part) in enumerate(zip(locals_, parts, strict=True)):
            whole = local.whole if isinstance(local, LocalUnit) else local
            param = whole.params[place]
            mesh = reduction_mesh(param)
            if mesh not in totals:
                totals[mesh] = part.new_zeros(whole.count, part.shape[1])
            if mesh is None or is_primary_holder(param):
                rows = local.rows if isinstance(local, LocalUnit) and local.rows is not None else slice(None)
                totals[mesh][rows] += part
    for mesh in dict.fromkeys(mesh for one in by_mesh for mesh in one if mesh is not None):
        holders = [one for one in by_mesh if mesh in one]
        reduced = sum_over(mesh, torch.cat([one[mesh].reshape(-1) for one in holders]))
        pieces = reduced.split([one[mesh].numel() for one in holders])
        for one, piece in zip(holders, pieces, strict=True):
            one[mesh] = piece.view_as(one[mesh])
    return [torch.stack(list(one.values())).sum(0) for one in by_mesh]


@torch.no_grad()
def global_norms(units: Sequence[tuple[Unit, ...]]) -> list[Tensor]:
    """Return the norms of whole Units on every rank, with one all-reduce per mesh.

    Args:
        units: Each Unit as :func:`local_units` returned it, the same on every rank.

    Returns:
        For each Unit a tensor of the widest type and shape (count,): the norms of all its units.
    """
    squares = [
        [slice_norms(local.params[k], local.dim).reshape(-1, 1).square() for k, local in enumerate(locals_)]
        for locals_ in units
    ]
    return [sums.squeeze(1).sqrt_() for sums in global_sums(units, squares)]
