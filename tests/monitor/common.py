"""A small network before batch norm, its batches, and a tracker that keeps what it gets."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.monitor.finding import Finding

BATCHES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(k)) for k in range(12)]


def network(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    layers = (
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.BatchNorm1d(7),
        nn.Linear(7, 3),
    )
    return nn.Sequential(*layers).to(dtype)


@functools.cache
def _plan(dtype: torch.dtype) -> nw.Plan:
    return nw.plan(network(dtype), [batch.to(dtype) for batch in BATCHES[:1]], progress=False)


def plan_of(model: nn.Module) -> nw.Plan:
    """Return the plan of :func:`network`, which is found once, for this copy of it."""
    return _plan(next(model.parameters()).dtype).apply_to(model)


class Kept:
    """A tracker that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.findings: list[Finding] = []
        self.settings: dict[str, Any] = {}
        self.closed = False

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def finding(self, finding: Finding) -> None:
        self.findings.append(finding)

    def close(self) -> None:
        self.closed = True

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - 1).square().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor] = BATCHES) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
