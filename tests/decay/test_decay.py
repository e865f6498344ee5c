"""nw.Decay in its three modes: equal to torch where torch has the rule, equal to the formula elsewhere."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import normwise as nw

Params = list[torch.nn.Parameter]
DECAY = 0.037


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 5), (4, 3, 3, 2), (33,), (7, 64)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def trained(optimizer: Optimizer, params: Params, steps: int = 10) -> list[Tensor]:
    """Weights after some steps with gradients that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach() for param in params]


COUPLED: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, **k: torch.optim.SGD(p, lr=0.1, **k),
    "momentum": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, **k),
    "nesterov": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **k),
    "sgd loop": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False, **k),
    "sgd foreach": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True, **k),
    "sgd maximize": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, lr=0.01, **k),
    "adam amsgrad": lambda p, **k: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=0.01, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, lr=0.01, centered=True, **k),
    "adamax": lambda p, **k: torch.optim.Adamax(p, lr=0.01, **k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, lr=0.01, **k),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", COUPLED)
def test_l2_coupled_is_weight_decay_to_the_bit(name: str, dtype: torch.dtype) -> None:
    theirs, ours = parameters(dtype), parameters(dtype)
    optimizer = COUPLED[name](ours)
    nw.Decay(optimizer, nw.L2(DECAY), ours, mode="coupled")
    expected = trained(COUPLED[name](theirs, weight_decay=DECAY), theirs)
    for actual, wanted in zip(trained(optimizer, ours), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_l2_explicit_is_adamw_to_the_bit(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    theirs, ours = parameters(dtype), parameters(dtype)
    optimizer = torch.optim.AdamW(ours, lr=0.01, weight_decay=0, **settings)
    nw.Decay(optimizer, nw.L2(DECAY), ours, mode="explicit")
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=DECAY, **settings)
    for actual, wanted in zip(trained(optimizer, ours), trained(adamw, theirs), strict=True):
        assert torch.equal(actual, wanted)


def fused_kinds() -> list[Any]:
    sgd = {"lr": 0.1, "momentum": 0.9, "fused": True}
    return [
        pytest.param(torch.optim.SGD, sgd, "coupled", id="sgd"),
        pytest.param(torch.optim.Adam, {"lr": 0.01, "fused": True}, "coupled", id="adam"),
        pytest.param(torch.optim.Adagrad, {"lr": 0.01, "fused": True}, "coupled", id="adagrad"),
        pytest.param(torch.optim.AdamW, {"lr": 0.01, "fused": True}, "explicit", id="adamw"),
    ]


@pytest.mark.parametrize(("kind", "settings", "mode"), fused_kinds())
def test_l2_beside_fused_optimizers(kind: Any, settings: dict[str, Any], mode: str) -> None:
    """Fused kernels may contract a multiply and an add, which moves the last bits: 8 ULP a step."""
    theirs, ours = parameters(), parameters()
    optimizer = kind(ours, weight_decay=0, **settings)
    nw.Decay(optimizer, nw.L2(DECAY), ours, mode=mode)
    expected = trained(kind(theirs, weight_decay=DECAY, **settings), theirs)
    for actual, wanted in zip(trained(optimizer, ours), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=80 * 2**-23, atol=80 * 2**-23)


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("measure", ["norm", "rms"])
def test_a_step_is_the_formula(mode: str, dim: int | None, measure: str) -> None:
    rule, lr = nw.AdaptiveWeightShrink(0.3), 0.25
    param = torch.nn.Parameter(torch.randn(5, 4, 3, dtype=torch.float64))
    grad = torch.randn(5, 4, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD([param], lr=lr)
    nw.Decay(optimizer, rule, param, dim=dim, mode=mode, measure=measure)
    others = [k for k in range(3) if dim is None or k != dim % 3]
    size = 1 if measure == "norm" else math.prod(param.shape[k] for k in others) ** 0.5

    def magnitude(w: Tensor) -> Tensor:
        return w.square().sum(others, keepdim=True).sqrt() / size

    w = param.detach().clone()
    if mode == "flow":
        after = w - lr * grad
        expected = after * rule.flow(magnitude(after), lr) / magnitude(after)
    elif mode == "explicit":
        expected = w * (1 - lr * rule.rate(magnitude(w))) - lr * grad
    else:
        expected = w - lr * (grad + rule.rate(magnitude(w)) * w)
    param.grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("measure", ["norm", "rms"])
@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_parameters_together_are_decayed_as_each_by_itself(mode: str, measure: str) -> None:
    """Of other sizes, types, dims, masks and groups, which a rule may be evaluated for at once."""
    rule = nw.AdaptiveWeightShrink(0.01)
    ends = []
    for together in (True, False):
        params = [*parameters(), *parameters(torch.float64)]
        groups = [{"params": params[k::2], "lr": lr} for k, lr in ((0, 0.1), (1, 0.03))]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        units = [nw.Unit(p, dim) for p, dim in zip(params, (0, 0, None, 0, 1, 0, 0, None), strict=True)]
        units[5] = nw.Unit(params[5], 0, [True, False, True, True])
        for some in [units] if together else [[unit] for unit in units]:
            nw.Decay(optimizer, rule, some, mode=mode, measure=measure)
        ends.append(trained(optimizer, params, 3))
    for mine, other in zip(*ends, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_masked_rows_alone_are_decayed(mode: str) -> None:
    plain, masked = (torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator())) for _ in "ab")
    masked.data.copy_(plain.data)
    mask = torch.tensor([True, False, False, True])
    optimizers = [torch.optim.SGD([p], lr=0.5, momentum=0.9) for p in (plain, masked)]
    nw.Decay(optimizers[0], nw.PowerShrink(0.1, 1.5), plain, mode=mode)
    nw.Decay(optimizers[1], nw.PowerShrink(0.1, 1.5), nw.Unit(masked, mask=mask), mode=mode)
    undecayed = torch.nn.Parameter(plain.detach().clone())
    optimizers.append(torch.optim.SGD([undecayed], lr=0.5, momentum=0.9))
    for _ in range(3):
        for param in (plain, masked, undecayed):
            param.grad = torch.ones_like(param)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(masked[mask], plain[mask])
    assert torch.equal(masked[~mask], undecayed[~mask])


def test_sphere_keeps_each_initial_norm_or_the_radius() -> None:
    first, second = (torch.nn.Parameter(torch.randn(4, 3)) for _ in "ab")
    before = nw.Unit(first).norms()
    optimizer = torch.optim.SGD([first, second], lr=0.5)
    nw.Decay(optimizer, nw.Sphere(), first)
    nw.Decay(optimizer, nw.Sphere(2.0), second)
    trained(optimizer, [first, second])
    torch.testing.assert_close(nw.Unit(first).norms(), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(nw.Unit(second).norms(), torch.full((4,), 2.0).double(), rtol=1e-6, atol=0)


def test_zero_units_stay_zero_and_others_move() -> None:
    for rule in (nw.L2(0.1), nw.EpsilonShiftedL2(0.1, 0.5), nw.Sphere(1.0)):
        param = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        optimizer = torch.optim.SGD([param], lr=1.0)
        nw.Decay(optimizer, rule, param)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert param[0].tolist() == [0, 0]
        assert 0 < float(param[1].detach().norm()) < 5


def test_the_rule_lives_as_long_as_the_optimizer() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    alive = weakref.ref(nw.Decay(optimizer, nw.Sphere(3.0), param))
    gc.collect()
    param.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(nw.Unit(param).norms(), torch.full((2,), 3.0).double())
    del optimizer
    gc.collect()
    assert alive() is None


def test_removed_rules_do_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    untouched = set(vars(optimizer))
    decay = nw.Decay(optimizer, nw.L2(0.5), param)
    decay.remove()
    decay.remove()
    param.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(param, torch.ones(2, 2))
    assert set(vars(optimizer)) == untouched
    nw.Decay(optimizer, nw.L2(0.5), param)  # and the parameter is free for another rule
    with pytest.raises(RuntimeError, match="was removed from its optimizer"):
        copy.deepcopy(decay)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_a_copied_optimizer_decays_on(mode: str, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    first = nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), params[:2], mode=mode)
    if mode == "flow":
        nw.Decay(optimizer, nw.Sphere(), params[2], dim=None, clock="lr^2/max_lr")
    trained(optimizer, params, 3)
    copied_optimizer, copied_first = copied((optimizer, first))
    assert copied_first.optimizer is copied_optimizer
    assert repr(copied_first) == repr(first)
    copied_params = copied_optimizer.param_groups[0]["params"]
    for mine, other in zip(trained(optimizer, params), trained(copied_optimizer, copied_params), strict=True):
        assert torch.equal(mine, other)
    copied_first.remove()
    assert first.optimizer._normwise_decays  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["6 rows of 1 parameter", '"lr":', '"norm":', "w ← w·φ(n, t)/n", "every    1 step"]),
        ({"dim": None, "every": 8, "measure": "rms"}, ["1 whole tensors", '"rms":', "8 steps", "flush()"]),
        ({"dim": 1, "mode": "coupled"}, ["5 columns of 1 parameter", "clock    none", "∇ + c(n)·w"]),
        (
            {"mode": "explicit", "clock": "step", "compensated": True},
            ["(1 − t·c(n))·w", "is 1", "compensated"],
        ),
    ],
)
def test_a_decay_explains_itself(settings: dict[str, Any], expected: list[str]) -> None:
    param = parameters()[0]
    decay = nw.Decay(torch.optim.SGD([param], lr=0.1), nw.AdaptiveWeightShrink(0.25), param, **settings)
    decay._notes.append("reference 1: units of about unit norm")
    text = decay.explain()
    for part in (
        "AdaptiveWeightShrink(coefficient=0.25)",
        *expected,
        "reference 1: units of about unit norm",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("rule", "dim", "as_units", "expected"),
    [
        (nw.AdaptiveWeightShrink(0.1), 0, False, ["2 parameters are decayed row by row (dim=0); give Units"]),
        (nw.Sphere(), None, False, ["2 parameters are decayed as whole tensors (dim=None); give Units"]),
        (nw.Sphere(), 1, False, ["2 parameters are decayed column by column (dim=1); give Units"]),
        (nw.L2(0.1), 0, False, []),
        (nw.AdaptiveWeightShrink(0.1), 0, True, []),
    ],
)
def test_how_bare_tensors_are_taken_is_logged(
    rule: nw.Rule, dim: int | None, as_units: bool, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    params = [torch.nn.Parameter(torch.ones(rows, 2)) for rows in (3, 4)]
    given: Any = [nw.Unit(param) for param in params] if as_units else params
    with caplog.at_level("INFO", logger="normwise"):
        nw.Decay(torch.optim.SGD(params, lr=0.1), rule, given, dim=dim)
    assert [
        message[: len(start)] for message, start in zip(caplog.messages, expected, strict=True)
    ] == expected
