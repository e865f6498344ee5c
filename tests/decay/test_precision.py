"""Types and magnitudes: half precision, norms from 1e-30 to 1e30, decay too fine to be seen, no copies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise.decay import scaling
from normwise.decay.rules import Rule
from normwise.norms import slice_norms

RULES: list[Rule] = [
    nw.L2(0.1),
    nw.AdaptiveWeightShrink(0.1),
    nw.PowerShrink(0.1, 1.5),
    nw.EpsilonShiftedL2(0.1, 0.3),
    nw.Sphere(2.0),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
each_rule_and_mode = pytest.mark.parametrize(
    ("rule", "mode"), [(rule, mode) for rule in RULES for mode in rule.modes]
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decayed(weight: Tensor, rule: Rule, steps: int = 1, lr: float = 0.1, **options: Any) -> Tensor:
    """The weight after steps without a gradient's pull."""
    param = nn.Parameter(weight.clone())
    optimizer = SGD([param], lr=lr)
    nw.Decay(optimizer, rule, param, **options)
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    return param.detach()


def error_in_ulp(actual: Tensor, expected: Tensor, dim: int | None) -> float:
    """The largest error of a unit, in units in the last place of its norm."""
    norms = slice_norms(expected, dim)
    ulp = torch.finfo(actual.dtype).eps * norms
    return float((slice_norms(actual.double() - expected, dim) / ulp)[norms > 0].max())


@each_dtype
@each_rule_and_mode
def test_every_type_is_decayed_as_float64_is(rule: Rule, mode: str, dtype: torch.dtype) -> None:
    for dim in (0, 1, None):
        weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
        result = decayed(weight, rule, lr=0.05, mode=mode, dim=dim)
        assert result.dtype == dtype
        assert error_in_ulp(result, decayed(weight.double(), rule, lr=0.05, mode=mode, dim=dim), dim) < 8


@pytest.mark.parametrize("mode", ["flow", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_l2_rounds_a_weight_once(dtype: torch.dtype, mode: str) -> None:
    """The factor itself is not rounded to the weight's type."""
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    factor = math.exp(-0.1 * 0.1) if mode == "flow" else 1 - 0.1 * 0.1
    expected = (weight.double() * factor).to(dtype)
    wrong = decayed(weight, nw.L2(0.1), lr=0.1, mode=mode) != expected
    assert int(wrong.sum()) <= 2  # where float32 rounds a product to the middle of two neighbours


@settings(deadline=None, max_examples=40)
@given(
    exponent=st.floats(-30, 30),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dim=st.sampled_from([0, 1, None]),
)
def test_flow_is_right_and_finite_from_1e_minus_30_to_1e30(
    exponent: float, rule: Rule, dtype: torch.dtype, dim: int | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(4, 5, generator=generator, dtype=torch.float64) * 10**exponent).to(dtype)
    result = decayed(weight, rule, dim=dim)
    assert result.isfinite().all()
    norms = slice_norms(weight.double(), dim)
    expected = weight.double() * rule.flow(norms, 0.1) / norms
    assert error_in_ulp(result, expected, dim) < 8


@each_dtype
@each_rule_and_mode
def test_zero_units_stay_zero_beside_others(rule: Rule, mode: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0, 0], [3, 4], [0, 0]], dtype=dtype)
    result = decayed(weight, rule, mode=mode)
    assert result[0].tolist() == result[2].tolist() == [0, 0]
    assert result[1].tolist() != [3, 4]


