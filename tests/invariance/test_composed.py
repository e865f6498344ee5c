"""Random networks composed of known blocks, whose symmetries are known by construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.invariance.checks import assert_same_space
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normwise as nw

NORMS = ["none", "layer", "rms", "batch", "weight"]
WIDTH = 6


class Layer(nn.Module):
    """A linear layer, a norm of its output, an activation."""

    def __init__(self, norm: str, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(WIDTH, WIDTH, bias=bias)
        if norm == "weight":
            self.linear = parametrizations.weight_norm(self.linear)
        kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}
        self.norm = kinds[norm](WIDTH) if norm in kinds else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        return F.relu(x) if self.activation == "relu" else F.gelu(x)


Spec = tuple[str, str, bool]


def known(specs: list[Spec]) -> tuple[dict[str, int | None], set[str], list[dict[str, int]]]:
    """Return scale-invariant, no effect and joint symmetries of the layers ``specs`` with a linear head.

    If its activation is a ReLU, the output of a layer can be scaled, by scaling what it is proportional to
    (``writes``). The next layer compensates by its weight, unless a norm follows and removes the scale.
    """
    alone: dict[str, int | None] = {}
    nothing: set[str] = set()
    joint: list[dict[str, int]] = []
    carried: dict[str, int] | None = None  # scales the input of the layer at hand
    for i, (norm, activation, bias) in enumerate(specs):
        name = f"{i}.linear"
        weight = f"{name}.parametrizations.weight.original0" if norm == "weight" else f"{name}.weight"
        if norm == "weight":
            alone[f"{name}.parametrizations.weight.original1"] = 0
        biases = [f"{name}.bias"] if bias else []
        if norm == "batch":
            alone[weight] = 0
            nothing |= set(biases)
            if carried:
                joint.append(carried)
        elif norm in ("layer", "rms"):
            # The product is normalised: with its bias it scales freely.
            if biases:
                joint.append(dict.fromkeys([weight, *biases], 1))
                if carried:
                    joint.append({**carried, weight: -1})
            else:
                alone[weight] = None
                if carried:
                    joint.append(carried)
        elif carried:
            joint.append({**carried, weight: -1})
        writes = [weight, *biases] if norm in ("none", "weight") else [f"{i}.norm.weight"]
        writes += [f"{i}.norm.bias"] if norm in ("layer", "batch") else []
        carried = dict.fromkeys(writes, 1) if activation == "relu" else None
    if carried:
        joint.append({**carried, f"{len(specs)}.weight": -1})
    # A symmetry with one member says that this tensor is invariant alone. Then other symmetries hold without
    # it as well, which may leave them with one member too.
    while single := {name for s in joint if len(s) == 1 for name in s}:
        alone |= dict.fromkeys(single)
        joint = [kept for s in joint if (kept := {n: e for n, e in s.items() if n not in single})]
    return alone, nothing, [s for s in joint if len(s) > 1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(NORMS), st.sampled_from(["relu", "gelu"]), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_symmetries_of_composed_networks(specs: list[Spec], seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*(Layer(*spec) for spec in specs), nn.Linear(WIDTH, 5))
    inv = nw.find_invariances(net, [torch.randn(24, WIDTH), torch.randn(24, WIDTH)], progress=False)
    alone, nothing, joint = known(specs)
    assert inv.undetermined == {}
    assert inv.scale_invariant == alone
    assert inv.no_effect == nothing
    assert_same_space(inv.joint, joint, inv.names)


class Powers(nn.Module):
    """The outer weight enters by an irrational power: inner and outer balance with exponents 1 and −1/√2."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.inner(x))
        size: Tensor = self.outer.weight.abs() ** 2**0.5
        return hidden @ size.T


def test_symmetries_without_small_integers_are_counted_and_warned_of() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="1 of 1 joint symmetries have no small integers for exponents"):
        inv = nw.find_invariances(Powers(), [torch.randn(16, WIDTH)])
    assert inv.joint == []
    assert inv.unnamed_joint == 1
    assert "no small integers" in str(inv)
