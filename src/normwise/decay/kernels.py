"""Kernels for CUDA that take the units of all tensors at once, written in Triton (a part of torch for CUDA).

Importing this module imports Triton. What the kernels read is described in :mod:`normwise.decay.table`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normwise.decay.table import Launch, Table

__all__ = ["multiply", "squares"]

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def squares(table: Table) -> Tensor:
    """Return the sum of squares of every segment, in float64, of shape (table.segments,)."""
    sums = torch.empty(table.segments, dtype=torch.float64, device=table.tensors.device)
    for launch in table.launches:
        _run(_squares, table, launch, sums)
    return sums


def multiply(table: Table, factors: Tensor) -> None:
    """Multiply the units by factors of shape (table.count,), rounding as ``tensor.mul_`` rounds."""
    factors = factors.to(torch.promote_types(table.dtype, torch.float32))
    for launch in table.launches:
        _run(_multiply, table, launch, factors)


def _run(kernel: Any, table: Table, launch: Launch, values: Tensor) -> None:
    kind = launch.kind
    with torch.cuda.device_of(values):  # Triton launches on the current device
        kernel[(len(launch.work),)](
            table.tensors,
            launch.work,
            values,
            TYPE=_TYPES[table.dtype],
            CONTIGUOUS=kind.contiguous,
            UNITS=kind.units,
            ELEMENTS=kind.elements,
            SPAN=kind.span,
        )


@triton.jit
def _offsets(k, count, inner, CONTIGUOUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in memory, from the first element of its unit on, the k-th element of a unit lies."""
    return k if CONTIGUOUS else (k // inner) * (count * inner) + k % inner


@triton.jit
def _squares(  # type: ignore[no-untyped-def]
    tensors,
    work,
    sums,
    TYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    mine = work + tl.program_id(0) * 3
    row = tensors + tl.load(mine) * 7
    segment = tl.load(mine + 2)
    start = tl.load(row).to(tl.pointer_type(TYPE))
    count, inner, length = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    unit = tl.load(mine + 1) + tl.arange(0, UNITS)
    total = tl.zeros([UNITS], dtype=tl.float64)
    for done in range(0, SPAN, ELEMENTS):
        k = segment * SPAN + done + tl.arange(0, ELEMENTS)
        # the index that varies fastest in memory comes last, so that neighbours read neighbours
        if CONTIGUOUS:
            where = (unit * inner)[:, None] + k[None, :]
            values = tl.load(start + where, mask=(unit < count)[:, None] & (k < length)[None, :], other=0.0)
            values = values.to(tl.float64)
            total += tl.sum(values * values, axis=1)
        else:
            where = (unit * inner)[None, :] + _offsets(k, count, inner, CONTIGUOUS)[:, None]
            values = tl.load(start + where, mask=(unit < count)[None, :] & (k < length)[:, None], other=0.0)
            values = values.to(tl.float64)
            total += tl.sum(values * values, axis=0)
    first, stride = tl.load(row + 5), tl.load(row + 6)
    tl.store(sums + first + unit * stride + segment, total, mask=unit < count)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    tensors,
    work,
    factors,
    TYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    mine = work + tl.program_id(0) * 3
    row = tensors + tl.load(mine) * 7
    segment = tl.load(mine + 2)
    start = tl.load(row).to(tl.pointer_type(TYPE))
    count, inner, length = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    unit = tl.load(mine + 1) + tl.arange(0, UNITS)
    factor = tl.load(factors + tl.load(row + 4) + unit, mask=unit < count, other=1.0)
    for done in range(0, SPAN, ELEMENTS):
        k = segment * SPAN + done + tl.arange(0, ELEMENTS)
        if CONTIGUOUS:
            where = (unit * inner)[:, None] + k[None, :]
            inside = (unit < count)[:, None] & (k < length)[None, :]
            values = tl.load(start + where, mask=inside)
            tl.store(start + where, (values.to(factor.dtype) * factor[:, None]).to(TYPE), mask=inside)
        else:
            where = (unit * inner)[None, :] + _offsets(k, count, inner, CONTIGUOUS)[:, None]
            inside = (unit < count)[None, :] & (k < length)[:, None]
            values = tl.load(start + where, mask=inside)
            tl.store(start + where, (values.to(factor.dtype) * factor[None, :]).to(TYPE), mask=inside)
