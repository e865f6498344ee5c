"""Networks that mislead a naive search: random draws, added constants, dying signals, canceling uses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.invariance.checks import assert_every_parameter_has_one_verdict, assert_same_space
from torch import Tensor, nn

import normwise as nw


class Guided(nn.Module):
    """Classifier-free guidance: a learned vector replaces the condition of 10 % of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.null, self.o = nn.Linear(5, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.o(torch.where(torch.rand(len(y), 1) < 0.1, self.null, F.relu(self.y(y))))
        return out


class Masked(nn.Module):
    """Masked modelling: a learned vector replaces 60 % of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.mask, self.o = nn.Linear(5, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        masked = torch.bernoulli(torch.full(x.shape[:2], 0.6)).bool()[..., None]
        h = torch.where(masked, self.mask, self.e(x))
        out: Tensor = self.o(torch.tanh(h + h.mean(1, keepdim=True)))
        return out


class Timed(nn.Module):
    """A diffusion model: the noise level is drawn for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.t, self.o = nn.Linear(5, 8), nn.Linear(1, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.rand(len(x), 1)
        out: Tensor = self.o(F.relu(self.x(x + t) + self.t(t - 0.5)))
        return out


DRAWS = {
    Guided: [{"null": 1, "y.weight": 1, "y.bias": 1, "o.weight": -1}],
    Masked: [],
    Timed: [{"x.weight": 1, "x.bias": 1, "t.weight": 1, "o.weight": -1}],
}


@pytest.mark.parametrize("net", DRAWS)
def test_verdicts_hold_under_the_random_draws_of_the_model(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 9, 5) if net is Masked else torch.randn(32, 5)
    inv = nw.find_invariances(net(), [x])
    assert inv.undetermined == {}
    assert inv.no_effect == set()
    assert inv.scale_invariant == {}
    assert_same_space(inv.joint, DRAWS[net], inv.names)


class Skips(nn.Module):
    """LayerDrop: a draw decides whether a layer runs at all. It counts as running."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.n, self.o = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        skip = torch.rand([]) < 0.4
        if not skip:
            x = self.n(x + self.c(F.relu(self.b(x))))
        out: Tensor = self.o(x)
        return out


def test_layers_that_are_skipped_at_random_count_as_running() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Skips(), [torch.randn(16, 6)])
    pairs = [{"b.weight": 1, "c.weight": -1}, {"n.weight": 1, "n.bias": 1, "o.weight": -1}]
    assert inv.scale_invariant == {"a.weight": None}
    assert_same_space(inv.joint, pairs, inv.names)


class Flow(nn.Module):
    """A loop with a time step of 0.01."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.time, self.g = nn.Linear(4, 8), nn.Linear(1, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        t = x.new_zeros(1, 1)
        for _ in range(20):
            x = x + 0.01 * self.g(torch.tanh(self.f(x) + self.time(t)))
            t = t + 0.01
        return x


def test_a_time_step_is_no_eps() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Flow(), [torch.randn(8, 4)])
    assert inv.not_invariant == set(inv.names)
    assert inv.joint == []


@pytest.mark.parametrize(("constant", "count"), [(1e-2, 0), (1e-6, 1)])
def test_an_added_constant_counts_as_an_eps_only_if_it_hardly_matters(constant: float, count: int) -> None:
    class Smooth(nn.Module):
        """The absolute value, smooth at zero."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b((self.a(x * 0.2).square() + constant).sqrt())
            return out

    torch.manual_seed(0)
    inv = nw.find_invariances(Smooth(), [torch.randn(16, 4)])
    assert inv.joint == [{"a.weight": 1, "b.weight": -1}][:count]
    assert len(inv.unconfirmed_joint) == 1 - count
    assert len(inv.joint_residuals) == count
    assert all(1e-9 < residual < 1e-1 for residual in inv.joint_residuals)


def test_an_eps_in_a_buffer_of_one_element() -> None:
    class Norm(nn.Module):
        eps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 8, bias=False)
            self.register_buffer("eps", torch.tensor([1e-5]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    torch.manual_seed(0)
    assert nw.find_invariances(Norm(), [torch.randn(16, 4)]).scale_invariant == {"fc.weight": None}


class Ranker(nn.Module):
    """Compares two inputs: the last bias is used twice, and cancels."""

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.offset = nn.Parameter(torch.ones(())) if scalar else None

    def score(self, x: Tensor) -> Tensor:
        score: Tensor = self.last(F.relu(self.hidden(x)))
        return score if self.offset is None else score + self.offset

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.score(a) - self.score(b)


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_two_uses_that_cancel_have_no_effect(scalar: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(8, 4, dtype=dtype), torch.randn(8, 4, dtype=dtype))
    inv = nw.find_invariances(Ranker(scalar).to(dtype), [batch])
    assert inv.scale_invariant == {}
    assert inv.no_effect == ({"last.bias", "offset"} if scalar else {"last.bias"})
    assert inv.joint == [{"hidden.weight": 1, "hidden.bias": 1, "last.weight": -1}]


@pytest.mark.parametrize(
    ("width", "depth"),
    [
        *((4, 10), (4, 30), (16, 10), (64, 10), (16, 50)),
        *(pytest.param(*sizes, marks=pytest.mark.thorough) for sizes in ((4, 60), (16, 30))),
    ],
)
def test_deep_networks_as_torch_initialises_them(width: int, depth: int) -> None:
    """The signal of the first layers is far below that of the last, or all units of a layer are dead."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    inv = nw.find_invariances(net, [torch.randn(32, width)])
    assert inv.not_invariant == set(inv.names)
    pairs = [{f"{2 * i}.weight": 1, f"{2 * i}.bias": 1, f"{2 * i + 2}.weight": -1} for i in range(depth)]
    assert_same_space(inv.joint, pairs, inv.names)
    assert_every_parameter_has_one_verdict(inv)


def test_an_effect_between_rounding_errors_and_a_clear_one() -> None:
    """No gradient arrives, as from a straight path: only other values tell, and they change little."""

    class Tiny(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) + self.size * torch.tanh(self.b(x)).detach()

    torch.manual_seed(0)
    inv = nw.find_invariances(Tiny(1e-8), [torch.randn(16, 6)])
    assert inv.undetermined.keys() == {"b.weight", "b.bias"}
    assert "its effect is tiny: other values change the outputs by" in inv.undetermined["b.weight"]
    inv = nw.find_invariances(Tiny(0.0), [torch.randn(16, 6)])
    assert inv.no_effect == {"b.weight", "b.bias"}


class Threshold(nn.Module):
    """A branch that is alive at the model's own values, and dead wherever the search moves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.w = nn.Linear(6, 5), nn.Parameter(torch.ones(1)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + F.relu(1.02 - self.gate) * self.w(x)
        return out


def test_no_effect_is_judged_at_the_models_own_values_too() -> None:
    torch.manual_seed(0)
    inv = nw.find_invariances(Threshold(), [torch.randn(16, 6)])
    assert inv.no_effect == set()
    assert {"w.weight", "w.bias"} <= inv.undetermined.keys()
