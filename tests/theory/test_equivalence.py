"""Decayed float64 runs against undecayed ones with the step sizes of ``without_decay``."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.theory import replay
from tests.theory.replay import GENERATOR, RULES, SCHEDULES, STEPS, WEIGHTS, row_norms
from torch import Tensor

import normwise as nw
from normwise.decay import rules
from normwise.decay.rules import Rule
from normwise.theory import UndecayedSteps, without_decay

CASES = [
    pytest.param(rule, mode, id=f"{type(rule).__name__}-{mode}")
    for rule in RULES
    for mode in ("flow", "explicit", "coupled")
    if mode == "flow" or not isinstance(rule, nw.Sphere)
]
# each rule and mode with both momenta and with both schedules; the other pairs are the thorough ones
SETTINGS = [
    pytest.param(
        *case.values,
        momentum,
        schedule,
        id=f"{case.id}-{momentum}-{schedule}",
        marks=[] if (i + j + k) % 2 == 0 else pytest.mark.thorough,
    )
    for i, case in enumerate(CASES)
    for j, momentum in enumerate((0.0, 0.9))
    for k, schedule in enumerate(SCHEDULES)
]
DECOUPLED = [case for case in CASES if case.values[1] != "coupled"]


def test_every_rule_is_replayed() -> None:
    assert {type(rule) for rule in RULES} == set(rules.RULES)


@pytest.mark.parametrize(("rule", "mode", "momentum", "schedule"), SETTINGS)
@pytest.mark.one_in(2)
def test_an_undecayed_run_takes_the_same_directions(
    rule: Rule, mode: str, momentum: float, schedule: str
) -> None:
    lrs = SCHEDULES[schedule] * (1 - momentum)
    decayed = replay.decayed_sgd(rule, lrs, momentum, mode)
    steps = [without_decay(lrs, rule, decayed.norms(k), momentum, mode) for k in range(2)]
    undecayed = replay.undecayed_sgd(lrs, momentum, steps)

    assert decayed.angle(undecayed) < 1e-9
    assert decayed.angle(replay.naive_sgd(schedule, momentum)) > 1e-3
    here, there = (replay.outputs(run.weights, run.head) for run in (decayed, undecayed))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    for k in range(2):  # the scale is the ratio of the norms, at every step and at the end
        ratios = torch.stack(decayed.starts[k]) / torch.stack(undecayed.starts[k])
        torch.testing.assert_close(steps[k].scale[:-1], ratios, rtol=1e-9, atol=0)
        final = row_norms(decayed.weights[k]) / row_norms(undecayed.weights[k])
        torch.testing.assert_close(steps[k].scale[-1], final, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_a_scheduled_coefficient_and_another_clock(mode: str) -> None:
    rule = nw.L2(lambda step: 0.002 * (1 + step % 3))
    lrs, ones = SCHEDULES["warm-up and cosine"], torch.ones(STEPS, dtype=torch.float64)
    times = None if mode == "coupled" else ones  # a coupled rule has no clock
    decayed = replay.decayed_sgd(rule, lrs, 0.5, mode, times)
    right, wrong = (
        [without_decay(lrs, used, decayed.norms(k), 0.5, mode, times=times) for k in range(2)]
        for used in (rule, rule.at(0))
    )
    assert decayed.angle(replay.undecayed_sgd(lrs, 0.5, right)) < 1e-9
    assert decayed.angle(replay.undecayed_sgd(lrs, 0.5, wrong)) > 1e-4


@pytest.mark.parametrize(("rule", "mode"), DECOUPLED)
@pytest.mark.one_in(2)
def test_adam_is_replayed(rule: Rule, mode: str) -> None:
    lrs, beta1 = SCHEDULES["warm-up and cosine"] / 5, replay.BETAS[0]
    decayed = replay.adam(rule, mode, lrs)
    steps = [without_decay(lrs, rule, decayed.norms(k), beta1, mode, degree=1) for k in range(2)]
    assert decayed.angle(replay.adam(None, mode, lrs, steps)) < 1e-9
    assert decayed.angle(naive_adam()) > 1e-3
    for k in range(2):
        assert torch.equal(steps[k].momentum, beta1 * steps[k].ratio)


@functools.cache
def naive_adam() -> replay.Run:
    return replay.adam(None, "flow", SCHEDULES["warm-up and cosine"] / 5)


@pytest.mark.parametrize("mode", ["flow", "explicit"])
def test_a_sign_optimizer_is_replayed(mode: str) -> None:
    """Any update that is a function of the buffer's direction: SGD's momentum, Adam's step size."""

    def signs(rule: Rule | None, steps: UndecayedSteps | None) -> tuple[Tensor, Tensor]:
        weight, buffer, seen = WEIGHTS[1], torch.zeros_like(WEIGHTS[1]), []
        for t, lr in enumerate(lrs):
            grad = replay.gradients([WEIGHTS[0], weight], replay.HEAD, t)[1]
            buffer = (steps.momentum[t][:, None] if steps else 0.9) * buffer + grad
            update = (steps.lr[t][:, None] if steps else lr) * buffer.sign()
            weight, norm = replay.shrunk(weight, update, rule, mode, lr)
            seen.append(norm)
        return weight / row_norms(weight)[:, None], torch.stack(seen)

    lrs = torch.full((50,), 1e-2, dtype=torch.float64)
    rule = nw.AdaptiveWeightShrink(0.5)
    direction, norms = signs(rule, None)
    steps = without_decay(lrs, rule, norms, 0.9, mode, degree=1)
    torch.testing.assert_close(signs(None, steps)[0], direction, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rule", "mode"), CASES)
@pytest.mark.one_in(2)
def test_decay_beside_a_torch_optimizer_is_replayed(rule: Rule, mode: str) -> None:
    lrs = 0.1 * SCHEDULES["warm-up and cosine"][:80]
    params = [torch.nn.Parameter(w.clone()) for w in (*WEIGHTS, replay.HEAD)]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    run = replay.Run()

    def record(*_: object) -> None:
        for seen, weight in zip(run.seen, params[:-1], strict=True):
            seen.append(row_norms(weight.detach()))

    # Hooks are called in the order in which they were registered: this one before that of Decay.
    (optimizer.register_step_post_hook if mode == "flow" else optimizer.register_step_pre_hook)(record)
    nw.Decay(optimizer, rule, params[:-1], mode=mode)
    for step, lr in enumerate(lrs.tolist()):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        weights: list[Tensor] = list(params)
        replay.loss(weights[:-1], weights[-1], step).backward()
        optimizer.step()
    run.weights = [weight.detach() for weight in params[:-1]]

    steps = [without_decay(lrs, rule, run.norms(k), 0.9, mode) for k in range(2)]
    assert run.angle(replay.undecayed_sgd(lrs, 0.9, steps)) < 1e-9


@pytest.mark.parametrize("mode", ["explicit", "coupled"])
def test_l2_without_momentum_is_an_exponential_schedule(mode: str) -> None:
    lr, decay, steps = 0.1, 0.05, 40
    result = without_decay([lr] * steps, nw.L2(decay), torch.ones(steps), mode=mode)
    t = torch.arange(steps, dtype=torch.float64)
    torch.testing.assert_close(result.lr, lr * (1 - lr * decay) ** -(2 * t + 1), rtol=1e-13, atol=0)
    assert torch.equal(result.momentum, torch.zeros(steps, dtype=torch.float64))


def test_coupled_scale_obeys_the_two_term_recursion() -> None:
    momentum, rule = 0.9, nw.AdaptiveWeightShrink(0.1)
    lrs = 0.01 + 0.01 * torch.rand(100, generator=GENERATOR, dtype=torch.float64)
    norms = 1 + torch.rand(100, 3, generator=GENERATOR, dtype=torch.float64)
    scale = without_decay(lrs, rule, norms, momentum, "coupled").scale
    before, now = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t in range(100):
        m = momentum * lrs[t] / lrs[t - 1] if t else torch.tensor(0.0)
        before, now = now, (1 + m - lrs[t] * 0.1 * norms[t]) * now - m * before
        torch.testing.assert_close(scale[t + 1], now, rtol=1e-11, atol=0)


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_without_a_coefficient_nothing_changes(mode: str) -> None:
    lrs = SCHEDULES["warm-up and cosine"]
    steps = without_decay(lrs, nw.L2(0.0), torch.ones(STEPS, 2), 0.9, mode)
    assert torch.equal(steps.lr, lrs[:, None].expand(-1, 2))
    assert bool((steps.momentum == 0.9).all() & (steps.scale == 1).all() & (steps.ratio == 1).all())


@pytest.mark.parametrize("mode", ["flow", "explicit"])
def test_two_halves_make_the_whole(mode: str) -> None:
    rule, lrs = nw.AdaptiveWeightShrink(0.1), SCHEDULES["constant"]
    norms = 1 + torch.rand(STEPS, 2, generator=GENERATOR, dtype=torch.float64)
    half = STEPS // 2
    whole = without_decay(lrs, rule, norms, mode=mode)
    first = without_decay(lrs[:half], rule, norms[:half], mode=mode)
    second = without_decay(lrs[half:], rule, norms[half:], mode=mode)
    torch.testing.assert_close(whole.scale[-1], first.scale[-1] * second.scale[-1], rtol=1e-12, atol=0)
    # The whole run is at weights 1/a times as long then, where steps must be 1/a² times as large.
    torch.testing.assert_close(whole.lr[half:], second.lr / first.scale[-1] ** 2, rtol=1e-12, atol=0)


def test_a_flow_split_in_two_leaves_the_same_scale() -> None:
    rule = nw.PowerShrink(0.3, power=1.5)
    start = torch.tensor([0.1, 3.0], dtype=torch.float64)
    once = without_decay([0.5], rule, start[None])
    twice = without_decay([0.2, 0.3], rule, torch.stack([start, rule.flow(start, 0.2)]))
    torch.testing.assert_close(once.scale[-1], twice.scale[-1], rtol=1e-13, atol=0)


def test_shapes_and_types() -> None:
    one = without_decay([0.1, 0.1], nw.L2(0.1), torch.ones(2))
    assert [tuple(field.shape) for field in one] == [(2,), (2,), (3,), (2,)]
    assert all(field.dtype == torch.float64 for field in one)
    none = without_decay([], nw.L2(0.1), torch.ones(0, 4))
    assert [tuple(field.shape) for field in none] == [(0, 4), (0, 4), (1, 4), (0, 4)]
