"""Every rule of RULES is a flow: the properties of design, an ODE solver, and references in many digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from normwise.decay import rules
from normwise.decay.decay import Decay
from normwise.decay.rules import (
    L2,
    MODES,
    RULES,
    AdaptiveWeightShrink,
    EpsilonShiftedL2,
    PowerShrink,
    Rule,
    Sphere,
)
from normwise.decay.weight_rules import WEIGHT_RULES

PAGE = (Path(__file__).parents[2] / "docs" / "decay.md").read_text(encoding="utf-8")


def rule_of_the_docs() -> type[Rule]:
    """The example of the section "Your own rule", as a reader would paste it."""
    code = PAGE.split("## Your own rule")[1].split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(code, "docs/decay.md", "exec", dont_inherit=True), namespace)
    kind: type[Rule] = namespace["ShiftedShrink"]
    return kind


FLOWS = [*(rule for rule in RULES if not rule.projects), rule_of_the_docs()]
each_flow = pytest.mark.parametrize("kind", FLOWS, ids=lambda kind: kind.__name__)
quick = settings(deadline=None, max_examples=60)

norms = st.floats(-30, 30).map(lambda exponent: 10.0**exponent)
times = st.one_of(st.just(0.0), st.floats(-6, 1).map(lambda exponent: 10.0**exponent))
coefficients = st.one_of(st.just(0.0), st.floats(-6, 0.5).map(lambda exponent: 10.0**exponent))
powers = st.floats(0.05, 8)


def made(kind: type[Rule], coefficient: float, setting: float = 2.0) -> Rule:
    """A rule of this kind; what else it requires is given ``setting``, so that a new rule joins by itself."""
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    return kind(**{name: coefficient if name == "coefficient" else setting for name in required})


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, norm=norms)
def test_no_time_no_change(kind: type[Rule], coefficient: float, setting: float, norm: float) -> None:
    for dtype in (torch.float32, torch.float64):
        given_norm = torch.tensor(norm, dtype=dtype)
        assert torch.equal(made(kind, coefficient, setting).flow(given_norm, 0.0), given_norm)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, norm=norms, first=times, second=times)
def test_semigroup(
    kind: type[Rule], coefficient: float, setting: float, norm: float, first: float, second: float
) -> None:
    rule = made(kind, coefficient, setting)
    in_two = rule.flow(rule.flow(tensor(norm), first), second)
    torch.testing.assert_close(in_two, rule.flow(tensor(norm), first + second), rtol=1e-11, atol=0)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, norm=norms, ratio=st.floats(1.0001, 1e6), time=times)
@example(coefficient=1.0, setting=2.0, norm=1e30, ratio=1.1, time=1.0)
@example(coefficient=1.0, setting=2.0, norm=1e-30, ratio=1.1, time=1.0)
def test_monotone_and_positive(
    kind: type[Rule], coefficient: float, setting: float, norm: float, ratio: float, time: float
) -> None:
    smaller, larger = made(kind, coefficient, setting).flow(tensor(norm, norm * ratio), time)
    assert 0 < smaller <= larger * (1 + 4e-16)  # two neighbours may be rounded past each other
    assert math.isfinite(larger)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, time=times)
def test_zero_stays_zero(kind: type[Rule], coefficient: float, setting: float, time: float) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert made(kind, coefficient, setting).flow(torch.zeros(2, dtype=dtype), time).tolist() == [0, 0]


@each_flow
@settings(deadline=None, max_examples=25)
@given(
    coefficient=st.floats(0.01, 2),
    setting=st.floats(0.2, 4),
    norm=st.floats(0.05, 20),
    time=st.floats(0.01, 2),
)
def test_flow_solves_its_equation(
    kind: type[Rule], coefficient: float, setting: float, norm: float, time: float
) -> None:
    rule = made(kind, coefficient, setting)

    def slope(_: float, log_norm: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # dn/dt = −c(n)·n
        return -rule.rate(torch.from_numpy(np.exp(log_norm))).numpy()

    solution = solve_ivp(slope, (0, time), [math.log(norm)], method="LSODA", rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rule.flow(tensor(norm), time), np.exp(solution.y[:, -1]), rtol=1e-7)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, norm=st.floats(-12, 12).map(lambda e: 10.0**e))
def test_penalty_is_the_integral_of_the_pull(
    kind: type[Rule], coefficient: float, setting: float, norm: float
) -> None:
    rule = made(kind, coefficient, setting)
    point = tensor(norm).requires_grad_()
    (slope,) = torch.autograd.grad(rule.penalty(point).sum(), point)
    torch.testing.assert_close(slope, rule.rate(point.detach()) * norm, rtol=1e-12, atol=0)


@each_flow
@quick
@given(coefficient=coefficients, setting=powers, norm=norms, time=times)
@example(coefficient=1.0, setting=2.0, norm=1e-30, time=1.0)
@example(coefficient=1.0, setting=2.0, norm=1e30, time=1.0)
def test_float32_is_float64_rounded(
    kind: type[Rule], coefficient: float, setting: float, norm: float, time: float
) -> None:
    rule = made(kind, coefficient, setting)
    single = torch.tensor([norm], dtype=torch.float32)
    expected = rule.flow(single.double(), time)
    torch.testing.assert_close(rule.flow(single, time).double(), expected, rtol=6e-8, atol=1e-45)


def _mp_epsilon(n: Any, t: Any, c: Any, e: Any) -> Any:
    return e + (n - e) * mpmath.exp(-c * t)


REFERENCES: dict[type[Rule], Callable[..., Any]] = {
    L2: lambda n, t, c: n * mpmath.exp(-c * t),
    AdaptiveWeightShrink: lambda n, t, c: n / (1 + c * n * t),
    PowerShrink: lambda n, t, c, p: n * (1 + p * c * n**p * t) ** (-1 / p),
    EpsilonShiftedL2: _mp_epsilon,
}


@pytest.mark.parametrize("kind", REFERENCES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("norm", [1e-30, 1e-15, 1e-3, 1.0, 7.0, 1e15, 1e30])
@pytest.mark.parametrize("time", [1e-8, 1e-3, 1.0, 30.0])
def test_flow_against_many_digits(kind: type[Rule], norm: float, time: float) -> None:
    extra = {PowerShrink: (2.5,), EpsilonShiftedL2: (1e-3,)}.get(kind, ())
    rule = kind(0.7, *extra)  # type: ignore[call-arg]
    single = torch.tensor(norm, dtype=torch.float32)
    with mpmath.workdps(100):
        in_double = REFERENCES[kind](*map(mpmath.mpf, (norm, time, 0.7, *extra)))
        in_single = REFERENCES[kind](*map(mpmath.mpf, (single.item(), time, 0.7, *extra)))
    assert rule.flow(norm, time).item() == pytest.approx(float(in_double), rel=1e-13)
    assert rule.flow(single, time).item() == pytest.approx(float(in_single), rel=6e-8)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_power_one_is_aws_and_power_near_zero_is_l2(coefficient: float) -> None:
    n = tensor(1e-30, 1e-3, 1.0, 5.0, 1e30)
    aws, power = AdaptiveWeightShrink(coefficient), PowerShrink(coefficient, 1.0)
    for name in ("rate", "penalty"):
        torch.testing.assert_close(getattr(aws, name)(n), getattr(power, name)(n), rtol=1e-14, atol=0)
    torch.testing.assert_close(aws.flow(n, 2.0), power.flow(n, 2.0), rtol=1e-13, atol=0)
    l2 = PowerShrink(coefficient, 1e-9)
    torch.testing.assert_close(l2.flow(n, 2.0), L2(coefficient).flow(n, 2.0), rtol=1e-6, atol=0)


@quick
@given(total=st.floats(1e-3, 1e6), norm=norms, initial=norms, strength=st.floats(0.1, 30))
def test_for_budget_forgets_the_initial_norm(
    total: float, norm: float, initial: float, strength: float
) -> None:
    rule = AdaptiveWeightShrink.for_budget(total, norm=norm, strength=strength)
    assert rule.coefficient == pytest.approx(strength / (norm * total))
    final = rule.flow(initial, total).item()
    assert final == pytest.approx(norm / (strength + norm / initial), rel=1e-12)
    assert final <= norm / strength * (1 + 1e-12)


def test_epsilon_shift_rests_at_epsilon() -> None:
    rule = EpsilonShiftedL2(0.5, epsilon=0.2)
    assert rule.flow(0.2, 3.0).item() == pytest.approx(0.2, rel=1e-15)
    assert rule.rate(tensor(0.1, 0.2, 0.3)).sign().tolist() == [-1, 0, 1]
    assert rule.rate(0.0).item() == 0
    assert rule.flow(tensor(1e-30, 1e30), 1e4).tolist() == pytest.approx([0.2, 0.2])


def test_time_may_be_a_tensor() -> None:
    rule = AdaptiveWeightShrink(1.0)
    expected = torch.stack([rule.flow(2.0, 0.5), rule.flow(3.0, 1.5)])
    torch.testing.assert_close(rule.flow(tensor(2.0, 3.0), torch.tensor([0.5, 1.5])), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_rule_of_the_docs_at_work(mode: str) -> None:
    """With a coefficient that is a function of the step."""
    kind = rule_of_the_docs()
    param = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    optimizer = torch.optim.SGD([param], lr=0.1)
    Decay(optimizer, kind(lambda step: 0.2 * (step + 1)), param, mode=mode)  # type: ignore[call-arg]
    norm = 5.0
    for coefficient in (0.2, 0.4):
        rate = coefficient * (1 + norm)
        growth = math.exp(-0.1 * coefficient)
        norm *= growth / (1 + norm * (1 - growth)) if mode == "flow" else 1 - 0.1 * rate
        param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([[0.6 * norm, 0.8 * norm], [0.0, 0.0]]))


def test_a_formula_may_return_a_number() -> None:
    @dataclasses.dataclass(frozen=True)
    class Constant(Rule):
        def rate(self, norm: Any) -> Any:
            return 2.0

        def flow(self, norm: Any, time: Any) -> Any:
            return norm * torch.exp(-2.0 * time)

        def penalty(self, norm: Any) -> Any:
            return norm**2

    assert Constant().rate(torch.ones(3, dtype=torch.float16)).tolist() == [2, 2, 2]
    assert Constant().settings() == {"name": "Constant"}


def test_a_rule_that_is_not_a_dataclass_is_refused() -> None:
    class Plain(Rule):
        def rate(self, norm: Any) -> Any: ...

        def flow(self, norm: Any, time: Any) -> Any: ...

        def penalty(self, norm: Any) -> Any: ...

    param = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"Plain is not a dataclass: put @dataclass\(frozen=True\)"):
        Decay(torch.optim.SGD([param], lr=0.1), Plain(), param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_type_are_kept(dtype: torch.dtype) -> None:
    for kind in RULES:
        rule = Sphere(2.0) if kind is Sphere else made(kind, 0.1)
        n = torch.ones(3, 2, dtype=dtype)
        results = [rule.flow(n, 0.1)] + ([] if rule.projects else [rule.rate(n), rule.penalty(n)])
        assert {(r.dtype, r.shape) for r in results} == {(dtype, n.shape)}


def test_sphere_is_a_projection() -> None:
    assert Sphere(2.0).flow(tensor(1e-30, 1.0, 1e30), 0.1).tolist() == [2, 2, 2]
    bound = Sphere().bound_to(tensor(1.0, 3.0))
    assert bound.flow(tensor(5.0, 7.0), 0.1).tolist() == [1, 3]
    with pytest.raises(ValueError, match="projection and has no rate"):
        Sphere(2.0).rate(1.0)
    with pytest.raises(ValueError, match="projection and has no penalty"):
        Sphere(2.0).penalty(1.0)
    with pytest.raises(ValueError, match="give radius="):
        Sphere().flow(1.0, 0.1)


@pytest.mark.parametrize("kind", FLOWS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_bad_coefficients(kind: type[Rule], value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="coefficient"):
        made(kind, value)
    rule = made(kind, lambda step: value)  # type: ignore[arg-type]
    with pytest.raises(error, match="coefficient"):
        rule.at(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerShrink(0.1, 0.0), "power=0.0 is not allowed"),
        (lambda: PowerShrink(0.1, -1.0), "power=-1.0 is not allowed"),
        (lambda: EpsilonShiftedL2(0.1, -1e-3), "epsilon=-0.001 is not allowed"),
        (lambda: Sphere(0.0), "radius=0.0 is not allowed"),
        (lambda: AdaptiveWeightShrink.for_budget(0.0), "total_time=0.0 is not allowed"),
        (lambda: AdaptiveWeightShrink.for_budget(1.0, norm=-1.0), "norm=-1.0 is not allowed"),
        (lambda: AdaptiveWeightShrink.for_budget(1.0, strength=math.inf), "strength=inf is not allowed"),
        (lambda: L2(0.1).flow(1.0, -1.0), "time=-1.0 is not allowed"),
        (lambda: L2(0.1).flow(1.0, math.nan), "time=nan is not allowed"),
        (lambda: L2(lambda step: 0.1).rate(1.0), "call .at\\(step\\) first"),
    ],
)
def test_bad_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_norms_must_be_floating_point() -> None:
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        L2(0.1).rate(torch.tensor([1, 2]))


def test_rules_are_values() -> None:
    for kind in FLOWS:
        assert made(kind, 0.1) == made(kind, 0.1) != made(kind, 0.2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            made(kind, 0.1).coefficient = 1.0  # type: ignore[attr-defined]
    assert PowerShrink(0.1, 2.0).settings() == {"name": "PowerShrink", "coefficient": 0.1, "power": 2.0}
    assert repr(EpsilonShiftedL2(0.1)) == "EpsilonShiftedL2(coefficient=0.1, epsilon=0.001)"


def test_scheduled_coefficient() -> None:
    rule = AdaptiveWeightShrink(lambda step: 0.1 * (step + 1))
    assert rule.scheduled
    assert rule.at(2) == AdaptiveWeightShrink(0.1 * 3)
    assert rule.settings() == {"name": "AdaptiveWeightShrink", "coefficient": "scheduled"}


def test_every_rule_is_in_the_tables_of_the_docs() -> None:
    for kind in (*RULES, *WEIGHT_RULES):
        assert f"| `{kind.__name__}(" in PAGE
    for kind in RULES:
        assert f"| {kind.__name__}" in (rules.__doc__ or "")
