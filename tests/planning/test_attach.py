from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.models import made, planned, shared
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import normwise as nw
from normwise.planning.budget import simulated_budgets

SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, 40),
    "one cycle": lambda o: OneCycleLR(o, max_lr=[0.5, 0.1], total_steps=40),
    "steps": lambda o: StepLR(o, 7, gamma=0.5),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.2, step_size_up=5, scale_fn=lambda x: 0.9**x),
    "warm-up, then cosine": lambda o: SequentialLR(
        o, [LambdaLR(o, lambda step: (1 + step) / 10), CosineAnnealingLR(o, 30)], milestones=[10]
    ),
}


def _two_groups(lr: float | torch.Tensor = 0.1) -> Optimizer:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.zeros(2)
    groups: list[dict[str, Any]] = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.02}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def _state(optimizer: Optimizer, scheduler: LRScheduler) -> Any:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return copy.deepcopy((groups, {k: v for k, v in scheduler.state_dict().items() if k != "_schedulers"}))


# before torch 2.7, of its own SequentialLR
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("begun", [0, 9])
def test_a_simulated_schedule_sums_what_the_real_one_gives_and_touches_nothing(name: str, begun: int) -> None:
    optimizer = _two_groups()
    scheduler = SCHEDULES[name](optimizer)
    for _ in range(begun):
        optimizer.step()
        scheduler.step()
    before = _state(optimizer, scheduler)
    found = simulated_budgets(optimizer, scheduler, 40 - begun, 1)
    assert _state(optimizer, scheduler) == before
    rates: list[list[float]] = []
    for step in range(40 - begun):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        if step < 39 - begun:
            scheduler.step()
    for k, budget in enumerate(found):
        assert budget.time == pytest.approx(math.fsum(r[k] for r in rates), rel=1e-12)
        assert budget.squares == pytest.approx(math.fsum(r[k] ** 2 for r in rates), rel=1e-12)


def test_a_tensor_rate_is_left_alone_and_an_interval_holds_it() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=rate)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    (found,) = simulated_budgets(optimizer, scheduler, 5, 2)
    assert found.time == pytest.approx(0.5 + 0.5 + 0.25 + 0.25 + 0.125)
    assert rate == 0.5


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-5, 10),
    steps=st.integers(1, 200),
    adam=st.booleans(),
    strength=st.floats(0.1, 10),
)
def test_the_coefficient_is_that_of_the_design(lr: float, steps: int, adam: bool, strength: float) -> None:
    _, plan = shared("resnet")
    groups = plan.param_groups()
    optimizer: Optimizer = torch.optim.AdamW(groups, lr=lr) if adam else torch.optim.SGD(groups, lr=lr)
    kind = "adam" if adam else "sgd"
    decay = plan.attach(optimizer, total_steps=steps, strength=strength, start="as is", kind=kind)
    reference = math.sqrt(steps * lr**2) if adam else 1.0
    assert isinstance(decay.rule, nw.AdaptiveWeightShrink)
    assert decay.rule.strength == pytest.approx(strength / (steps * lr * reference))
    assert decay.measure == ("rms" if adam else "norm")
    assert (decay.mode, decay.clock) == ("flow", "lr")
    decay.remove()


def test_attached_decay_forgets_the_initial_scale_of_units_and_of_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, plan = planned("qk_norm_glu")
    with torch.no_grad():
        for unit in plan.units:
            for p in unit.params:
                p.mul_(1e4)
    optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1)
    announced: list[str] = []
    with caplog.at_level(logging.INFO, "normwise"):
        plan.attach(optimizer, total_steps=100, start="as is", announce=announced.append)
    assert announced == [record.message for record in caplog.records]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    others = {n: p.clone() for n, p in model.named_parameters() if plan.verdicts[n] != "shrink"}
    for _ in range(100):
        optimizer.step()
    for unit in plan.units:  # at most reference/strength, the reference being rows of norm 1
        assert float(unit.norms().max()) < 2 * math.sqrt(11) / 3
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert "learning rate of 10 scale-invariant parameters" in caplog.text
    assert "whole tensors whose rows have about unit norm" in caplog.text


