"""The step that torch.distributed.checkpoint takes to make an optimizer's state decays nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import normwise as nw

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),  # never has a state
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0),
    "AdamW, a tensor": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), weight_decay=0.0),
}
CASES: dict[str, dict[str, Any]] = {
    "sphere": {"rule": nw.Sphere(2.0)},
    "clock": {"rule": nw.L2(0.1), "clock": "step"},
    "scheduled": {"rule": nw.L2(lambda step: 0.5 / (1 + step)), "mode": "explicit"},
    "coupled": {"rule": nw.L2(0.1), "mode": "coupled"},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_a_state_that_is_asked_for_moves_no_weight(case: str, optimizer: str) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    built = OPTIMIZERS[optimizer](model.parameters())
    decay = nw.Decay(built, params=model.get_parameter("0.weight"), **CASES[case])
    monitor = nw.Monitor(built)
    get_optimizer_state_dict(model, built)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert (decay.steps, monitor.steps) == (0, 0)
    model(torch.randn(4, 6)).square().mean().backward()
    built.step()
    assert (decay.steps, monitor.steps) == (1, 1)
    built.zero_grad()
    get_optimizer_state_dict(model, built)
    assert (decay.steps, monitor.steps) == (1, 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_start_in_equilibrium_waits_for_the_training(optimizer: str) -> None:
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    weights = []
    for asks in (False, True):
        model = network()
        built = OPTIMIZERS[optimizer](model.parameters())
        plan = nw.plan(
            model, [torch.randn(16, 6, generator=torch.Generator().manual_seed(1))], progress=False
        )
        plan.attach(built, total_steps=10)
        if asks:
            get_optimizer_state_dict(model, built)
        for batch in batches:
            model(batch).square().mean().backward()
            built.step()
            built.zero_grad()
        weights.append(model.get_parameter("0.weight").detach().clone())
    if optimizer in ("SGD", "SGD with momentum"):
        assert torch.equal(*weights)
    else:  # Adam counts the step that makes its state
        torch.testing.assert_close(*weights, rtol=0.1, atol=0.1)


def test_steps_of_a_training_count_even_at_rate_zero() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    decay = nw.Decay(optimizer, nw.Sphere(3.0), weight)
    weight.grad = torch.ones(3, 4)
    optimizer.step(None)  # as Accelerate calls it
    assert decay.steps == 1
    assert torch.allclose(weight.norm(dim=1), torch.tensor(3.0))
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert decay.steps == 2
