"""Gradients that are not those of the outputs: rounding and signs with straight-through estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class BinaryWeights(nn.Module):
    """Only the signs of the first weight have an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        weight = weight + (weight.sign() - weight).detach()
        return self.last(torch.tanh(F.linear(x, weight, self.first.bias)))  # type: ignore[no-any-return]


class BinaryActivations(nn.Module):
    """Rows of the first weight have no scale, as only the signs of its outputs are used."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, hidden, bias=False), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Sign.apply(self.first(x)))  # type: ignore[no-any-return]


def _wide() -> nn.Module:
    """Return a network whose first layer is widened a few rows at a time."""
    return BinaryActivations(20_000)


@pytest.mark.parametrize("build", [BinaryWeights, BinaryActivations, _wide])
def test_rescaling_decides_where_the_gradient_is_not_that_of_the_outputs(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(build(), [torch.randn(16, 6)])
    assert inv.scale_invariant == {"first.weight": 0}
    assert inv.evidence["first.weight"].reason.startswith("by rescaling alone")
    assert {"last.weight", "last.bias"} <= inv.not_invariant
    assert inv.joint == []


class CentersGradientsOnly(nn.Module):
    """The gradients of the first weight have zero sums over rows, but a shift of a row has an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.first.weight.mean(1, keepdim=True)
        weight = self.first.weight - mean + mean.detach()
        return self.last(torch.tanh(F.linear(x, weight, self.first.bias)))  # type: ignore[no-any-return]


def test_a_shift_that_changes_outputs_is_no_invariance_whatever_the_gradients_say() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(CentersGradientsOnly(), [torch.randn(16, 6)])
    assert inv.shift_invariant == set()
    assert inv.evidence["first.weight"].shift_residual < 1e-9
    assert inv.not_invariant == set(inv.names)


class FaintBranch(nn.Module):
    """A branch whose effect is real, but whose differences are rounding errors of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x)) + 3e-12 * self.branch(x).exp()  # type: ignore[no-any-return]


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class DoubledGradient(nn.Module):
    """A branch with twice its gradient, whose effect is smaller than what counts as no change."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x)) + 3e-6 * _Doubled.apply(self.branch(x))  # type: ignore[no-any-return]


def test_a_wrong_gradient_with_an_effect_is_no_invariance() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(DoubledGradient(), [torch.randn(16, 6)], joint=False)
    assert inv.not_invariant == set(inv.names)


def test_kinks_do_not_make_a_gradient_false() -> None:
    """Steps of 1e-4 cross many; to look for each parameter by bisection took minutes for a ResNet-50."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(20)]
    net, calls = nn.Sequential(*layers, nn.Linear(64, 3)), []

    def forward(model: nn.Module, x: Tensor) -> Any:
        calls.append(x)
        return model(x)

    inv = nw.find_invariances(net, [torch.randn(6, 64)], forward, joint=False)
    assert len(inv.scale_invariant) == 20
    assert len(calls) < 25


def test_rounding_errors_of_the_outputs_do_not_make_a_gradient_false() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(FaintBranch(), [torch.randn(16, 6)], joint=False)
    assert inv.not_invariant == set(inv.names)
