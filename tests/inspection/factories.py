"""What the tests of ``normwise inspect`` name on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tests.invariance.networks import CASES
from torch import nn

gpt = CASES["qk_norm_packed"].build
resnet = CASES["resnet"].build
a_model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
number = 3


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x + self.emb(ids))
        return out


def raising() -> nn.Module:
    raise KeyError("no such\nsetting")


def stopping() -> nn.Module:
    raise SystemExit("usage: give an argument")


class _Asserting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("three\nlines\nof it")


def asserting() -> nn.Module:
    return _Asserting(3, 2)


def lazy_batches() -> Iterator[torch.Tensor]:
    yield torch.randn(8, 3, 8, 8)
    raise KeyError("x")


def mappings() -> list[Any]:
    return [{"image": torch.randn(8, 3)}]


def image(model: nn.Module, batch: Any) -> Any:
    return model(batch["image"])


def text() -> str:
    return "a model"


def batches() -> list[Any]:
    return [torch.randn(8, 3, 8, 8)]


class Block(nn.Module):
    """Without the way around, 75 of these would tell of the first ones too little to find symmetries."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + nn.functional.gelu(self.norm(self.linear(x)))
        return out


def deep() -> nn.Module:
    """Return a network of 100 parameters."""
    return nn.Sequential(*(Block() for _ in range(25)))
