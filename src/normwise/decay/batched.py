"""Which parameters are shrunk together: in one call of torch, or by kernels that read a table."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from normwise.decay.live import Live
from normwise.decay.table import Table, fits
from normwise.units import Unit, needs_reduction

__all__ = ["Kernels", "Tables", "check_fused", "kernels_for", "multiply_table", "table_norms"]


class Kernels(Protocol):
    """What takes the units of all tensors of a table at once, as :mod:`normwise.decay.kernels` does."""

    def squares(self, table: Table) -> Tensor:
        """Return the sum of squares of every segment of the table, of shape (table.segments,)."""
        ...

    def multiply(self, table: Table, factors: Tensor) -> None:
        """Multiply the units by factors of shape (table.count,)."""
        ...


@functools.cache
def kernels_for(device_type: str) -> Kernels | None:
    """Return the kernels for tables on a type of device, or None where there are none.

    They are there on CUDA with Triton, which comes with torch (but not on Windows). On a CPU a launch costs
    next to nothing, and torch's own kernels are faster.
    """
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("normwise.decay.kernels")


def check_fused(fused: bool, mode: str, units: Sequence[Unit]) -> None:
    """Raise an error where the kernels are asked for and cannot be had."""
    if not isinstance(fused, bool):
        raise TypeError(f"fused must be True or False, not {fused!r}")
    if fused and mode != "flow":
        raise ValueError(f'fused=True does not go with mode={mode!r}: use mode="flow", or leave fused out')
    devices = {param.device.type for unit in units for param in unit.params} if fused else set()
    without = sorted(device for device in devices if kernels_for(device) is None)
    if without:
        raise ValueError(
            f"fused=True needs Triton and parameters on CUDA, and there are parameters on {without[0]}"
            f"{' but no Triton' if without[0] == 'cuda' else ''}: leave fused out"
        )


class Tables:
    """The tables of a Decay, each made once and again only when its tensors have changed or moved.

    Args:
        fused: Whether there are to be any.
    """

    def __init__(self, fused: bool) -> None:
        self._fused = fused
        self._made: dict[Any, tuple[Any, Table]] = {}

    def sort(self, live: Sequence[Live]) -> tuple[dict[Any, list[Live]], list[Live]]:
        """Return the batches for which there is a table, and what is left to be taken by itself.

        A batch is of one group, device and type, and its norms need what lies on other ranks, or do not. It
        holds each of its Units once, with its first parameter. Left are Units on devices without kernels,
        with memory that has gaps, and joint ones whose tensors are not all of one batch.
        """
        if not self._fused:
            return {}, list(live)
        by_unit: dict[int, list[Live]] = {}
        for one in live:
            by_unit.setdefault(one.which, []).append(one)
        batches: dict[Any, list[Live]] = {}
        left: list[Live] = []
        for members in by_unit.values():
            first = members[0]
            joint, summed = len(first.unit.params) > 1, needs_reduction(first.unit)
            keys = {(one.group, one.param.device, one.param.dtype) for one in members}
            together = len(members) == len(first.unit.params) and len(keys) == 1 and not (joint and summed)
            if (
                together
                and kernels_for(first.param.device.type) is not None
                and all(fits(param) for param in first.unit.params)
            ):
                batches.setdefault((*keys.pop(), summed), []).append(first)
            else:
                left += members
        return batches, left

    def of(self, key: Any, batch: Sequence[Live]) -> Table:
        """Return the table of a batch that :meth:`sort` has returned under this key."""
        lie = [
            (one.which, [(param.data_ptr(), param.stride()) for param in one.unit.params]) for one in batch
        ]
        known = self._made.get(key)
        if known is None or known[0] != lie:
            known = self._made[key] = lie, Table([one.unit for one in batch])
        return known[1]


def table_norms(table: Table) -> Tensor:
    """Return the norms of the units of a table, of shape (table.count,), in float64."""
    sums = _kernels(table).squares(table)
    if table.lengths is not None:  # unsafe: without looking at the lengths, which would wait for the device
        sums = torch.segment_reduce(sums, "sum", lengths=table.lengths, unsafe=True)
    return sums.sqrt()


def multiply_table(table: Table, factors: Tensor, found_inf: Tensor | None) -> None:
    """Multiply the units that are meant, unless a GradScaler found infinities.

    Args:
        table: The table.
        factors: Of shape (table.count,), contiguous, in the widest type.
        found_inf: What the GradScaler left with a fused optimizer: 1 where the step is skipped.
    """
    if table.mask is not None:
        factors = factors.masked_fill(table.mask.logical_not(), 1.0)
    if found_inf is not None:
        factors = factors.masked_fill(found_inf.to(factors.device) > 0, 1.0)
    _kernels(table).multiply(table, factors)


def _kernels(table: Table) -> Kernels:
    kernels = kernels_for(table.tensors.device.type)
    assert kernels is not None  # or there would be no table
    return kernels
