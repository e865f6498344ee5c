"""Under a GradScaler: no decay on a skipped step, the right pull on a scaled gradient, fused or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decay.common import each_mode, each_rule, gradients, weight
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import normwise as nw
from normwise.decay.rules import Rule

SCALED: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "Adam fused": lambda p: Adam(p, lr=0.01, fused=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, weight_decay=0, fused=True),
}


@each_rule
@each_mode
@pytest.mark.parametrize("name", SCALED)
def test_grad_scaler_decays_steps_taken_and_no_step_skipped(name: str, mode: str, rule: Rule) -> None:
    """The run under a GradScaler equals the run without, less the step whose gradient overflowed."""
    scaled, plain = weight(4, 6), weight(4, 6)
    optimizer, bare = SCALED[name]([scaled]), SCALED[name]([plain])
    for stepped, param in ((optimizer, scaled), (bare, plain)):
        nw.Decay(stepped, rule, param, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step, grad in enumerate(gradients(scaled, 6)):
        before = scaled.detach().clone()
        scaled.grad = grad * scaler.get_scale()
        scaler.scale(torch.zeros(()))  # initialises the scaler
        if step == 2:
            scaled.grad[1, 2] = math.inf
        kept = scaled.grad
        scaler.step(optimizer)
        scaler.update()
        assert scaled.grad is kept
        if step == 2:
            assert torch.equal(scaled, before)
            continue
        plain.grad = grad.clone()
        bare.step()
        if mode == "coupled":  # the sum is rounded at another scale
            torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(scaled, plain)


@pytest.mark.parametrize("name", SCALED)
def test_a_skipped_step_is_no_step_of_a_schedule(name: str) -> None:
    param = weight(4, 6)
    optimizer = SCALED[name]([param])
    decay = nw.Decay(optimizer, nw.L2(lambda step: 0.1 * step), param)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for value in (1.0, math.inf, 1.0):
        param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
    assert decay.steps == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_does_not_move_the_peak_rate(fused: bool) -> None:
    param = weight(4, 6)
    optimizer = SGD([param], lr=0.1, fused=fused)
    decay = nw.Decay(optimizer, nw.L2(0.1), param, clock="lr^2/max_lr")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for lr, value in ((0.1, 1.0), (5.0, math.inf), (0.2, 1.0)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
    assert decay.state_dict()["max_lr"] == [0.2]


def test_under_autocast_with_accumulation() -> None:
    """Two backward passes, one step, one decay; the last step is taken on gradients of both."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    first: Any = model[0]
    optimizer = SGD(model.parameters(), lr=0.0)
    nw.Decay(optimizer, nw.L2(0.5), first.weight, clock="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = first.weight.detach().clone()
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(5, 6)).square().mean() / 2
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(first.weight.detach(), before * math.exp(-0.5))


@pytest.mark.parametrize("mode", ["flow", "explicit"])
def test_a_skipped_step_leaves_the_compensated_scale_alone(mode: str) -> None:
    param = weight(4, 6)
    optimizer = SGD([param], lr=0.1, fused=True)
    decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(1e-7), param, mode=mode, compensated=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    pending = []
    for value in (0.0, math.inf, 0.0):
        param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
        pending.append(decay.state_dict()["pending"][0][0])
    assert bool((pending[0] < 1).all())
    assert torch.equal(pending[1], pending[0])
    assert bool((pending[2] < pending[1]).all())
