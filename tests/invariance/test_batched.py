"""One backward pass for several cotangents gives what one pass for each gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.invariance.networks import CASES
from torch import Tensor, nn

import normwise as nw
from normwise.invariance import joint
from normwise.invariance.probe import Probe
from normwise.invariance.scale_gradients import batched_scale_gradients, scale_gradients


@pytest.mark.parametrize("name", ["resnet", "prenorm_packed_tied", "moe", "lstm", "unet"])
def test_batched_passes_equal_single_ones(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    probe = Probe(
        case.build(), case.batches(), lambda m, b: m(*b) if isinstance(b, tuple) else m(b), torch.float64
    )
    with probe:
        probe.widen()
        probe.move_to(20)
        members = list(range(len(probe.parameters)))
        try:
            batched = batched_scale_gradients(probe, 21, 3, set(members), members)
        except RuntimeError:
            assert name == "lstm"  # its backward function cannot be batched
            return
        single = list(scale_gradients(probe, 21, 3, set(members), moved=members, squares=0))
    for a, b in zip(batched, single, strict=True):
        np.testing.assert_array_equal(a.reached, b.reached)
        np.testing.assert_allclose(a.sums, b.sums, rtol=1e-8, atol=1e-12)
        assert a.units.keys() == b.units.keys()
        for place, units in a.units.items():
            np.testing.assert_allclose(units.scale, b.units[place].scale, rtol=1e-7, atol=1e-12)


class _Doubled(torch.autograd.Function):
    """A derivative that no batch can go through, or that is wrong in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(gradient):
            if _Doubled.raises:  # type: ignore[attr-defined]
                raise RuntimeError("no batches")
            return 3 * gradient
        return 2 * gradient


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(_Doubled.apply(self.a(x)) + x.sum()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("raises", [True, False])
def test_a_derivative_that_does_not_allow_batches_is_used_one_by_one(
    raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Doubled.raises = raises  # type: ignore[attr-defined]
    torch.manual_seed(0)
    net, x = _Net(), torch.randn(16, 4)
    found = nw.find_invariances(net, [x])
    monkeypatch.setattr(joint, "_BATCHED_VALUES", 0)
    assert found.joint == nw.find_invariances(net, [x]).joint == []


def test_large_models_are_not_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("batched")

    monkeypatch.setattr(joint, "batched_scale_gradients", refuse)
    monkeypatch.setattr(joint, "_BATCHED_VALUES", 100)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert nw.find_invariances(net, [torch.randn(8, 4)]).joint == [
        {"0.weight": 1, "0.bias": 1, "2.weight": -1}
    ]
