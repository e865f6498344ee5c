"""Rules, modes, weights, gradients and an optimizer that several test files share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normwise as nw
from normwise.decay.rules import MODES, Rule

RULES: list[Rule] = [
    nw.L2(0.1),
    nw.AdaptiveWeightShrink(0.05),
    nw.PowerShrink(0.02, 1.5),
    nw.EpsilonShiftedL2(0.1, 0.3),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
each_mode = pytest.mark.parametrize("mode", MODES)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))


def gradients(like: Tensor, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(like.shape, generator=generator) for _ in range(steps)]


class Idle(Optimizer):
    """An optimizer that moves nothing, so that every operation of a step is the rule's."""

    def __init__(self, params: list[nn.Parameter], lr: float | Tensor) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass
