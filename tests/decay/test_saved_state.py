"""A state to continue from is either accepted and harmless, or refused in one line with nothing changed."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw
from normwise.decay.rules import Rule


class Job:
    """Two parameters, one of them masked, under a rule, after a few steps."""

    def __init__(
        self, rule: Rule, dtype: torch.dtype = torch.float32, tensor_lr: bool = False, **s: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((2, 3), (3, 2))
        ]
        lr = 0.1
        groups: list[dict[str, Any]] = [
            {"params": [p], "lr": torch.tensor(lr) if tensor_lr else lr} for p in self.params
        ]
        self.optimizer = SGD(groups)
        units: list[Tensor | nw.Unit] = [self.params[0], nw.Unit(self.params[1], mask=[True, False, True])]
        self.decay = nw.Decay(self.optimizer, rule, units, **s)

    def step(self) -> None:
        for param in self.params:
            param.grad = torch.ones_like(param)
        self.optimizer.step()


JOBS: dict[str, dict[str, Any]] = {
    "sphere": {"rule": nw.Sphere(), "clock": "lr^2/max_lr"},
    "tensor rate": {"rule": nw.AdaptiveWeightShrink(0.1), "clock": "lr^2/max_lr", "tensor_lr": True},
    "every": {"rule": nw.PowerShrink(0.1, 1.5), "every": 3, "clock": "lr^2/max_lr"},
    "compensated": {"rule": nw.AdaptiveWeightShrink(0.1), "dtype": torch.bfloat16, "compensated": True},
    "scheduled": {"rule": nw.L2(lambda step: 0.1 / (1 + step))},
    "explicit": {"rule": nw.EpsilonShiftedL2(0.1, 0.3), "mode": "explicit"},
}


def contents(state: Any) -> Any:
    """Return a state as plain values, to be compared."""
    if isinstance(state, dict):
        return {key: contents(value) for key, value in state.items()}
    if isinstance(state, list):
        return [contents(value) for value in state]
    return (state.dtype, state.tolist()) if isinstance(state, Tensor) else state


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values in a state, lists and dicts included."""
    below: list[tuple[Any, ...]] = []
    if isinstance(state, (dict, list)):
        keys = list(state) if isinstance(state, dict) else range(len(state))
        below = [place for key in keys for place in places(state[key], (*path, key))]
    return [path, *below] if path else below


def put(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    target: Any = state
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value


numbers = st.one_of(
    st.floats(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(2**70), 1e300, 1e-300, True, False, -0.0, 2**62]),
)
tensors = st.builds(
    lambda shape, value, dtype: torch.full(shape, value).to(dtype),
    st.sampled_from([(), (1,), (2,), (3,), (2, 1), (0,)]),
    st.floats(width=32),
    st.sampled_from([torch.float64, torch.float32, torch.int64, torch.bool, torch.complex64]),
)
special = st.sampled_from(
    [
        torch.ones(2).to_sparse(),
        torch.ones(3, device="meta"),
        torch.full((3,), math.nan, dtype=torch.float64),
        torch.tensor([1.0, -1.0, 1.0]),
        torch.tensor([1e300, 1e300], dtype=torch.float64),
        torch.ones(2, requires_grad=True),
        "x",
        "two\nlines",
        b"",
        None,
        [],
        {},
        (),
        object(),
    ]
)
values = st.recursive(
    st.one_of(numbers, tensors, special, st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(JOBS)), data=st.data())
def test_a_mutated_state_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    job = Job(**JOBS[name])
    job.step()
    state = copy.deepcopy(job.decay.state_dict())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(state)))
        put(state, path, data.draw(values))
    job.step()
    before, weights = contents(job.decay.state_dict()), [param.detach().clone() for param in job.params]
    try:
        job.decay.load_state_dict(state)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert contents(job.decay.state_dict()) == before
    for _ in range(3):
        job.step()
    for param, start in zip(job.params, weights, strict=True):
        assert param.isfinite().all()
        assert (param != 0).any(1).all()
        assert start.isfinite().all()


