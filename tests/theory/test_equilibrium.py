"""Equilibrium norms and rotations against closed forms and against simulated training."""

from __future__ import annotations

import math

import pytest
import torch
from tests.theory import replay
from tests.theory.replay import row_norms
from torch import Tensor

import normwise as nw
from normwise.decay import rules
from normwise.decay.rules import Rule
from normwise.theory import effective_lr, equilibrium_norm, equilibrium_rotation

RULES: list[Rule] = [
    nw.L2(0.1),
    nw.AdaptiveWeightShrink(0.1),
    nw.PowerShrink(0.1, power=2.0),
    nw.EpsilonShiftedL2(0.15, epsilon=0.3),
    nw.Sphere(2.5),
]
MODES = ("flow", "explicit", "coupled")
CASES = [  # each rule, mode and degree with one momentum; the others are the thorough ones
    pytest.param(
        rule,
        mode,
        momentum,
        degree,
        id=f"{type(rule).__name__}-{mode}-{momentum}-degree{degree}",
        marks=[] if (i + j + k + degree) % 3 == 0 else pytest.mark.thorough,
    )
    for i, rule in enumerate(RULES)
    for j, mode in enumerate(MODES)
    for k, momentum in enumerate((0.0, 0.5, 0.9))
    for degree in (1, 2)
    if (mode == "flow" or not isinstance(rule, nw.Sphere)) and not (mode == "coupled" and degree == 1)
]


def exact(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).squeeze()


def test_every_rule_is_simulated() -> None:
    assert {type(rule) for rule in RULES} == set(rules.RULES)


