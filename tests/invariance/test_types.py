"""Parameters of any shape and type: scalars, complex numbers, and types that have no gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.invariance.checks import (
    assert_every_parameter_has_one_verdict,
    assert_same_space,
    same,
    snapshot,
)
from torch import Tensor, nn

import normwise as nw


class Scalars(nn.Module):
    """A temperature, a ReZero gate that starts at zero, and a scalar that a norm removes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.branch, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.temperature, self.gate = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.0))
        self.removed = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.removed * self.fc(x), dim=-1)
        x = x + self.gate * torch.tanh(self.branch(x))
        return self.temperature * F.relu(self.head(x))


def test_scalar_parameters() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Scalars(), [torch.randn(8, 4)])
    assert inv.undetermined == {}
    assert inv.scale_invariant == {"removed": None}
    pairs = [{"fc.weight": 1, "fc.bias": 1}, {"head.weight": 1, "head.bias": 1, "temperature": -1}]
    assert_same_space(inv.joint, pairs, inv.names)
    assert_every_parameter_has_one_verdict(inv)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype: torch.dtype) -> None:
    class Spectral(nn.Module):
        rotation: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Parameter(torch.randn(6, 6, dtype=dtype)) for _ in range(3))
            self.bias = nn.Parameter(torch.zeros(6, dtype=dtype))
            self.register_buffer("rotation", torch.exp(1j * torch.arange(6)).to(dtype))
            self.gain = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.fft(x).to(dtype) @ self.one * self.rotation
            z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
            z = z @ self.two + self.bias
            z = (z - z.mean(0)) @ self.three
            out: Tensor = (self.gain * z).abs()
            return out

    torch.manual_seed(0)
    net, x = Spectral(), torch.randn(8, 6)
    before = snapshot(net)
    inv = nw.find_invariances(net, [x])
    assert same(before, snapshot(net))
    assert inv.stats.dtype == "float64"
    assert inv.undetermined == {}
    assert inv.scale_invariant == {"one": None}
    assert inv.no_effect == {"bias"}
    assert inv.units(net) == []
    assert "one" in str(nw.plan(net, [x]))
    assert_same_space(inv.joint, [{"two": 1, "three": -1}, {"gain": 1, "three": -1}], inv.names)
    assert_every_parameter_has_one_verdict(inv)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_parameters_that_cannot_be_probed_are_listed(dtype: torch.dtype) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(torch.randn(4, 4).mul(4).to(dtype), requires_grad=False)
            self.adapter, self.norm = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(F.linear(x, self.base.to(x.dtype)) * 0 + self.adapter(x))
            return out

    torch.manual_seed(0)
    net, x = Quantised(), torch.randn(8, 4)
    inv = nw.find_invariances(net, [x])
    assert inv.names == [name for name, _ in net.named_parameters()]
    assert inv.frozen == set(inv.undetermined) == {"base"}
    assert str(dtype) in inv.undetermined["base"]
    assert inv.scale_invariant == {"adapter.weight": None}
    assert_every_parameter_has_one_verdict(inv)
    assert "base" in str(nw.plan(net, [x]))
