"""Whatever the norm was and becomes, a unit has the norm of the rule, or is left alone and reported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw
from normwise.decay import scaling
from normwise.decay.rules import Rule
from normwise.norms import slice_norms

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def stepped(weight: Tensor, rule: Rule, steps: int = 1, **options: Any) -> Tensor:
    """Return the weight after steps of time 1 with zero gradients."""
    param = nn.Parameter(weight.clone())
    optimizer = SGD([param], lr=1.0)
    nw.Decay(optimizer, rule, param, **options)
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    return param.detach()


def rules(target: float) -> list[Rule]:
    """Return rules that lead from a norm of any size to about ``target``, or as far as they can go."""
    return [
        nw.Sphere(target),
        nw.AdaptiveWeightShrink(1 / target),
        nw.PowerShrink(1 / target**0.5, 0.5),
        nw.PowerShrink(1 / target**2, 2.0),
        nw.EpsilonShiftedL2(1.0, target),
        nw.EpsilonShiftedL2(1e3, target),
        nw.L2(1.0),
        nw.L2(100.0),
        nw.L2(500.0),
    ]


def assert_right_or_alone(weight: Tensor, result: Tensor, rule: Rule, time: float) -> None:
    """Check that each row has the norm of the rule, or is unchanged as its type has no such norm."""
    assert result.isfinite().all()
    exact, limits = weight.double(), torch.finfo(weight.dtype)
    norms = slice_norms(exact)
    expected = exact / norms * rule.flow(norms, time)
    # half a unit in the last place of each element, and three roundings of the factor
    error = (result.double() - expected).abs()
    allowed = expected.abs() * (4 * limits.eps) + limits.tiny * limits.eps
    right = (error <= allowed).all(1)
    alone = (result == weight).all(1)
    size = weight.shape[1] ** 0.5
    wanted = (expected / size).norm(dim=1) * size  # expected may be beyond the squares of float64
    is_in_range = (wanted >= limits.tiny * size) & (wanted <= limits.max)
    assert (right | alone).all()
    assert (right | ~is_in_range).all()
    assert ((result != 0).any(1) | (weight == 0).all(1)).all()  # no unit vanishes


@settings(deadline=None, max_examples=300)
@given(
    dtype=st.sampled_from(DTYPES),
    start=st.floats(-45, 38),
    target=st.floats(-45, 38),
    which=st.integers(0, 8),
    options=st.fixed_dictionaries(
        {"every": st.sampled_from([1, 3]), "compensated": st.booleans()},
    ),
)
def test_a_step_gives_the_norm_of_the_rule_or_leaves_the_unit_alone(
    dtype: torch.dtype, start: float, target: float, which: int, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.5
    weight = (weight * torch.tensor([[1.0], [10.0], [0.1]]) * 10**start).to(dtype)
    weight = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    if not bool((weight != 0).any(1).all()) or bool((slice_norms(weight) > torch.finfo(dtype).max).any()):
        return
    rule = rules(10**target)[which]
    result = stepped(weight, rule, options["every"], **options)
    if not options["compensated"]:
        assert_right_or_alone(weight, result, rule, float(options["every"]))
    else:  # rounding of the norm is kept for later
        assert result.isfinite().all()
        assert (result != 0).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rule", [nw.L2(1e3), nw.AdaptiveWeightShrink(1e300), nw.Sphere(1e200)], ids=repr)
@pytest.mark.parametrize("compensated", [False, True])
def test_what_the_type_cannot_hold_is_left_alone(rule: Rule, dtype: torch.dtype, compensated: bool) -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype)
    assert torch.equal(stepped(weight, rule, 2, compensated=compensated), weight)


def test_a_unit_that_is_left_alone_is_not_decayed_later() -> None:
    param = nn.Parameter(torch.ones(1, 4, dtype=torch.float16))
    optimizer = SGD([param], lr=1.0)
    decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(1e9), param, compensated=True)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert decay.state_dict()["pending"][0][0].tolist() == [1.0]


CASES: list[dict[str, Any]] = [
    {"rule": nw.Sphere(1e6)},
    {"rule": nw.L2(50.0)},
    {"rule": nw.Sphere(1e6), "measure": "rms"},
    {"rule": nw.AdaptiveWeightShrink(1e9), "compensated": True},
    {"rule": nw.AdaptiveWeightShrink(1e9), "mode": "coupled"},
    {"rule": nw.EpsilonShiftedL2(1.0, 1e6), "mode": "explicit"},
]


@pytest.mark.parametrize("arguments", CASES, ids=repr)
def test_the_policy_tells_what_is_left_alone(arguments: dict[str, Any]) -> None:
    def step(policy: str) -> tuple[nn.Parameter, SGD]:
        param = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float16))
        optimizer = SGD([param], lr=1.0)
        nw.Decay(optimizer, params=param, nonfinite=policy, **arguments)
        param.grad = torch.zeros_like(param)
        return param, optimizer

    param, optimizer = step("skip")
    optimizer.step()
    assert param.tolist() == [[0, 0], [3, 4]]
    message = (
        r"param_groups\[0\]\['params'\]\[0\] of shape \(2, 2\): the norm that the rule gives its unit 1 "
    )
    message += r"along dim=0 is too large or too small for float16, and so for 0 other unit\(s\): use another"
    _, optimizer = step("warn")
    with pytest.warns(UserWarning, match=message):
        optimizer.step()
    param, optimizer = step("raise")
    grad = param.grad
    with pytest.raises(RuntimeError, match=message) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert param.tolist() == [[0, 0], [3, 4]]
    assert param.grad is grad


def test_units_outside_a_mask_are_not_reported() -> None:
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    param.data[0] = 1e4
    optimizer = SGD([param], lr=1.0)
    unit = nw.Unit(param, mask=[False, True])
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(1e4), unit, nonfinite="raise")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param[0].tolist() == [1e4, 1e4]


def test_a_raised_error_leaves_no_time_behind() -> None:
    param = nn.Parameter(torch.full((1, 4), 0.5))
    optimizer = SGD([param], lr=1.0)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(1e20), param, nonfinite="raise")
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 1e30
    with pytest.raises(RuntimeError, match="too large or too small for float32"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-20
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_extreme_factors_beside_ordinary_ones(
    dim: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary unit gets the same bits beside an extreme one, and pieces change nothing."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(6, 6, generator=generator).to(dtype)
    unit, size = nw.Unit(ordinary, dim), 1 if dim is None else 6
    factors = torch.linspace(0.5, 0.9, size, dtype=torch.float64)
    expected = ordinary.clone()
    scaling.scale_units([expected], [factors], [unit])
    extreme, huge = torch.full((2, 2), 1e-30).to(dtype), torch.tensor([1e50, 1e-50], dtype=torch.float64)
    for numel in (2**20, 8):
        monkeypatch.setattr(scaling, "_COPIED_NUMEL", numel)
        result = ordinary.clone()
        scaling.scale_units([result, extreme.clone()], [factors, huge], [unit, nw.Unit(extreme)])
        torch.testing.assert_close(result, expected, rtol=0 if dtype.itemsize > 2 else 0.01, atol=0)


def test_a_rotating_sphere_beyond_the_type() -> None:
    for radius in (1e6, 1e-12):
        param = nn.Parameter(torch.ones(1, 4, dtype=torch.float16))
        optimizer = SGD([param], lr=0.1)
        nw.Decay(optimizer, nw.RotatingSphere(radius), param)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert param.tolist() == [[1, 1, 1, 1]], re.escape(str(radius))


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES[:3]),
    start=st.floats(-40, 30),
    target=st.floats(-30, 30),
    which=st.integers(1, 5),
)
def test_coupled_and_explicit_make_nothing_infinite(
    dtype: torch.dtype, start: float, target: float, which: int
) -> None:
    weight = torch.full((2, 4), 10**start, dtype=torch.float64).to(dtype)
    if not bool(weight.isfinite().all()):
        return
    rule = rules(10**target)[which]
    for mode in ("coupled", "explicit"):
        try:
            result = stepped(weight, rule, mode=mode)
        except ValueError:  # t·c(n) ≥ 1
            assert mode == "explicit"
            continue
        assert result.isfinite().all()