def simulate(
    rule: Rule, lr: float, scale: float, momentum: float, mode: str, degree: int, steps: int = 700
) -> tuple[Tensor, Tensor]:
    """Return the mean norm and the mean turn per step of units that are pushed in random directions.

    Each gradient is a random tangent vector of length scale/norm (degree 2), or the updates are exponential
    averages of random tangent vectors, of length ``scale`` in the mean (degree 1). Begins 20 % off.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 96, generator=generator, dtype=torch.float64)
    start = 1.2 * equilibrium_norm(rule, lr, scale, momentum, mode, degree)
    weight = start * weight / row_norms(weight)[:, None]
    buffer = torch.zeros_like(weight)
    norms, turns = [], []
    for step in range(steps):
        norm = row_norms(weight)[:, None]
        push = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        push = push - (push * weight).sum(1, keepdim=True) / norm**2 * weight
        push = push / row_norms(push)[:, None]
        if degree == 1:
            buffer = momentum * buffer + push * scale * math.sqrt(1 - momentum**2)
        else:
            pull = rule.rate(norm) * weight if mode == "coupled" else 0.0
            buffer = momentum * buffer + push * scale / norm + pull
        new = weight - lr * buffer
        if mode == "explicit":
            new = new - lr * rule.rate(norm) * weight
        if mode == "flow":
            moved = row_norms(new)[:, None]
            new = new * rule.flow(moved, lr) / moved
        if step >= steps - 200:
            cosine = (new * weight).sum(1) / row_norms(new) / norm[:, 0]
            norms.append(norm)
            turns.append(torch.acos(cosine))
        weight = new
    return torch.stack(norms).mean(), torch.stack(turns).mean()


@pytest.mark.parametrize(("rule", "mode", "momentum", "degree"), CASES)
@pytest.mark.one_in(2)
def test_random_pushes_settle_at_the_predicted_norm(
    rule: Rule, mode: str, momentum: float, degree: int
) -> None:
    lr, scale = 0.1 * (1 - momentum) ** 0.5, 0.6  # so that lr·c ≪ 1 − momentum
    if mode == "coupled":
        rule = nw.theory.match(rule, rule, momentum=momentum, to_mode="coupled")
    norm, turn = simulate(rule, lr, scale, momentum, mode, degree)
    tolerance = 0.01 if momentum == 0 else 0.06
    predicted = equilibrium_norm(rule, lr, scale, momentum, mode, degree)
    torch.testing.assert_close(norm, predicted, rtol=tolerance, atol=0)
    predicted = equilibrium_rotation(rule, lr, scale, momentum, mode, degree)
    torch.testing.assert_close(turn, predicted, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("rule", "momentum", "tolerance", "mode"),
    [
        pytest.param(*cell, mode, marks=[] if turn == k % 2 else pytest.mark.thorough)
        for k, mode in enumerate(MODES)
        for turn, cells in enumerate(
            (
                ((nw.L2(0.05), 0.0, 0.1), (nw.AdaptiveWeightShrink(0.05), 0.9, 0.2)),
                ((nw.L2(0.05), 0.9, 0.2), (nw.AdaptiveWeightShrink(0.05), 0.0, 0.1)),
            )
        )
        for cell in cells
    ],
)
@pytest.mark.one_in(2)
def test_a_network_settles_at_the_predicted_norms(
    rule: Rule, momentum: float, tolerance: float, mode: str
) -> None:
    """Random minibatches of noise, the scale of the gradients measured: every row of both layers."""
    generator = torch.Generator().manual_seed(2)
    inputs, targets = (torch.randn(256, n, generator=generator, dtype=torch.float64) for n in (6, 2))
    weights = [w / row_norms(w)[:, None] for w in replay.WEIGHTS]
    buffers = [torch.zeros_like(w) for w in weights]
    if mode == "coupled":
        rule = nw.theory.match(rule, rule, momentum=momentum, to_mode="coupled")
    lr, records = 0.1 * (1 - momentum) ** 0.5, []
    for step in range(1600):
        batch = torch.randint(256, (8,), generator=generator)
        leaves = [w.requires_grad_() for w in weights]
        error = replay.outputs(leaves, replay.HEAD, inputs[batch]) - targets[batch]
        grads = torch.autograd.grad(error.square().mean(), leaves)
        weights = [w.detach() for w in weights]
        record = []
        for k, (old, grad) in enumerate(zip(weights, grads, strict=True)):
            norm = row_norms(old)
            pull = rule.rate(norm)[:, None] * old
            buffers[k] = momentum * buffers[k] + grad + (pull if mode == "coupled" else 0)
            new = old - lr * buffers[k] - (lr * pull if mode == "explicit" else 0)
            if mode == "flow":
                new = new * (rule.flow(row_norms(new), lr) / row_norms(new))[:, None]
            cosine = (new * old).sum(1) / row_norms(new) / norm
            record.append(torch.stack([norm, (row_norms(grad) * norm) ** 2, torch.acos(cosine) ** 2]))
            weights[k] = new
        if step >= 600:
            records.append(torch.cat(record, dim=1))
    norms, squared_scales, squared_turns = torch.stack(records).mean(0)
    scales = squared_scales.sqrt()
    predicted = equilibrium_norm(rule, lr, scales, momentum, mode)
    torch.testing.assert_close(norms, predicted, rtol=tolerance, atol=0)
    predicted = equilibrium_rotation(rule, lr, scales, momentum, mode)
    torch.testing.assert_close(squared_turns.sqrt(), predicted, rtol=tolerance, atol=0)


SCALES = torch.logspace(-6, 3, 10, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_power_laws_have_their_closed_forms(power: float, momentum: float, mode: str) -> None:
    rule = nw.PowerShrink(1e-3, power) if power else nw.L2(1e-3)
    factor = 1 / (1 - momentum) ** (1 if mode == "coupled" else 2)
    growth = 0.01 * SCALES**2 / 2 * factor / 1e-3
    found = equilibrium_norm(rule, 0.01, SCALES, momentum, mode)  # lr·c(n) stays below 1
    torch.testing.assert_close(found, growth ** (1 / (4 + power)), rtol=1e-13, atol=0)
    kappa = 1 / (1 + momentum) if mode == "coupled" else (1 - momentum) / (1 + momentum)
    turn = equilibrium_rotation(rule, 0.01, SCALES, momentum, mode)
    torch.testing.assert_close(turn, (2 * 0.01 * rule.rate(found) * kappa).sqrt(), rtol=1e-12, atol=0)
    if mode == "coupled":
        return
    growth = 0.01 * SCALES**2 / 2 * (1 + momentum) / (1 - momentum) / 1e-3
    found = equilibrium_norm(rule, 0.01, SCALES, momentum, mode, degree=1)
    torch.testing.assert_close(found, growth ** (1 / (2 + power)), rtol=1e-13, atol=0)
    turn = equilibrium_rotation(rule, 0.01, SCALES, momentum, mode, degree=1)
    torch.testing.assert_close(turn, (2 * 0.01 * rule.rate(found) * kappa).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0])
def test_epsilon_shift_has_its_roots(epsilon: float) -> None:
    rule = nw.EpsilonShiftedL2(0.1, epsilon)
    growth = 0.01 * SCALES**2 / 2 / 0.1
    found = equilibrium_norm(rule, 0.01, SCALES, degree=1)
    quadratic = epsilon / 2 + (epsilon**2 / 4 + growth).sqrt()
    torch.testing.assert_close(found, quadratic, rtol=1e-13, atol=0)
    found = equilibrium_norm(rule, 0.01, SCALES)
    assert bool((found >= epsilon).all())
    # n³·(n − ε) = growth, solved for n; a small difference n − ε is lost in n itself
    torch.testing.assert_close(epsilon + growth / found**3, found, rtol=1e-13, atol=0)
    turn = equilibrium_rotation(rule, 0.01, SCALES)
    torch.testing.assert_close(turn, 0.01 * SCALES / found**2, rtol=1e-13, atol=0)


def test_a_rule_without_pull_has_no_finite_norm() -> None:
    for rule in (nw.L2(0.0), nw.AdaptiveWeightShrink(0.0), nw.EpsilonShiftedL2(0.0)):
        assert equilibrium_norm(rule, 0.1, 1.0).item() == math.inf
        assert equilibrium_norm(rule, 0.1, 1.0, mode="explicit").item() == math.inf
        assert equilibrium_rotation(rule, 0.1, 1.0).item() == 0.0


def test_sphere_turns_by_geometry() -> None:
    assert torch.equal(equilibrium_norm(nw.Sphere(2.0), 0.1, torch.ones(3)), torch.full((3,), 2.0).double())
    torch.testing.assert_close(equilibrium_rotation(nw.Sphere(2.0), 0.1, 3.0), exact(0.3 / 4))
    slow = equilibrium_rotation(nw.Sphere(2.0), 0.1, 3.0, momentum=0.6)
    torch.testing.assert_close(slow, exact(0.3 / 4 / 0.8))
    torch.testing.assert_close(
        equilibrium_rotation(nw.Sphere(2.0), 0.1, 3.0, momentum=0.6, degree=1), exact(0.3 / 2)
    )


def test_a_rotating_sphere_turns_by_the_learning_rate() -> None:
    turn = equilibrium_rotation(nw.RotatingSphere(2.0), 0.1, torch.ones(3), momentum=0.9)
    assert torch.equal(turn, torch.full((3,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize(("power", "exponent"), [(0.0, 0.0), (1.0, 0.2), (2.0, 1 / 3)])
def test_how_well_rules_balance_layers(power: float, exponent: float) -> None:
    rule = nw.PowerShrink(0.1, power) if power else nw.L2(0.1)
    slow, fast = equilibrium_rotation(rule, 1e-3, exact(1.0, 10.0))
    torch.testing.assert_close(torch.log10(fast / slow), exact(exponent), rtol=0, atol=1e-12)


def test_arguments_broadcast_and_results_are_float64() -> None:
    lr, scale = torch.tensor([[0.1], [0.2]]), torch.tensor([1, 2, 3])
    norm = equilibrium_norm(nw.L2(0.1), lr, scale)
    assert norm.shape == (2, 3)
    assert norm.dtype == torch.float64
    assert equilibrium_norm(nw.L2(0.1), 0.1, 1).shape == ()
    assert equilibrium_norm(nw.L2(0.1), 0.1, torch.ones(0)).shape == (0,)
    assert equilibrium_norm(nw.L2(0.1), 0.1, torch.ones(0), mode="explicit").shape == (0,)
    leaf = torch.ones(2, requires_grad=True)
    assert not equilibrium_norm(nw.L2(0.1), 0.1, leaf).requires_grad


def test_effective_lr() -> None:
    norms = torch.tensor([1e-30, 0.5, 1e30])
    wide = norms.double()
    assert torch.equal(effective_lr(0.1, norms), 0.1 / wide**2)
    assert torch.equal(effective_lr(0.1, norms, degree=1), 0.1 / wide)
    assert effective_lr(0.1, 2).item() == 0.1 / 4
    assert effective_lr(0, 2.0).item() == 0.0
    assert effective_lr(torch.ones(3, 1), torch.ones(2)).shape == (3, 2)


def test_an_effective_lr_is_what_turns_a_unit() -> None:
    """SGD at norm α with lr·α² takes the same directions as at norm 1 with lr."""
    ends = []
    for factor in (1.0, 8.0):
        weights = [factor * w / row_norms(w)[:, None] for w in replay.WEIGHTS]
        lr = 0.05 * factor**2
        torch.testing.assert_close(effective_lr(lr, factor), exact(0.05))
        for step in range(20):
            grads = replay.gradients(weights, replay.HEAD, step)
            weights = [w - lr * g for w, g in zip(weights, grads[:-1], strict=True)]
        ends.append(weights[0] / row_norms(weights[0])[:, None])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