def test_it_logs_what_it_chose_and_why_and_prints_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = shared("resnet")
    optimizer = torch.optim.Adam(plan.param_groups(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, 100)
    with caplog.at_level(logging.INFO, "normwise"):
        decay = plan.attach(optimizer, scheduler=scheduler, total_steps=100, start="as is")
    assert capsys.readouterr() == ("", "")
    text = caplog.text
    assert "Σlr = 0.505 over 100 steps of CosineAnnealingLR, simulated on a copy" in text
    assert '"rms", as the steps of the optimizer do not grow with the gradient' in text
    assert f"{decay.rule.settings()['coefficient']:.4g}" in text
    assert all(message in decay.explain() for message in caplog.messages)
    decay.remove()


def test_total_time_alone_takes_the_initial_rate() -> None:
    _, plan = shared("resnet")
    optimizer = torch.optim.AdamW(plan.param_groups(), lr=0.01)
    LambdaLR(optimizer, lambda step: step / 10)  # a warm-up from zero
    decay = plan.attach(optimizer, total_time=1.0, start="as is", kind="adam")
    assert decay.rule.settings()["coefficient"] == pytest.approx(3 / math.sqrt(0.01))
    decay.remove()


def test_groups_with_different_rates_get_the_mean_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, plan = shared("resnet")
    names = [t.name for t in plan.treatments if t.verdict == "shrink"]
    units = {n: u.params[0] for n, u in zip(names, plan.units, strict=True)}
    slow, fast = list(units.values())[:3], list(units.values())[3:]
    optimizer = torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.1}], lr=1.0)
    with caplog.at_level(logging.INFO, "normwise"):
        decay = plan.attach(optimizer, total_steps=10)
    share = sum(p.numel() for p in slow) / sum(p.numel() for p in units.values())
    assert decay.rule.settings()["coefficient"] == pytest.approx(3 / (10 * 0.01**share * 0.1 ** (1 - share)))
    assert "differ by a factor of 10" in caplog.text
    decay.remove()


def test_half_precision_is_compensated() -> None:
    model, _ = planned("resnet")
    model.to(torch.bfloat16)
    plan = shared("resnet")[1].apply_to(model)
    decay = plan.attach(torch.optim.SGD(plan.param_groups(), lr=0.1), total_steps=10)
    assert decay.compensated


def _attach(plan: nw.Plan, optimizer: Any = None, **options: Any) -> Any:
    optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1) if optimizer is None else optimizer
    return plan.attach(optimizer, **options)


def test_what_cannot_be_attached_is_named_with_the_remedy() -> None:
    model, plan = shared("resnet")
    with pytest.raises(ValueError, match="the plan has no units"):
        _attach(shared("mlp_gelu")[1], total_steps=10)
    with pytest.raises(ValueError, match="budget is missing"):
        _attach(plan)
    with pytest.raises(ValueError, match="total_time is given beside"):
        _attach(plan, total_time=1.0, total_steps=10)
    with pytest.raises(ValueError, match="total_steps=0"):
        _attach(plan, total_steps=0)
    with pytest.raises(TypeError, match="total_steps must be an int"):
        _attach(plan, total_steps=1.5)
    with pytest.raises(ValueError, match="total_time=-1"):
        _attach(plan, total_time=-1)
    relative = torch.optim.SGD(plan.param_groups(), lr=0.1)
    relative.param_groups[0]["lr"] = None  # as Adafactor with relative steps
    for budget in ({"total_time": 1.0}, {"total_steps": 10}):
        with pytest.raises(ValueError, match=r"param_groups\[0\] of SGD has lr=None"):
            _attach(plan, relative, **budget)
    assert nw.audit(model, relative, plan=plan).rows
    with pytest.raises(TypeError, match="optimizer must be"):
        _attach(plan, "sgd", total_steps=10)
    with pytest.raises(ValueError, match=r"'stem\.weight' would be decayed twice.*weight_decay=0\.1"):
        _attach(plan, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), total_steps=10)
    with pytest.raises(ValueError, match=r"'two\.conv1\.weight' of the plan is not in the optimizer"):
        _attach(plan, torch.optim.SGD(_all_but(model, "two.conv1.weight"), lr=0.1), total_steps=10)
    with pytest.raises(ValueError, match="sum to 0"):
        _attach(plan, torch.optim.SGD(plan.param_groups(), lr=0.0), total_steps=10)
    with pytest.raises(ValueError, match="kind='adamw' is not known"):
        _attach(plan, total_steps=10, kind="adamw")


