"""Weights stored in float32 and widened at each read: the same numbers as a float64 copy, in less memory."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.invariance.probe import Probe
from normwise.invariance.scale_gradients import scale_gradients
from normwise.invariance.stand_ins import CHUNK

pytestmark = pytest.mark.usefixtures("narrow_storage")


class Everything(nn.Module):
    """Large and small weights, read whole and by rows, tied, read twice, and held in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(1500, 96, padding_idx=3)
        self.lstm = nn.LSTM(96, 8, batch_first=True)
        self.up, self.conv = nn.Linear(96, 1200), nn.Conv1d(96, 96, 3, padding=1)
        self.down = nn.Linear(1200, 96, bias=False)
        self.gain = nn.Parameter(torch.rand(()) + 1)
        self.head = nn.Linear(96, 1500)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.emb(ids)
        w = self.conv.weight - self.conv.weight.mean((1, 2), keepdim=True)
        x = x + F.conv1d(x.transpose(1, 2), w, self.conv.bias, padding=1).transpose(1, 2)
        x = x + self.down(torch.tanh(self.up(x))) * self.gain
        return self.head(x), self.lstm(x)[0]


def test_outputs_and_gradients_are_those_of_a_float64_copy() -> None:
    torch.manual_seed(0)
    net, ids = Everything(), torch.randint(0, 1500, (2, 7))
    ids[0, 0] = 3
    probe = Probe(net, [ids], lambda model, batch: model(batch), torch.float64)
    arrived: dict[int, Tensor] = {}

    def receive(index: int, gradient: Tensor, rows: slice | Tensor) -> None:
        whole = arrived.setdefault(index, torch.zeros(probe.parameters[index].shape, dtype=torch.float64))
        whole[rows if whole.ndim else ...] += gradient

    with probe:
        probe.move_to(0)
        probe.narrow.on_gradient = receive
        stored = {n: p.dtype for n, p in zip(probe.names, probe.parameters, strict=True)}
        # a list holds an LSTM's weights, which no read can be seen of
        assert {n for n, d in stored.items() if d == torch.float64} == {n for n in stored if "lstm" in n}
        found = probe.outputs()
        cotangents = [torch.randn_like(t) for t in found]
        for keep in (True, False):
            arrived.clear()
            for p in probe.parameters:
                p.grad = None
            probe.backward(found, cotangents, real_eps=False, keep=keep)
        for index, p in enumerate(probe.parameters):
            if p.grad is not None:
                arrived[index] = p.grad
        values = [p.detach().double() for p in probe.parameters]
    reference = copy.deepcopy(net).double()
    with torch.no_grad():
        for p, value in zip(reference.parameters(), values, strict=True):
            p.copy_(value)
    outputs = reference(ids)
    torch.autograd.backward(outputs, cotangents)
    for output, reference_output in zip(found, outputs, strict=True):
        torch.testing.assert_close(output, reference_output, rtol=1e-12, atol=1e-12)
    for index, (name, p) in enumerate(reference.named_parameters()):
        assert p.grad is not None
        torch.testing.assert_close(arrived[index], p.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_scaled_weights_are_not_rounded() -> None:
    """By a factor that float32 cannot tell from 1, for every kind of read; and it ends with the context."""
    torch.manual_seed(0)
    net, ids, factor = Everything(), torch.randint(0, 1500, (2, 7)), 1 + 2.0**-26
    reference = copy.deepcopy(net).double()
    probe = Probe(net, [ids], lambda model, batch: model(batch), torch.float64)
    with probe, torch.no_grad():
        probe.move_to(0)
        before = probe.outputs(gradients=False)
        for p, stored in zip(reference.parameters(), probe.parameters, strict=True):
            p.copy_(stored)
        for index, p in enumerate(reference.parameters()):
            with probe.scaled({index: factor}):
                found = probe.outputs(gradients=False)
            value = p.clone()
            p.mul_(factor)
            # the change of the outputs, which is 1e-8 of them
            for old, output, expected in zip(before, found, reference(ids), strict=True):
                change, rounding = output - old, 1e-14 * float(old.norm())
                assert float((change - (expected - old)).norm()) <= 1e-4 * float(change.norm()) + rounding
            p.copy_(value)
        for old, output in zip(before, probe.outputs(gradients=False), strict=True):
            assert torch.equal(old, output)


class Conv1D(nn.Module):
    """The transposed layer of transformers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sums_from_activations_are_those_of_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(96, 1100), nn.Linear(1100, 96, bias=False)
    again = nn.Linear(96, 1100, bias=False)
    again.weight = first.weight  # read twice
    net = nn.Sequential(first, nn.Tanh(), last, again, nn.ReLU(inplace=True), Conv1D(1100, 96))
    probe = Probe(net, [torch.randn(2, 3, 96)], lambda model, batch: model(batch), dtype)
    everything = set(range(len(probe.parameters)))
    sent: list[int] = []
    with probe:
        by_gradients, by_activations, by_both = (
            list(scale_gradients(probe, 0, 2, everything, squares=squares)) for squares in (None, 0, 1)
        )
        probe.narrow.on_sums = lambda index, rows, columns: sent.append(index)
        outputs = probe.outputs()
        probe.backward(outputs, [torch.ones_like(t) for t in outputs], real_eps=False, keep=False)
    assert sorted(sent) == [0, 2, 3]  # not where an activation overwrites the layer's output
    assert [row.has_squares for row in by_both] == [True, False]
    np.testing.assert_array_equal(by_both[0].squares, by_gradients[0].squares)
    for a, b, c in zip(by_gradients, by_activations, by_both, strict=True):
        for other in (b, c):
            np.testing.assert_allclose(a.sums, other.sums, rtol=tolerance, atol=tolerance * 1e-3)
            assert a.units.keys() == other.units.keys()
            for place, units in a.units.items():
                np.testing.assert_allclose(
                    units.scale, other.units[place].scale, rtol=10 * tolerance, atol=tolerance * 1e-2
                )


def test_one_object_while_it_lives_and_settings_on_parameters() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.a.weight.factor = 2.0  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.a.weight, self.b.weight
            assert one is two
            assert all(p.dtype == torch.float64 for p in self.parameters())
            assert dict(self.a._parameters.items())["weight"].dtype == torch.float64  # type: ignore[union-attr]
            with torch.no_grad():
                assert not self.a.weight.requires_grad
            out: Tensor = F.normalize(self.b(self.a(x)), dim=-1) * one.factor  # type: ignore[attr-defined]
            return out

    inv = nw.find_invariances(Asks(), [torch.randn(5, 3)])
    assert inv.scale_invariant == {"a.weight": None}
    assert inv.stats.dtype == "float64"


def test_functional_transforms_get_a_float64_copy() -> None:
    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            def energy(row: Tensor) -> Tensor:
                return F.normalize(F.linear(row, self.w), dim=-1).square()[0]

            out: Tensor = torch.func.vmap(torch.func.grad(energy))(x)
            return out

    inv = nw.find_invariances(Transformed(), [torch.randn(6, 3)])
    assert inv.stats.dtype == "float64"
    assert inv.scale_invariant == {"w": None}


@pytest.mark.parametrize("kind", ["linear", "convolution", "vocabulary"])
@pytest.mark.one_in(3)
def test_memory_is_at_most_twice_the_models_own_beyond_the_forward_pass(kind: str) -> None:
    from benchmarks.invariance_memory import beyond

    torch.manual_seed(0)
    batches = [torch.randn(2, 1024), torch.randn(2, 1024)]
    net: nn.Module
    if kind == "linear":
        net = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(1024, 1024), nn.ReLU())))
    elif kind == "convolution":
        batches = [x.view(2, 256, 2, 2) for x in batches]
        net = nn.Sequential(
            *(layer for _ in range(12) for layer in (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()))
        )
    else:
        net = nn.Sequential(nn.Embedding(20000, 256), nn.LayerNorm(256), nn.Linear(256, 20000, bias=False))
        net[2].weight = net[0].weight
        batches = [torch.randint(0, 20000, (2,)) for _ in range(2)]
    size = sum(p.numel() for p in net.parameters()) * 4
    assert size > 16 * CHUNK  # small pieces do not count
    found = beyond(net, batches, lambda model, batch: model(batch), joint=False)
    assert found.beyond <= 2.0 * size, found


def test_a_graph_that_no_backward_pass_runs_is_freed_at_once() -> None:
    seen: list[Any] = []
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    probe = Probe(net, [torch.randn(5, 3)], lambda model, batch: model(batch), torch.float64)
    gc.collect()
    gc.disable()
    try:
        with probe:
            probe.move_to(0)
            probe.outputs(gradients=False)
            probe.release()
        assert seen[0]() is None
    finally:
        gc.enable()
