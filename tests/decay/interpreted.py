"""Compares the kernels for CUDA with their stand-in; run with TRITON_INTERPRET=1, as test_kernels.py does."""

from __future__ import annotations

import torch
from tests.decay.by_table import StandIn
from tests.decay.test_tables import DTYPES, units

from normwise.decay import kernels
from normwise.decay.table import Table


def compare(dtype: torch.dtype) -> None:
    """Squares within 8 ULP of float64; products to the bit (the interpreter truncates bfloat16)."""
    its = units(dtype)
    table = Table(its)
    torch.testing.assert_close(kernels.squares(table), StandIn().squares(table), rtol=8 * 2**-52, atol=0)
    before = [[param.detach().clone() for param in unit.params] for unit in its]
    factors = torch.rand(table.count, dtype=torch.float64)
    StandIn().multiply(table, factors)
    expected = [[param.detach().clone() for param in unit.params] for unit in its]
    for unit, starts in zip(its, before, strict=True):
        for param, start in zip(unit.params, starts, strict=True):
            param.data.copy_(start)
    kernels.multiply(table, factors)
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    for unit, results in zip(its, expected, strict=True):
        for param, result in zip(unit.params, results, strict=True):
            torch.testing.assert_close(param.detach(), result, rtol=rtol, atol=0)


if __name__ == "__main__":
    for kind in DTYPES:
        compare(kind)
