"""A slow stand-in for the kernels for CUDA: it reads the same table, one program after the other.

Like the kernels it knows of the tensors only what the table says: addresses and sizes. Its arithmetic is
theirs: squares in float64, products rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from normwise.decay import batched
from normwise.decay.table import Kind, Table


def use_kernels(monkeypatch: pytest.MonkeyPatch, kernels_for: Callable[[str], Any]) -> None:
    """Have every Decay from now on take what it can by table, with these kernels."""
    original = batched.Tables.__init__
    monkeypatch.setattr(batched, "kernels_for", kernels_for)
    monkeypatch.setattr(batched.Tables, "__init__", lambda self, fused: original(self, True))


class StandIn:
    """Counts the launches that the kernels would take; what it does itself is hidden from other counts."""

    def __init__(self) -> None:
        self.launches = 0

    def squares(self, table: Table) -> Tensor:
        with _disable_current_modes():
            sums = torch.full((table.segments,), torch.nan, dtype=torch.float64)
            for kind, row, unit, segment in self._programs(table):
                for u in range(unit, min(unit + kind.units, row[1])):
                    values = _segment(table, kind, row, u, segment).double()
                    sums[row[5] + u * row[6] + segment] = values.square().sum()
        return sums

    def multiply(self, table: Table, factors: Tensor) -> None:
        with _disable_current_modes():
            factors = factors.to(torch.promote_types(table.dtype, torch.float32))
            for kind, row, unit, segment in self._programs(table):
                for u in range(unit, min(unit + kind.units, row[1])):
                    values = _segment(table, kind, row, u, segment)
                    values.copy_(values.to(factors.dtype) * factors[row[4] + u])

    def _programs(self, table: Table) -> list[tuple[Kind, list[int], int, int]]:
        self.launches += len(table.launches)
        rows = table.tensors.tolist()
        return [
            (launch.kind, rows[which], unit, segment)
            for launch in table.launches
            for which, unit, segment in launch.work.tolist()
        ]


def _segment(table: Table, kind: Kind, row: list[int], unit: int, segment: int) -> Tensor:
    """View one segment of a unit in the memory where it lies; if not contiguous it is one segment."""
    address, count, inner, length = row[:4]
    size = torch.empty((), dtype=table.dtype).element_size()
    memory = (ctypes.c_char * (count * length * size)).from_address(address)
    flat = torch.frombuffer(memory, dtype=table.dtype).view(-1, count, inner)[:, unit]
    start, stop = segment * kind.span, min((segment + 1) * kind.span, length)
    if flat.shape[0] == 1:
        return flat[0, start:stop]
    if inner == 1:
        return flat[start:stop, 0]
    assert length <= kind.span, "a stand-in for segments that begin within an inner dimension is not needed"
    return flat
