"""Every test of this room starts from the same random state."""

from __future__ import annotations

import pytest
import torch
from tests.decay.by_table import StandIn, use_kernels


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def by_table(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Take tensors on the CPU by table, as those on CUDA are."""
    stand_in = StandIn()
    use_kernels(monkeypatch, lambda _: stand_in)
    return stand_in