# -- decay too fine to be seen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtype", "mode", "dim"),
    [  # every two of dtype, mode and dim for each rule; the other half is thorough
        pytest.param(rule, dtype, mode, dim, marks=[] if (i + j + k) % 2 == 0 else pytest.mark.thorough)
        for rule in (nw.L2(1.0), nw.AdaptiveWeightShrink(0.1), nw.PowerShrink(0.02, 2.0))
        for i, dtype in enumerate((torch.bfloat16, torch.float16))
        for j, mode in enumerate(("flow", "explicit"))
        for k, dim in enumerate((0, None))
    ],
)
@pytest.mark.one_in(2)
def test_lost_decay_is_kept_by_a_compensated_scale(
    dim: int | None, mode: str, dtype: torch.dtype, rule: Rule
) -> None:
    """150 shrinks, each below half a unit in the last place."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    lr = torch.finfo(dtype).eps / 5 / float(rule.rate(slice_norms(weight, dim)).max())
    assert torch.equal(decayed(weight, rule, 150, lr, mode=mode, dim=dim), weight)  # lost altogether
    kept = decayed(weight, rule, 150, lr, mode=mode, dim=dim, compensated=True)
    expected = decayed(weight.double(), rule, 150, lr, mode=mode, dim=dim)
    ratio = slice_norms(kept, dim) / slice_norms(expected, dim)
    assert float((ratio - 1).abs().max()) < 1.5 * torch.finfo(dtype).eps
    assert torch.equal(kept, decayed(weight, rule, 150, lr, mode=mode, dim=dim, compensated=True))


def test_the_exact_norm_follows_the_rule_exactly() -> None:
    param = nn.Parameter(torch.randn(6, 50).bfloat16())
    optimizer = SGD([param], lr=1e-4)
    decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(2.0), param, compensated=True)
    norms = nw.Unit(param).norms()
    for _ in range(500):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    (pending,) = decay.state_dict()["pending"][0]
    torch.testing.assert_close(
        nw.Unit(param).norms() * pending, decay.rule.flow(norms, 500e-4), rtol=1e-5, atol=0
    )


def test_a_compensated_scale_takes_part_of_a_joint_unit_and_a_mask() -> None:
    first, second = nn.Parameter(torch.ones(2, 8).bfloat16()), nn.Parameter(torch.ones(2, 8).bfloat16())
    optimizer = SGD([first, second], lr=1e-3)
    unit = nw.Unit([first, second], mask=[True, False])
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), unit, compensated=True)
    for _ in range(200):
        first.grad = torch.zeros_like(first)
        optimizer.step()  # the second has no gradient
    assert torch.equal(second, torch.ones(2, 8).bfloat16())
    assert torch.equal(first[1], torch.ones(8).bfloat16())
    # dn/dt = −0.1·n·n₁ on the first alone, n the joint norm √(n₁² + 8)
    norm, lr = math.sqrt(8), 1e-3
    for _ in range(200):
        joint = math.hypot(norm, math.sqrt(8))
        norm *= 1 / (1 + 0.1 * lr * joint)
    assert float(first[0].detach().float().norm()) == pytest.approx(norm, rel=2**-7)


def test_compensation_changes_float32_by_rounding_only() -> None:
    weight = torch.randn(8, 16)
    plain = decayed(weight, nw.AdaptiveWeightShrink(1.0), 50)
    torch.testing.assert_close(
        decayed(weight, nw.AdaptiveWeightShrink(1.0), 50, compensated=True), plain, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compensated": True, "mode": "coupled"}, ValueError, "does not go with mode='coupled'"),
        ({"compensated": True, "rule": nw.RotatingSphere()}, ValueError, "does not go with mode='flow'"),
        ({"compensated": 1}, TypeError, "compensated must be True or False, not 1"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore' is not known: choose from 'skip'"),
        ({"nonfinite": "raise", "check_every": 0}, ValueError, "check_every=0 is not allowed"),
        ({"check_every": 1.5}, ValueError, "check_every=1.5 is not allowed"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(error, match=message):
        nw.Decay(**{"optimizer": SGD([param], lr=1.0), "rule": nw.L2(0.1), "params": param, **options})


# -- norms that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
class TestNonFinite:
    def spoiled(self, mode: str, value: float, **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = SGD([("fine", nn.Parameter(torch.ones(2))), ("layer", param)], lr=0.5)
        nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), param, mode=mode, **options)
        param.data[1, 0] = value
        param.grad = torch.zeros(3, 2)
        return param, optimizer

    def test_skipped_by_default(self, mode: str, value: float) -> None:
        param, optimizer = self.spoiled(mode, value)
        optimizer.step()
        np.testing.assert_array_equal(param[1].detach(), [value, 1.0])
        assert bool((param[0] < 1).all())

    def test_raises_with_the_name(self, mode: str, value: float) -> None:
        _, optimizer = self.spoiled(mode, value, nonfinite="raise")
        with pytest.raises(RuntimeError, match=r"parameter 'layer' of shape \(3, 2\): .* unit 1 along dim=0"):
            optimizer.step()

    def test_warns_every_so_many_steps(self, mode: str, value: float) -> None:
        param, optimizer = self.spoiled(mode, value, nonfinite="warn", check_every=3)
        for step in range(6):
            param.grad = torch.zeros(3, 2)
            if step % 3 == 0:
                with pytest.warns(UserWarning, match="is not finite"):
                    optimizer.step()
            else:
                optimizer.step()

    def test_a_unit_outside_the_mask_may_be_anything(self, mode: str, value: float) -> None:
        param = nn.Parameter(torch.tensor([[value, 1.0], [3.0, 4.0]]))
        optimizer = SGD([param], lr=0.5)
        unit = nw.Unit(param, mask=[False, True])
        nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), unit, mode=mode, nonfinite="raise")
        param.grad = torch.zeros(2, 2)
        optimizer.step()
        assert float(param[1, 0].detach()) < 3


# -- no copies ---------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest new tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in storages:
                self.numel = max(self.numel, one.numel())
        return result


@each_rule
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_flow_allocates_nothing_of_the_size_of_a_parameter(fused: bool, dim: int, rule: Rule) -> None:
    param = nn.Parameter(torch.randn(300, 400))
    optimizer = SGD([param], lr=0.1, fused=fused)
    nw.Decay(optimizer, rule, param, dim=dim)
    param.grad = torch.randn_like(param)
    with Largest() as largest:
        optimizer.step()
    assert largest.numel <= 2 * 400


@pytest.mark.parametrize("rule", [nw.AdaptiveWeightShrink(0.1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_kernels_copy_a_piece_at_a_time(
    dim: int | None, dtype: torch.dtype, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch copies inside an operation, too: where types differ, pieces are worked on."""
    monkeypatch.setattr(scaling, "_COPIED_NUMEL", 2**12)
    monkeypatch.setattr("normwise.norms._COPIED_NUMEL", 2**12)
    param = nn.Parameter(torch.randn(256, 512).to(dtype))
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, rule, param, dim=dim)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profile.events() or ())
    assert largest <= param.numel() * param.element_size() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_pieces_give_the_same_result(
    dim: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 29).to(dtype)
    whole = decayed(weight, nw.AdaptiveWeightShrink(1.0), dim=dim)
    monkeypatch.setattr(scaling, "_COPIED_NUMEL", 64)
    monkeypatch.setattr("normwise.norms._COPIED_NUMEL", 64)
    torch.testing.assert_close(
        decayed(weight, nw.AdaptiveWeightShrink(1.0), dim=dim), whole, rtol=torch.finfo(dtype).eps, atol=0
    )