@pytest.mark.parametrize("missing", ["steps", "pending", "rule"])
def test_keys_are_those_of_a_decay(missing: str) -> None:
    job = Job(nw.L2(0.1))
    states: tuple[Any, ...] = (
        {k: v for k, v in job.decay.state_dict().items() if k != missing},
        {**job.decay.state_dict(), "more": 1},
        None,
        [],
    )
    for state in states:
        with pytest.raises(ValueError, match="not one of a Decay: it needs the keys"):
            job.decay.load_state_dict(state)


NAN, INF = math.nan, math.inf
TWO = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        *(
            ("sphere", "steps", v, f"steps={v!r}, which must be a whole number, 0 or more")
            for v in ("x", -5, 2.5, None, NAN, True)
        ),
        *(
            ("sphere", "max_lr", [v], f"max_lr[0]={v!r}, which must be a finite number")
            for v in ("x", NAN, -1.0, INF)
        ),
        ("sphere", "max_lr", [torch.tensor([0.1, 0.2])], "max_lr[0]=a tensor of shape (2,)"),
        (
            "sphere",
            "max_lr",
            [torch.tensor(NAN)],
            "max_lr[0]=a tensor of shape () and type torch.float32, nan",
        ),
        ("sphere", "max_lr", 3, "max_lr=3, which must be a list"),
        ("sphere", "max_lr", [0.1] * 3, "peak rates of 3 param_groups, and the optimizer has 2"),
        ("sphere", "reference", [], "reference=[], which must be a list of length 2"),
        *(
            ("sphere", "reference", [TWO * v, torch.ones(3)], "reference[0]=a tensor of shape (2,)")
            for v in (NAN, -1.0, 0.0, INF)
        ),
        (
            "sphere",
            "reference",
            [torch.tensor(1.0), torch.ones(3)],
            "must be a floating-point tensor of shape (2,)",
        ),
        ("sphere", "reference", [TWO, torch.tensor([1.0, 1.0, -1.0])], "must be finite positive norms"),
        *(
            ("compensated", "pending", [[TWO * v], [torch.ones(3)]], "must be factors from 0.25 to 4")
            for v in (NAN, 0.0, -1.0, 1e6)
        ),
        ("compensated", "pending", [[TWO], [TWO]], "pending[1][0]=a tensor of shape (2,)"),
        ("every", "elapsed", [[-1.0], [None]], "elapsed[0][0]=-1.0, which must be None or a finite number"),
        ("every", "elapsed", [[0.1]], "elapsed=[[0.1]], which must be a list of length 2"),
        ("every", "every", True, "every=True, and this Decay has every=3"),
        ("every", "units", None, "units=None"),
        ("every", "units", [{}, {}], "units[0]={}, which must be a dict with the keys shapes, dim, mask"),
    ],
)
def test_every_value_is_checked(name: str, key: str, value: Any, message: str) -> None:
    job = Job(**JOBS[name])
    job.step()
    state = job.decay.state_dict()
    job.step()
    before = contents(job.decay.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        job.decay.load_state_dict({**state, "steps": 777, key: value})
    assert "\n" not in str(caught.value)
    assert contents(job.decay.state_dict()) == before


def test_a_value_outside_the_mask_is_not_looked_at() -> None:
    job = Job(nw.Sphere())
    state = job.decay.state_dict()
    state["reference"][1][1] = math.nan
    job.decay.load_state_dict(state)
    job.step()
    assert job.params[1].isfinite().all()


def test_what_a_decay_keeps_can_be_loaded() -> None:
    """Also where a type has few digits left: the factors that are kept stay in the range that is accepted."""
    for scale in (1.0, 1e-6, 1e-7):
        job = Job(nw.AdaptiveWeightShrink(3e5), torch.float16, compensated=True)
        for param in job.params:
            param.data.mul_(scale)
        for _ in range(60):
            job.step() if scale == 1.0 else job.decay._mode.after_step(job.decay.steps)
            job.decay.load_state_dict(job.decay.state_dict())
        assert all((param != 0).any() for param in job.params)


def test_a_state_from_the_middle_of_a_graph_records_nothing() -> None:
    job = Job(nw.Sphere())
    state = job.decay.state_dict()
    state["reference"] = [norms.requires_grad_() for norms in state["reference"]]
    job.decay.load_state_dict(state)
    assert not any(norms.requires_grad for norms in job.decay.state_dict()["reference"])
