"""The units of many tensors as one table, so that a kernel can take all of them in a single launch.

On an accelerator a launch costs about as much as a pass over a small weight, and torch has no kernel that
takes the norms of rows, or multiplies rows, of several tensors at once. So the kernels of
:mod:`normwise.decay.kernels` read from this table where each tensor lies and which part of it is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.norms import wide_dtype
from normwise.units import Unit

__all__ = ["KINDS", "Kind", "Launch", "Table", "fits", "stored_as"]


class Kind(NamedTuple):
    """How the tiles of one launch are cut.

    Attributes:
        contiguous: Whether the elements of a unit lie beside each other in memory.
        units: How many units a tile has, a power of two.
        elements: How many elements of each, a power of two.
        span: Up to so many elements of each unit are one program's work; a longer unit is cut in segments.
    """

    contiguous: bool
    units: int
    elements: int
    span: int


SHORT = Kind(True, units=64, elements=32, span=64)
MIDDLE = Kind(True, units=8, elements=256, span=4096)
LONG = Kind(True, units=1, elements=2048, span=16384)
STRIDED = Kind(False, units=64, elements=32, span=1024)
KINDS = (SHORT, MIDDLE, LONG, STRIDED)


class Launch(NamedTuple):
    """The work of one launch.

    Attributes:
        kind: How its tiles are cut.
        work: A long tensor of shape (programs, 3) on the device: for each program the index of its tensor, of
            its first unit and of its segment.
    """

    kind: Kind
    work: Tensor


def stored_as(param: Tensor, dim: int | None) -> tuple[int, int, int]:
    """Return (outer, count, inner), as which the memory of a dense tensor can be seen.

    Unit j is what has j as its second index: whatever the memory format, the dimensions that vary faster than
    ``dim`` make up the inner one and those that vary slower the outer one.

    Example:
        >>> stored_as(torch.empty(8, 3, 5, 5), dim=1)
        (8, 3, 25)
        >>> stored_as(torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last), dim=1)
        (200, 3, 1)
    """
    if dim is None or param.shape[dim] == 1:  # the stride of a dimension of size 1 means nothing
        return 1, 1, param.numel()
    count, inner = param.shape[dim], param.stride(dim)
    return param.numel() // (count * inner), count, inner


def fits(param: Tensor) -> bool:
    """Return whether a tensor has elements and its memory has no gaps, as a table needs it."""
    return param.numel() > 0 and (
        param.is_contiguous()
        or (param.ndim == 4 and param.is_contiguous(memory_format=torch.channels_last))
        or (param.ndim == 5 and param.is_contiguous(memory_format=torch.channels_last_3d))
    )


class Table:
    """Where the units of tensors of one device and type lie, and how they are dealt out to programs.

    It holds addresses and no tensors: use it as long as the tensors stay where they are. Making one copies a
    few numbers per tensor and program to the device, without waiting for it.

    Args:
        units: Units whose tensors all :func:`fits`; of joint units with all their tensors.

    Attributes:
        dtype: The type of the tensors.
        count: How many units there are, those of the first Unit first.
        tensors: A long tensor of shape (number of tensors, 7) on the device; for each tensor its address, the
            number of its units, the size of the inner dimension, the elements per unit, the index of its
            first unit, that of its first segment, and how many segments one unit has (of joint units: in all
            tensors).
        launches: The launches that a pass over all tensors takes: one for each :class:`Kind` that occurs.
        segments: How many segments there are.
        lengths: How many segments each unit has, a long tensor of shape (count,); None if all have one.
        roots: √numel of each unit, of shape (count,).
        mask: Which units are meant, of shape (count,); None if all are.

    Example:
        >>> table = Table([Unit(torch.ones(3, 40)), Unit(torch.ones(2, 30000))])
        >>> table.count, table.segments, len(table.launches)
        (5, 7, 2)
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        device, self.dtype = units[0].params[0].device, units[0].params[0].dtype
        self.count = self.segments = 0
        rows: list[list[int]] = []
        work: dict[Kind, list[tuple[int, int, int]]] = {}
        lengths: list[int] = []
        for unit in units:
            stored = [stored_as(param, unit.dim) for param in unit.params]
            kinds = [_kind(*shape) for shape in stored]
            cut = [
                -(-outer * inner // kind.span) for (outer, _, inner), kind in zip(stored, kinds, strict=True)
            ]
            first = self.segments
            for param, (outer, count, inner), kind, pieces in zip(
                unit.params, stored, kinds, cut, strict=True
            ):
                row = [param.data_ptr(), count, inner, outer * inner, self.count, first, sum(cut)]
                firsts = range(0, count, kind.units)
                work.setdefault(kind, []).extend((len(rows), u, s) for u in firsts for s in range(pieces))
                rows.append(row)
                first += pieces
            self.count += unit.count
            self.segments += unit.count * sum(cut)
            lengths += [sum(cut)] * unit.count
        self.tensors = _sent(torch.tensor(rows), device)
        self.launches = [
            Launch(kind, _sent(torch.tensor(work[kind]), device)) for kind in KINDS if kind in work
        ]
        self.lengths = None if max(lengths) == 1 else _sent(torch.tensor(lengths), device)
        roots = [unit.numel**0.5 for unit in units for _ in range(unit.count)]
        self.roots = _sent(torch.tensor(roots, dtype=wide_dtype(device)), device)
        masks = [unit.mask for unit in units]
        self.mask = None
        if any(mask is not None for mask in masks):
            whole = [torch.ones(unit.count, dtype=torch.bool, device=device) for unit in units]
            self.mask = torch.cat([own if m is None else m for m, own in zip(masks, whole, strict=True)])


def _kind(outer: int, count: int, inner: int) -> Kind:
    if outer > 1:
        return STRIDED
    return SHORT if inner <= SHORT.span else MIDDLE if inner <= MIDDLE.span else LONG


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it, which takes memory that the system does not move."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
