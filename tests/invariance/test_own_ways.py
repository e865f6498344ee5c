"""Models that read weights, draw numbers, write an eps or take derivatives in ways of their own."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class Reads(nn.Module):
    """Two layers, and a function that computes the outputs from their weights."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.list = nn.ParameterList([torch.randn(6, 4), torch.randn(3, 6)])
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def _sliced(net: Any, x: Tensor) -> Tensor:
    h = F.relu(x @ net.list[0].T)
    for weight in net.list[1:]:
        h = h @ weight.T
    return h


def _without_graph(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = net.a.weight
    return net.head(F.relu(F.linear(x, weight)))  # type: ignore[no-any-return]


def _toggled(net: Any, x: Tensor) -> Tensor:
    net.head.weight.requires_grad_(False)
    h = net.head(F.relu(net.a(x)))
    net.head.weight.requires_grad_(True)
    return 0 * h.detach() + net.head(F.relu(net.a(x)))  # type: ignore[no-any-return]


def _shared(net: Any, x: Tensor) -> Tensor:
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = net.a.weight
    return net.head(F.relu(layer(x)))  # type: ignore[no-any-return]


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a slice of a list": _sliced,
    "read without a graph": _without_graph,
    "requires_grad toggled": _toggled,
    "another module": _shared,
    "get_parameter": lambda net, x: net.head(F.relu(F.linear(x, net.get_parameter("a.weight")))),
    "is_leaf": lambda net, x: net.head((F.relu if net.a.weight.is_leaf else torch.tanh)(net.a(x))),
    "a copy beside": lambda net, x: net.head(F.relu(net.a(x))) + 0 * copy.deepcopy(net.a)(x).sum().detach(),
}


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_read_in_unusual_ways(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Reads(READS[kind]).to(dtype), [torch.randn(8, 4, dtype=dtype)])
    first, second = ("list.0", "list.1") if kind == "a slice of a list" else ("a.weight", "head.weight")
    assert inv.undetermined == {}
    assert inv.joint in ([{first: 1, second: -1}], [{first: -1, second: 1}])


@pytest.mark.usefixtures("narrow_storage")
@pytest.mark.parametrize(
    "kind", ["requires_grad toggled", "another module", "get_parameter", "a copy beside"]
)
def test_large_models_get_a_copy_too_if_they_refuse_reads_that_are_no_parameters(kind: str) -> None:
    test_weights_that_are_read_in_unusual_ways(kind, torch.float32)


class Projects(nn.Module):
    """The rows of the weight are projected to the sphere in each forward pass: their scale has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.div_(self.a.weight.norm(dim=1, keepdim=True))
        return self.head(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def test_weights_that_the_forward_pass_writes() -> None:
    torch.manual_seed(0)
    net = Projects()
    before = net.a.weight.detach().clone()
    assert nw.find_invariances(net, [torch.randn(8, 4)]).scale_invariant == {"a.weight": 0}
    assert torch.equal(net.a.weight, before)


class InnerGradient(nn.Module):
    """The gradient of a norm has degree zero: the scale of the weight has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.a.weight
        (gradient,) = torch.autograd.grad(F.linear(x, w).norm(), [w], create_graph=True)
        return self.head(torch.tanh(F.linear(x, gradient)))  # type: ignore[no-any-return]


