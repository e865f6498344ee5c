"""What gradients say at the probed points and large factors refute: clamps, and outputs that are signs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class ClampedBranch(nn.Module):
    """Below the clamp, ``inp`` alone has no scale, nor have ``gate`` and ``up`` together."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up = nn.Linear(5, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.gate, self.head = nn.Parameter(torch.ones(())), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + self.gate * F.relu6(self.up(h))
        return self.head(F.layer_norm(h, (8,)))  # type: ignore[no-any-return]


class ClampedAfterGain(nn.Module):
    """Below the clamp, neither the gain nor ``up`` has a scale; in truth only both together have none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(5), nn.Linear(5, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.up(0.3 * self.norm(x)))
        return self.head(F.layer_norm(h, (8,)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("build", "joint"),
    [
        (ClampedBranch, {"inp.weight": 1, "gate": 1, "up.weight": -1}),
        (ClampedAfterGain, {"norm.weight": 1, "up.weight": -1}),
    ],
)
def test_below_a_clamp(build: type[nn.Module], joint: dict[str, int], seed: int) -> None:
    torch.manual_seed(seed)
    inv = nw.find_invariances(build(), [torch.randn(16, 5)])
    assert inv.scale_invariant == {}
    assert inv.undetermined == {}
    assert [{name: abs(e) for name, e in s.items()} for s in inv.joint] == [
        {name: abs(e) for name, e in joint.items()}
    ]
    (found,) = inv.joint
    assert all(found[name] * found["up.weight"] == -e for name, e in joint.items() if name != "up.weight")
    assert any(e.reason.endswith("as below a clamp") for e in inv.evidence.values())


class OneSign(nn.Module):
    """A vector of one element has no direction but its sign: all gradients are rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.last(torch.tanh(self.first(x))), dim=-1)


def test_rounding_errors_of_an_output_that_is_a_sign_are_no_gradients() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(OneSign(), [torch.randn(16, 6)])
    assert inv.not_invariant == set()
    assert inv.scale_invariant == {}
    assert all("its gradient is zero" in reason for reason in inv.undetermined.values())
    assert inv.joint == []


class ProductBeforeNorm(nn.Module):
    """Halved, ``inp`` divides the variance of the product by 16: soon no eps is small beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.head(self.norm(self.a(h) * self.b(h) * self.a(h)))  # type: ignore[no-any-return]


def test_small_factors_on_a_product_before_a_norm() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(ProductBeforeNorm(), [0.1 * torch.randn(16, 5)])
    assert inv.joint == [{"inp.weight": 1, "inp.bias": 1}]
    assert inv.unconfirmed_joint == []


def test_several_false_symmetries_are_refuted_one_after_the_other() -> None:
    """Each is refuted in another trial, and what is right stays."""
    torch.manual_seed(0)
    widths = [5, 8, 8, 8, 8]
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU6())]
    net = nn.Sequential(*layers, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    inv = nw.find_invariances(net, [0.1 * torch.randn(16, 5)])
    assert inv.joint == [{"8.weight": 1, "8.bias": 1, "10.weight": -1}]
