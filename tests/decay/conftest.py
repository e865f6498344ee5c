"""Every test of this room starts from the same random state."""

from __future__ import annotations

import pytest
import torch
from tests.decay.by_table import StandIn

from normwise.decay import batched


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def by_table(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Take tensors on the CPU by table, as those on CUDA are."""
    stand_in = StandIn()
    monkeypatch.setattr(batched, "kernels_for", lambda _: stand_in)
    return stand_in