class InnerStep(nn.Module):
    """A backward pass inside of forward, whose gradient is used as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        self.a(x).square().sum().backward()
        assert x.grad is not None
        return self.head(F.relu(self.a(x.detach() + 0 * x.grad)))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("either_storage")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_inside_of_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=dtype)
    assert nw.find_invariances(InnerGradient().to(dtype), [x]).scale_invariant == {"a.weight": None}
    inv = nw.find_invariances(InnerStep().to(dtype), [x])
    assert inv.joint == [{"a.weight": 1, "a.bias": 1, "head.weight": -1}]


class Guided(nn.Module):
    """Sometimes a learned vector takes the place of the input, for a whole batch."""

    def __init__(self, draw: Callable[[], bool]) -> None:
        super().__init__()
        self.null, self.inp, self.head = nn.Parameter(torch.randn(6)), nn.Linear(4, 6), nn.Linear(6, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.null.expand(len(x), -1) if self.draw() else F.leaky_relu(self.inp(x))
        return self.head(h)  # type: ignore[no-any-return]


DRAWS: dict[str, Callable[[], bool]] = {
    "rand": lambda: bool(torch.rand(()) < 0.1),
    "item": lambda: torch.rand(1).item() < 0.1,
    "bernoulli": lambda: bool(torch.bernoulli(torch.tensor(0.1))),
    "randint": lambda: int(torch.randint(10, ())) == 0,
    "python": lambda: random.random() < 0.1,
    "numpy": lambda: np.random.rand() < 0.1,  # noqa: NPY002 - what models use
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_branch_that_is_rarely_taken(kind: str) -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Guided(DRAWS[kind]), [torch.randn(8, 4)])
    assert inv.no_effect == set()
    assert inv.joint in (
        [{"null": sign, "inp.weight": sign, "inp.bias": sign, "head.weight": -sign}] for sign in (1, -1)
    )


def test_rounding_errors_do_not_end_the_look_for_rare_branches() -> None:
    """The bias before the batch norm has a gradient that is a rounding error, in every pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.nulls = nn.ParameterList([torch.randn(6) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            h = F.leaky_relu(self.norm(self.inp(x)))
            choice = random.randrange(20)
            return self.head(self.nulls[choice].expand(len(x), -1) if choice < 3 else h)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inv = nw.find_invariances(Net(), [torch.randn(16, 4)])
    assert inv.no_effect == {"inp.bias"}
    (found,) = inv.joint
    assert {name: e * found["norm.weight"] for name, e in found.items()} == {
        **dict.fromkeys(["norm.weight", "norm.bias", "nulls.0", "nulls.1", "nulls.2"], 1),
        "head.weight": -1,
    }


def test_a_layer_that_rarely_runs() -> None:
    class Rarely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out + self.b(F.relu(self.a(x))) if torch.rand(()) < 0.2 else out

    inv = nw.find_invariances(Rarely(), [torch.randn(8, 4)])
    assert inv.no_effect == set()
    assert inv.joint == [{"a.weight": 1, "b.weight": -1}]


_NUMBER: Any = np.float32(1e-5)
EPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number of numpy": lambda h: h / (_mean_square(h) + _NUMBER).sqrt(),
    "an argument by name": lambda h: h / torch.add(input=_mean_square(h), other=1e-5).sqrt(),
    "a tensor": lambda h: h / (_mean_square(h).expand_as(h) + torch.full((6,), 1e-5)).sqrt(),
    "hypot": lambda h: h / torch.hypot(_mean_square(h).sqrt(), torch.tensor(3e-3)),
    "fmax": lambda h: h / torch.fmax(_mean_square(h), torch.tensor(1e-5)).sqrt(),
    "layer_norm": lambda h: F.layer_norm(h, (6,), eps=_NUMBER),
}


def _mean_square(h: Tensor) -> Tensor:
    return h.square().mean(1, keepdim=True)


@pytest.mark.parametrize("kind", EPS)
def test_forms_of_eps(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(EPS[kind](self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    assert nw.find_invariances(Net(), [torch.randn(8, 4)]).scale_invariant == {"a.weight": None}


def _written(h: Tensor) -> Tensor:
    out = torch.full_like(h, 1e-6)
    out.add_(h)
    return out


def _written_view(h: Tensor) -> Tensor:
    out = torch.full_like(h, 1e-6)
    some = out[:, :3]
    some += h[:, :3]
    return out


NO_EPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor that is written to": _written,
    "a view that is written to": _written_view,
    "a sparse matrix": lambda h: torch.add(h @ h.T, torch.eye(8).to(h).to_sparse()) @ h,
    "a tensor of larger constants": lambda h: F.relu(h + torch.full((6,), 0.01)),
}


@pytest.mark.parametrize("kind", NO_EPS)
def test_what_is_no_eps(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(NO_EPS[kind](self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inv = nw.find_invariances(Net(), [torch.randn(8, 4)])
    assert inv.not_invariant == {"a.weight", "head.weight"}
    if "written" not in kind:  # else a millionth remains
        assert inv.joint == []


@dataclasses.dataclass
class Output(dict[str, Any]):
    """Both a mapping and a dataclass, as the outputs of transformers."""

    x: Tensor

    def __post_init__(self) -> None:
        self["x"] = self.x


@dataclasses.dataclass
class Batch:
    x: Tensor
    later: Any = dataclasses.field(init=False)


class Pair(list[Tensor]):
    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__([a, b])


def test_batches_of_unusual_types() -> None:
    class Net(nn.Sequential):
        def forward(self, batch: Any, more: Any = 0.0) -> Tensor:
            if isinstance(batch, Output):
                assert batch["x"] is batch.x
            return super().forward(batch.x.mul_(1.1) if hasattr(batch, "x") else batch + more)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = Net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    for batch in (Batch(x.clone()), Output(x.clone()), Pair(x.clone(), x.clone())):
        inv = nw.find_invariances(net, [batch], (lambda m, b: m(b)) if isinstance(batch, Output) else None)
        assert inv.dtype == "float64"
        assert inv.joint == [{"0.weight": 1, "0.bias": 1, "2.weight": -1}]
        assert torch.equal(batch[0] if isinstance(batch, Pair) else batch.x, x)
