"""A small weight-normalised network, and its training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import normwise as nw

BATCHES = [torch.randn(6, 6, generator=torch.Generator().manual_seed(k)) for k in range(8)]
SHRUNK = {"0.parametrizations.weight.original1": 0, "2.weight": 0, "4.weight": None}


def network() -> nn.Sequential:
    """A weight-normalised layer, one before a layer norm, and a head."""
    torch.manual_seed(1)
    first = nw.weight_norm(nn.Linear(6, 9))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(9, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 3))


def units_of(model: nn.Module) -> list[nw.Unit]:
    """Return the units, by name: the same for any sharding."""
    named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
    return [nw.Unit(named[name], dim) for name, dim in SHRUNK.items()]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], clip: float | None = None
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
