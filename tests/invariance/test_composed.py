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

    What a layer puts out in proportion (``writes``) can be scaled if its activation is a ReLU, against
    what the next layer's first product is proportional to; where a norm follows that product, the
    proportion ends there.
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
    # One member: it is invariant alone, as a tensor.
    # Another symmetry holds without it too, which may leave that one with one member.
    while single := {name for s in joint if len(s) == 1 for name in s}:
        alone |= dict.fromkeys(single)
        joint = [kept for s in joint if (kept := {n: e for n, e in s.items() if n not in single})]
    return alone, nothing, [s for s in joint if len(s) > 1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_integer_basis_spans_the_null_space_of_any_small_symmetries(data: st.DataObject) -> None:
    import numpy as np

    from normwise.invariance.symmetries import integer_basis, null_space

    columns = data.draw(st.integers(3, 9))
    count = data.draw(st.integers(1, columns - 1))
    entries = st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=columns, max_size=columns)
    planted = np.array([data.draw(entries) for _ in range(count)])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    _, values, vectors = np.linalg.svd(planted, full_matrices=True)
    rank = int(np.sum(values > 1e-9))
    rows = rng.normal(size=(columns + 8, columns - rank)) @ vectors[rank:]
    live = np.linalg.norm(rows, axis=0) > 1e-9
    found = integer_basis(rows[:, live], null_space(rows[:, live], 1e-6), 1e-6)
    assert len(found) == int(live.sum()) - (columns - rank)
    for vector in found:
        assert np.abs(rows[:, live] @ vector).max() < 1e-6


def test_groups_agree_with_a_linear_program() -> None:
    import numpy as np
    from scipy.optimize import linprog

    from normwise.invariance.symmetries import jointly_invariant_groups

    rng = np.random.default_rng(0)
    for _ in range(30):
        basis = [v for v in rng.integers(-1, 2, size=(3, 7)) if v.any()]
        if np.linalg.matrix_rank(np.array(basis)) < len(basis):
            continue
        groups = jointly_invariant_groups(basis)
        covered = np.any(np.array(groups) > 0, axis=0) if groups else np.zeros(7, dtype=bool)
        span = np.array(basis, dtype=float)
        for group in groups:
            assert (group >= 0).all()
            assert np.linalg.matrix_rank(np.vstack([span, group])) == len(basis)
        for k in range(7):
            best = linprog(-span[:, k], A_ub=-span.T, b_ub=np.zeros(7), bounds=[(-1, 1)] * len(basis))
            assert covered[k] == (best.fun < -1e-9)


class Powers(nn.Module):
    """One weight enters by an irrational power: it balances the other with exponents 1 and −√2."""

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