def test_frozen_parameters_need_not_be_in_the_optimizer() -> None:
    model, batches = made("resnet")
    model.get_submodule("one").requires_grad_(False)
    plan = nw.plan(model, batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    decay = _attach(plan, optimizer, total_steps=10)
    frozen = {id(p) for p in model.get_submodule("one").parameters()}
    assert decay.units
    assert not frozen & {id(p) for unit in decay.units for p in unit.params}


def test_a_weight_that_was_frozen_since_the_plan_is_named() -> None:
    model, batches = made("resnet")
    plan = nw.plan(model, batches)
    model.get_submodule("one").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'one\.conv1\.weight' is not frozen in the plan.*plan anew"):
        _attach(plan, total_steps=10)


def _all_but(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n != name]


def _begun(steps: int) -> tuple[nn.Module, nw.Plan, Optimizer, LRScheduler]:
    model, batches = made("resnet")
    plan = nw.plan(model, batches)
    optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, 20)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    _step(optimizer, scheduler, steps)
    return model, plan, optimizer, scheduler


def _step(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> None:
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def test_a_run_is_resumed_to_the_bit_by_attaching_before_loading() -> None:
    model, plan, optimizer, scheduler = _begun(0)
    decay = _attach(plan, optimizer, scheduler=scheduler, total_steps=20)
    _step(optimizer, scheduler, 9)
    saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, scheduler, decay)])
    _step(optimizer, scheduler, 11)

    other, plan, optimizer, scheduler = _begun(0)
    resumed = _attach(plan, optimizer, scheduler=scheduler, total_steps=20)
    for target, state in zip((other, optimizer, scheduler, resumed), saved, strict=True):
        target.load_state_dict(state)
    assert resumed.rule == decay.rule
    _step(optimizer, scheduler, 11)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_attaching_after_loading_warns_and_the_old_state_is_refused_with_the_remedy() -> None:
    _, plan, optimizer, scheduler = _begun(0)
    saved = _attach(plan, optimizer, scheduler=scheduler, total_steps=20).state_dict()
    _, plan, optimizer, scheduler = _begun(15)
    with pytest.warns(
        UserWarning, match="optimizer has stepped and the scheduler is at step 15 .*before you"
    ):
        decay = _attach(plan, optimizer, scheduler=scheduler, total_steps=20, start="as is")
    with pytest.raises(ValueError, match=r"plan\.attach: before you load"):
        decay.load_state_dict(saved)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
@pytest.mark.one_in(2)
def test_a_fresh_optimizer_and_a_given_time_do_not_warn(make: Any) -> None:
    _, plan = shared("resnet")
    _attach(plan, make(plan.param_groups(), lr=0.1), total_steps=20, kind="adam").remove()
    _, plan, optimizer, _ = _begun(5)
    _attach(plan, optimizer, total_time=0.5, start="as is")


def test_steps_beyond_the_budget_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _, plan, optimizer, scheduler = _begun(0)
    _attach(plan, optimizer, scheduler=scheduler, total_steps=3)
    _step(optimizer, scheduler, 3)
    assert caplog.messages == []
    _step(optimizer, scheduler, 3)
    (message,) = caplog.messages
    assert "step 4: the attached decay was made for 3 steps" in message


def test_schedules_that_cannot_be_simulated() -> None:
    _, plan = shared("resnet")
    optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1)
    for scheduler, error, message in (
        (ReduceLROnPlateau(optimizer), ValueError, "depends on a metric"),
        (CosineAnnealingLR(_two_groups(), 10), ValueError, "another optimizer"),
        (OneCycleLR(optimizer, 0.1, total_steps=20), ValueError, "cannot be simulated for total_steps=50"),
        (0.1, TypeError, "must be a torch.optim.lr_scheduler"),
    ):
        with pytest.raises(error, match=message):
            _attach(plan, optimizer, scheduler=scheduler, total_steps=50)


class _Sign(Optimizer):
    """Cannot be constructed from its groups' settings alone."""

    def __init__(self, params: Any, needed: int) -> None:
        super().__init__(params, {"lr": 0.1})
        self.needed = needed

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def test_an_optimizer_that_cannot_be_measured_needs_a_word() -> None:
    _, plan = shared("resnet")
    optimizer = _Sign(plan.param_groups(), needed=3)
    with pytest.raises(ValueError, match="could not be measured: give kind='sgd' if its steps grow"):
        _attach(plan, optimizer, total_steps=10)
    decay = _attach(plan, optimizer, total_steps=10, kind="adam")
    assert decay.measure == "relative"
