"""Joint units, the authors' published form, the sphere that turns, coefficients that follow a schedule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import normwise as nw
from normwise.decay.rules import Rule


def angles(before: list[Tensor], after: list[Tensor], dim: int | None) -> Tensor:
    """How far each unit has turned, in radians (by the chord: an arc cosine loses small angles)."""
    unit = nw.Unit(before, dim)
    rays = [
        [one.double() / unit.broadcast(nw.Unit(side, dim).norms(), one) for one in side]
        for side in (before, after)
    ]
    chords = nw.Unit([a - b for a, b in zip(*rays, strict=True)], dim).norms()
    return 2 * torch.asin(chords / 2)


# -- joint units -------------------------------------------------------------------------------------------


JOINT_RULES: list[Rule] = [nw.AdaptiveWeightShrink(0.2), nw.EpsilonShiftedL2(0.2, 0.5), nw.Sphere()]


@pytest.mark.parametrize(("rule", "mode"), [(rule, mode) for rule in JOINT_RULES for mode in rule.modes])
@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("measure", ["norm", "rms"])
def test_a_joint_unit_is_the_unit_of_the_concatenation(
    measure: str, dim: int | None, rule: Rule, mode: str
) -> None:
    whole = nn.Parameter(torch.randn(4, 7, dtype=torch.float64))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split([3, 4], dim=1)]
    optimizers: list[Optimizer] = [SGD([whole], lr=0.1, momentum=0.9), SGD(parts, lr=0.1, momentum=0.9)]
    nw.Decay(optimizers[0], rule, nw.Unit(whole, dim), mode=mode, measure=measure)
    nw.Decay(optimizers[1], rule, nw.Unit(parts, dim), mode=mode, measure=measure)
    for _ in range(4):
        whole.grad = torch.randn(4, 7, dtype=torch.float64)
        for part, grad in zip(parts, whole.grad.split([3, 4], dim=1), strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in parts], 1), whole.detach(), rtol=1e-12, atol=0)


# -- the published form of the ε-shift ---------------------------------------------------------------------


def published(weight: Tensor, grad: Tensor, decay: float, epsilon: float) -> Tensor:
    """∇ + λ((1 − ε/s)(w − m) + m), written as the authors' training code has it."""
    rows = weight.flatten(1)
    mean, deviation = rows.mean(1, keepdim=True), rows.std(1, keepdim=True)
    return grad + decay * ((1 - epsilon / deviation) * (rows - mean) + mean).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_form(dtype: torch.dtype) -> None:
    param, plain = (nn.Parameter(torch.empty(6, 3, 3, 3, dtype=dtype)) for _ in "ab")
    nn.init.normal_(param, mean=0.1)
    plain.data.copy_(param.data)
    optimizer, bare = SGD([param], lr=0.1, momentum=0.9), SGD([plain], lr=0.1, momentum=0.9)
    nw.Decay(optimizer, nw.PublishedEpsilonShift(0.3, 0.2), param, mode="coupled")
    for _ in range(5):
        param.grad = torch.randn_like(param)
        plain.grad = published(plain.detach(), param.grad, 0.3, 0.2)
        optimizer.step()
        bare.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(param, plain, rtol=tolerance, atol=tolerance)


def test_published_form_of_units_without_a_deviation() -> None:
    """Constant units are pulled by plain L2; so are units of one element."""
    for weight in (torch.full((2, 4), 3.0), torch.tensor([[1.0], [2.0]]), torch.zeros(2, 3)):
        param = nn.Parameter(weight.clone())
        optimizer = SGD([param], lr=0.5)
        nw.Decay(optimizer, nw.PublishedEpsilonShift(0.4, 0.2), param, mode="coupled")
        param.grad = torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close(param.detach(), weight * 0.8)


def test_published_form_masked_along_columns_and_scaled() -> None:
    param = nn.Parameter(torch.randn(5, 3))
    before = param.detach().clone()
    optimizer = SGD([param], lr=0.1, fused=True)
    unit = nw.Unit(param, dim=1, mask=[True, False, True])
    nw.Decay(optimizer, nw.PublishedEpsilonShift(0.3, 0.2), unit, mode="coupled")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    param.grad = torch.zeros_like(param)
    scaler.step(optimizer)
    expected = before - 0.1 * published(before.T, torch.zeros(3, 5), 0.3, 0.2).T
    torch.testing.assert_close(param.detach()[:, ::2], expected[:, ::2])
    assert torch.equal(param[:, 1], before[:, 1])


@pytest.mark.parametrize("mode", ["flow", "explicit"])
def test_published_form_is_coupled_only(mode: str) -> None:
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="use mode='coupled'"):
        nw.Decay(SGD([param], lr=0.1), nw.PublishedEpsilonShift(0.1), param, mode=mode)
    with pytest.raises(ValueError, match="measure='rms' has no meaning with PublishedEpsilonShift"):
        nw.Decay(SGD([param], lr=0.1), nw.PublishedEpsilonShift(0.1), param, mode="coupled", measure="rms")


