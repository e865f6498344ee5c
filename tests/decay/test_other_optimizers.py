"""Optimizers that are used or built unlike those of torch: decay arrives, or they are refused by name."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

schedulefree = pytest.importorskip("schedulefree")

SECOND_COPIES: dict[str, Callable[[Any], Optimizer]] = {
    "schedule-free AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01),
    "schedule-free SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.01),
    "another schedule-free": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.01),
    "Lookahead": lambda p: pytorch_optimizer.Lookahead(AdamW(p, lr=0.01, weight_decay=0.0)),
    "Ranger": lambda p: pytorch_optimizer.Ranger(p, lr=0.01),
    "Ranger21": lambda p: pytorch_optimizer.Ranger21(p, lr=0.01, num_iterations=1000, weight_decay=0.0),
}


@pytest.mark.parametrize("mode", ["flow", "explicit"])
@pytest.mark.parametrize("name", SECOND_COPIES)
def test_a_second_copy_of_the_weights_is_decayed_alike(name: str, mode: str) -> None:
    """Without gradients nothing but the rule acts, so the norms follow it; rows of the mask only."""
    ratios = []
    for decayed in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(6, 4))
        optimizer = SECOND_COPIES[name]([weight])
        mask = torch.tensor([True, True, True, False, False, False])
        if decayed:
            nw.Decay(optimizer, nw.L2(5.0), nw.Unit(weight, 0, mask), mode=mode)
        getattr(optimizer, "train", lambda: None)()
        before, passed = weight.detach().norm(dim=1).clone(), 0.0
        for _ in range(40):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            passed += optimizer.param_groups[0]["lr"]
        getattr(optimizer, "eval", lambda: None)()
        ratios.append(weight.detach().norm(dim=1) / before)
    factor = math.exp(-5 * passed) if mode == "flow" else (1 - 0.05) ** 40
    if name == "Ranger21":  # it warms its rate up, and has another after the step than in it
        assert (ratios[1][:3] < 0.5 * ratios[0][:3]).all()
    else:
        torch.testing.assert_close(ratios[1][:3], factor * ratios[0][:3], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(ratios[1][3:], ratios[0][3:])


@pytest.mark.parametrize("name", ["MADGRAD", "AccSGD", "FTRL", "Nero", "SRMM"])
def test_an_optimizer_that_undoes_decay_is_refused_by_name(name: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = getattr(pytorch_optimizer, name)([weight], lr=0.1)
    with pytest.raises(ValueError, match=f'{name} .* undoes what a rule does .*mode="coupled"'):
        nw.Decay(optimizer, nw.L2(0.5), weight)
    nw.Decay(optimizer, nw.L2(0.5), weight, mode="coupled")


@pytest.mark.parametrize("settings", [{"rule": nw.RotatingSphere()}, {"compensated": True}])
def test_what_does_not_reach_a_second_copy_is_refused(settings: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = schedulefree.SGDScheduleFree([weight], lr=0.1)
    rule = settings.pop("rule", nw.L2(0.5))
    with pytest.raises(ValueError, match="SGDScheduleFree keeps a second copy of the weights"):
        nw.Decay(optimizer, rule, weight, **settings)


def test_schedule_free_training_goes_on_from_a_saved_state() -> None:
    def made() -> tuple[nn.Parameter, Any, nw.Decay]:
        weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = schedulefree.AdamWScheduleFree([weight], lr=0.1)
        return weight, optimizer, nw.Decay(optimizer, nw.L2(lambda step: 0.1 * step), weight)

    def train(parts: tuple[nn.Parameter, Any, nw.Decay], first: int, last: int) -> None:
        parts[1].train()
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            parts[0].grad = torch.randn(3, 4, generator=generator)
            parts[1].step()

    whole, stopped, resumed = made(), made(), made()
    train(whole, 0, 6)
    train(stopped, 0, 3)
    resumed[0].data.copy_(stopped[0].data)
    resumed[1].load_state_dict(copy.deepcopy(stopped[1].state_dict()))
    assert resumed[2].steps == 3
    train(resumed, 3, 6)
    assert torch.equal(resumed[0], whole[0])


def test_a_loop_that_never_calls_step_is_warned_about() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    sam = pytorch_optimizer.SAM([weight], SGD, lr=0.1)
    with pytest.warns(UserWarning, match=r"SAM.first_step\(\).*attach to optimizer.base_optimizer"):
        nw.Decay(sam, nw.L2(0.5), weight).remove()
    decay = nw.Decay(sam.base_optimizer, nw.L2(0.5), weight)
    for _ in range(10):
        weight.grad = torch.zeros(4, 4)
        sam.first_step()
        weight.grad = torch.zeros(4, 4)
        sam.second_step()
    assert decay.steps == 10
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), math.exp(-0.5)))


class TestWeightDecayThatComesBack:
    """A state from before normwise sets weight_decay again."""

    def states(self) -> tuple[dict[str, Any], nn.Parameter, Optimizer]:
        weight = nn.Parameter(torch.ones(4, 4))
        old = AdamW([weight], lr=0.1, weight_decay=0.1).state_dict()
        optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
        nw.Decay(optimizer, nw.L2(0.5), weight)
        return old, weight, optimizer

    def test_it_is_warned_about(self) -> None:
        old, _, optimizer = self.states()
        message = r"sets weight_decay=0.1 in param_groups\[0\] of AdamW.*decayed twice"
        with pytest.warns(UserWarning, match=message):
            optimizer.load_state_dict(old)

    def test_not_for_other_parameters_or_where_it_was_there_before(self) -> None:
        old, weight, _ = self.states()
        other = nn.Parameter(torch.ones(2, 2))
        groups = [{"params": [weight], "weight_decay": 0.0}, {"params": [other], "weight_decay": 0.1}]
        optimizer = AdamW(groups, lr=0.1)
        decay = nw.Decay(optimizer, nw.L2(0.5), weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(optimizer.state_dict())
        decay.remove()
        optimizer = AdamW([weight], lr=0.1, weight_decay=0.1)
        with pytest.warns(UserWarning, match="decayed twice"):
            decay = nw.Decay(optimizer, nw.L2(0.5), weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(optimizer.state_dict())
        decay.remove()
        assert not optimizer._optimizer_load_state_dict_post_hooks
        optimizer.load_state_dict(old)
