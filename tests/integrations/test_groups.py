"""Groups that are split in place: nothing but weight_decay changes, and schedulers go on as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

from normwise.integrations.groups import split_groups


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2,), float(k))) for k in range(5)]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lrs.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step]),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "one cycle": lambda o: lrs.OneCycleLR(o, [0.1, 0.2], total_steps=10),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 10),
    "milestones": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.CosineAnnealingLR(o, 7)], [3]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, total_iters=3), lrs.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_that_were_built_before(name: str) -> None:
    rates = []
    for is_split in (False, True):
        some = params()
        groups: list[dict[str, Any]] = [
            {"params": some[:3]},
            {"params": some[3:], "lr": 0.2, "weight_decay": 0.3},
        ]
        optimizer = SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5)
        scheduler = SCHEDULES[name](optimizer)
        if is_split:
            chosen = {id(some[1]), id(some[4])}
            split = split_groups(optimizer, lambda p, has, c=chosen: 0.0 if id(p) in c else has, {})  # type: ignore[misc]
            split.hide_from([scheduler])
            assert len(optimizer.param_groups) == 4
            before = copy.deepcopy(scheduler.state_dict())
            scheduler.load_state_dict(before)
        history = []
        for _ in range(8):
            for param in some:
                param.grad = torch.ones_like(param)
            optimizer.step()
            scheduler.step()
            found = {id(p): (g["lr"], g["momentum"]) for g in optimizer.param_groups for p in g["params"]}
            history.append([found[id(param)] for param in some])
        rates.append(history)
    assert rates[0] == rates[1]


def test_values_names_and_states_are_kept() -> None:
    some = params()
    named = [(f"p{k}", param) for k, param in enumerate(some)]
    groups: list[dict[str, Any]] = [{"params": named[:3]}, {"params": named[3:], "weight_decay": 0.0}]
    optimizer = AdamW(groups, weight_decay=0.1)
    for param in some:
        param.grad = torch.ones_like(param)
    optimizer.step()
    states = [optimizer.state[param] for param in some]
    wishes = dict(zip(map(id, some), [0.0, 0.1, 0.2, 0.0, 0.0], strict=True))
    split = split_groups(optimizer, lambda p, has: wishes[id(p)], {id(p): name for name, p in named})
    assert [(g["param_names"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (["p1"], 0.1), (["p3", "p4"], 0.0), (["p0"], 0.0), (["p2"], 0.2),
    ]  # fmt: skip
    assert all(optimizer.state[param] is state for param, state in zip(some, states, strict=True))
    assert split.changes == [
        "param_groups[0]: weight_decay 0.1 → 0 for p0",
        "param_groups[0]: weight_decay 0.1 → 0.2 for p2",
    ]


def test_a_group_that_changes_as_a_whole_is_not_split() -> None:
    optimizer = SGD(params(), lr=0.1, weight_decay=0.5)
    split = split_groups(optimizer, lambda p, has: 0.0, {})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0]
    assert not split.parents
    optimizer = SGD(params(), lr=0.1, weight_decay=0.5)
    assert not split_groups(optimizer, lambda p, has: has, {}).changes


@pytest.mark.parametrize("named", [False, True])
def test_states_that_are_saved_as_if_nothing_was_split(named: bool) -> None:
    def made() -> tuple[list[nn.Parameter], AdamW]:
        some = params()
        given: Any = [(f"p{k}", p) for k, p in enumerate(some)] if named else some
        groups = [{"params": given[:3]}, {"params": given[3:], "weight_decay": 0.0}]
        return some, AdamW(groups, lr=0.1, weight_decay=0.1)

    def train(some: list[nn.Parameter], optimizer: AdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in some:
            param.grad = torch.randn(2, generator=generator)
        optimizer.step()

    def split(some: list[nn.Parameter], optimizer: AdamW) -> None:
        chosen = {id(some[0]), id(some[2])}
        split_groups(optimizer, lambda p, has: 0.0 if id(p) in chosen else has, {}).merge_in_states()

    whole, plain = made(), made()
    train(*plain, 0)
    expected = plain[1].state_dict()
    split(*whole)
    train(*whole, 0)
    saved = copy.deepcopy(whole[1].state_dict())
    assert [g["weight_decay"] for g in saved["param_groups"]] == [0.1, 0.0]
    assert [len(g["params"]) for g in saved["param_groups"]] == [3, 2]
    if named:
        assert [g["param_names"] for g in saved["param_groups"]] == [["p0", "p1", "p2"], ["p3", "p4"]]
    # the states go with the parameters, into an optimizer that is not split
    other = made()
    other[1].load_state_dict(saved)
    for mine, param in zip(other[0], whole[0], strict=True):
        assert torch.equal(other[1].state[mine]["exp_avg"], whole[1].state[param]["exp_avg"])
    assert other[1].state_dict()["param_groups"][0].keys() == expected["param_groups"][0].keys()
    # and into one that is
    again = made()
    split(*again)
    again[1].load_state_dict(saved)
    assert [g["weight_decay"] for g in again[1].param_groups] == [0.1, 0.0, 0.0]
    for mine, param in zip(again[0], whole[0], strict=True):
        mine.data.copy_(param.data)
    train(*whole, 1)
    train(*again, 1)
    assert all(torch.equal(a, b) for a, b in zip(again[0], whole[0], strict=True))