# -- the sphere that turns ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    lr=st.floats(1e-4, 1.0),
    scale=st.floats(-3, 20).map(lambda e: 10.0**e),
    dim=st.sampled_from([0, 1, None]),
    radius=st.sampled_from([None, 2.0]),
    joint=st.booleans(),
)
def test_every_unit_turns_by_the_learning_rate(
    lr: float, scale: float, dim: int | None, radius: float | None, joint: bool
) -> None:
    """Whatever the size of the gradient, which differs by 10 from row to row."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 4, 3), (4, 4)] if joint else [(4, 4, 3)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = Adam(params, lr=lr) if joint else SGD(params, lr=lr)
    nw.Decay(optimizer, nw.RotatingSphere(radius), nw.Unit(params, dim))
    norms = nw.Unit(params, dim).norms()
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        for param in params:
            sizes = scale * 10.0 ** torch.arange(4, dtype=torch.float64).view(4, *[1] * (param.ndim - 1))
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * sizes
        optimizer.step()
        turned = angles(before, [p.detach() for p in params], dim)
        torch.testing.assert_close(turned, torch.full_like(turned, lr), rtol=1e-7, atol=1e-12)
        expected = norms if radius is None else torch.full_like(norms, radius)
        torch.testing.assert_close(nw.Unit(params, dim).norms(), expected, rtol=1e-12, atol=0)


def test_the_turn_is_towards_the_update() -> None:
    param = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0]]))
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.RotatingSphere(), param)
    param.grad = torch.tensor([[5.0, -3.0, -4.0]])
    optimizer.step()
    expected = [math.cos(0.1), 0.6 * math.sin(0.1), 0.8 * math.sin(0.1)]
    np.testing.assert_allclose(param.detach()[0], expected, rtol=1e-6)


def test_what_has_no_tangential_update_does_not_turn() -> None:
    weight = torch.randn(3, 8)
    param = nn.Parameter(weight.clone())
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.RotatingSphere(), param)
    for grad in (torch.zeros(3, 8), weight * 3):
        param.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(param.detach(), weight)


@pytest.mark.parametrize("idle", [0, 1])
def test_turning_leaves_alone_masked_units_and_half_of_a_joint_unit(idle: int) -> None:
    masked, first, second = (nn.Parameter(torch.randn(3, 4)) for _ in "abc")
    optimizer = SGD([masked, first, second], lr=0.1)
    nw.Decay(optimizer, nw.RotatingSphere(), nw.Unit(masked, mask=[True, False, True]))
    nw.Decay(optimizer, nw.RotatingSphere(), nw.Unit([first, second]))
    row, both = masked[1].detach().clone(), [first.detach().clone(), second.detach().clone()]
    moved = (second, first)[idle]
    masked.grad, moved.grad = torch.ones(3, 4), torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(masked[1].detach(), row - 0.1)
    torch.testing.assert_close(moved.detach(), both[1 - idle] - 0.1)  # half a joint unit is not turned
    assert torch.equal((first, second)[idle], both[idle])


def test_turning_with_a_closure_that_makes_the_first_gradient() -> None:
    param = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.LBFGS([param], lr=0.1)
    nw.Decay(optimizer, nw.RotatingSphere(), param)
    before = param.detach().clone()

    def closure() -> float:
        param.grad = None
        loss = (param - 3).pow(4).sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    turned = angles([before], [param.detach()], 0)
    torch.testing.assert_close(turned, torch.full_like(turned, 0.1), rtol=1e-5, atol=0)


def test_a_step_skipped_by_a_scaler_does_not_turn() -> None:
    param = nn.Parameter(torch.randn(3, 4))
    optimizer = SGD([param], lr=0.1, fused=True)
    nw.Decay(optimizer, nw.RotatingSphere(5.0), param)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    before = param.detach().clone()
    param.grad = torch.full_like(param, math.inf)
    scaler.step(optimizer)
    assert torch.equal(param, before)


def test_rms_is_the_measure_of_the_radius_too() -> None:
    param = nn.Parameter(torch.randn(3, 16))
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.RotatingSphere(0.5), param, measure="rms")
    param.grad = torch.randn(3, 16)
    optimizer.step()
    torch.testing.assert_close(param.detach().square().mean(1).sqrt(), torch.full((3,), 0.5))


# -- coefficients that follow a schedule -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_a_coefficient_is_asked_for_once_a_step(mode: str) -> None:
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    optimizer = SGD(params, lr=1.0)
    asked: list[int] = []

    def coefficient(step: int) -> float:
        asked.append(step)
        return 0.1 * (step + 1)

    nw.Decay(optimizer, nw.L2(coefficient), params, mode=mode)
    expected = torch.ones(3, 2)
    for step in range(3):
        for param in params:
            param.grad = torch.zeros(3, 2)
        optimizer.step()
        expected *= math.exp(-0.1 * (step + 1)) if mode == "flow" else 1 - 0.1 * (step + 1)
        torch.testing.assert_close(params[2].detach(), expected)
    assert asked == [0, 1, 2]


def test_a_scheduled_coefficient_that_is_not_allowed() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = SGD([param], lr=1.0)
    values: Any = [0.1, -0.1]
    nw.Decay(optimizer, nw.L2(lambda step: values[step]), param)
    param.grad = torch.zeros(3, 2)
    optimizer.step()
    with pytest.raises(ValueError, match=r"coefficient=-0\.1 is not allowed"):
        optimizer.step()
