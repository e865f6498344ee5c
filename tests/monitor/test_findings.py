"""Each planted illness gives the right finding and only that one; healthy trainings give none."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.monitor import trainings
from tests.monitor.common import BATCHES, Kept, loss_of, network, plan_of
from torch import nn
from torch.optim import SGD

import normwise as nw
from normwise.monitor.finding import KINDS, Finding
from normwise.monitor.findings import THRESHOLDS
from normwise.monitor.observation import DEAD_AFTER


@pytest.mark.parametrize("name", trainings.TASKS)
@pytest.mark.one_in(3)
def test_healthy_trainings_give_no_finding(name: str) -> None:
    task = trainings.TASKS[name]()
    optimizer = trainings.optimizer_of(name, task)
    steps = 60
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    task.plan.attach(optimizer, scheduler=scheduler, total_steps=steps)
    monitor, tracker = trainings.run(task, optimizer, scheduler, steps, every=3)
    assert [str(finding) for finding in tracker.findings] == []
    assert monitor.findings == []
    rows = [values for _, values in tracker.rows]
    assert rows[-1]["normwise/loss"] < rows[0]["normwise/loss"]


# -- illnesses ---------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """Has the parameters of a batch norm, and normalises nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


def _trained(
    model: Any, optimizer: Any, plan: nw.Plan | None = None, steps: int = 40, **settings: Any
) -> tuple[nw.Monitor, Kept]:
    tracker = Kept()
    monitor = nw.Monitor(optimizer, plan=plan or plan_of(model), every=2, trackers=tracker, **settings)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, BATCHES[step % len(BATCHES)].to(dtype))
        loss.backward()
        monitor.record(loss=loss)
        optimizer.step()
    return monitor, tracker


def vanished() -> Any:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e4)
    plan = plan_of(model)
    return _trained(model, SGD(plan.param_groups(), lr=0.1), plan)


def too_large() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Decay(optimizer, nw.Sphere(0.02), model[0].weight)
    return _trained(model, optimizer, plan)


def too_weak() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(shrink_weight_decay=1e-4), lr=0.1)
    return _trained(model, optimizer, plan, total_steps=40)


def too_strong() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Decay(optimizer, nw.L2(3.0), plan.units)
    return _trained(model, optimizer, plan)


def out_of_range() -> Any:
    model = nn.Linear(8, 4, bias=False)
    weight = model.weight
    with torch.no_grad():
        weight.mul_(1e19)
    optimizer = SGD([weight], lr=0.1)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, model=model, every=1, trackers=tracker)
    for _ in range(4):
        weight.grad = torch.zeros_like(weight)
        weight.grad[:, 0] = 1e-18
        optimizer.step()
    return monitor, tracker


def near_overflow() -> Any:
    model = nn.Linear(8, 4, bias=False).half()
    weight = model.weight
    optimizer = SGD([weight], lr=1e-6)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, model=model, every=1, trackers=tracker)
    for sign in (1, -1, 1, -1):
        weight.grad = torch.zeros_like(weight)
        weight.grad[:, 7] = sign * 3e4
        optimizer.step()
    return monitor, tracker


def lost_to_rounding() -> Any:
    model = network(torch.bfloat16)
    plan = plan_of(network()).apply_to(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Decay(optimizer, nw.L2(1e-3), plan.units)
    return _trained(model, optimizer, plan)


def dead() -> Any:
    model = network()
    plan = plan_of(model)
    with torch.no_grad():
        model[1].weight[2] = 0.0
        model[1].bias[2] = -1.0
    return _trained(model, SGD(plan.param_groups(), lr=0.05), plan)


def unbalanced() -> Any:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(60)
    plan = plan_of(model)
    return _trained(model, SGD(plan.param_groups(), lr=0.1), plan)


def vectors() -> Any:
    model = network()
    return _trained(model, SGD(model.parameters(), lr=0.05, weight_decay=1e-2))


def twice() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(shrink_weight_decay=1e-2), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nw.Decay(optimizer, nw.L2(1e-2), plan.units)
    return _trained(model, optimizer, plan)


def not_invariant() -> Any:
    plan = plan_of(network())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), Affine(8), nn.ReLU(), nn.Linear(8, 7), Affine(7), nn.Linear(7, 3))
    applied = plan.apply_to(model)
    return _trained(model, SGD(applied.param_groups(), lr=0.01), applied)


def spike() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.05)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, plan=plan, every=2, trackers=tracker)
    for step in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, BATCHES[step % len(BATCHES)])
        loss.backward()
        monitor.record(loss=loss + 30.0 * (step == 30))
        optimizer.step()
    return monitor, tracker


ILLNESSES: dict[str, Callable[[], Any]] = {
    "effective rate vanished": vanished,
    "effective rate too large": too_large,
    "decay too weak": too_weak,
    "decay too strong": too_strong,
    "norm out of range": out_of_range,
    "gradient near overflow": near_overflow,
    "decay lost to rounding": lost_to_rounding,
    "dead units": dead,
    "layers out of balance": unbalanced,
    "decayed vectors": vectors,
    "decayed twice": twice,
    "not invariant": not_invariant,
    "loss spike": spike,
}


def test_every_kind_has_a_planted_illness() -> None:
    assert list(ILLNESSES) == list(KINDS)


@pytest.mark.parametrize("kind", ILLNESSES)
def test_a_planted_illness_gives_its_finding_and_no_other(kind: str) -> None:
    _, tracker = ILLNESSES[kind]()
    texts = "\n".join(map(str, tracker.findings))
    assert {finding.kind for finding in tracker.findings} == {kind}, texts
    first = tracker.findings[0]
    assert first.evidence
    assert first.remedy
    assert 0 < first.since <= first.step


def _healthy() -> Any:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(weight_decay=1e-3), lr=0.05, momentum=0.9)
    plan.attach(optimizer, total_steps=40)
    return _trained(model, optimizer, plan, total_steps=40)


def test_the_same_network_without_an_illness_gives_none() -> None:
    _, tracker = _healthy()
    assert [str(finding) for finding in tracker.findings] == []


def test_the_finding_names_layers_evidence_and_remedy() -> None:
    monitor, _ = vanished()
    (finding,) = monitor.findings
    assert finding.layers == ("3",)
    assert "turns by" in finding.evidence
    assert finding.remedy.startswith("plan.attach(optimizer")
    assert str(finding).count("\n") == 1
    monitor, _ = lost_to_rounding()
    (finding,) = monitor.findings
    assert finding.layers == ("0", "3")
    assert "bfloat16" in finding.evidence
    assert "compensated=True" in finding.remedy


def test_compensated_decay_is_not_lost() -> None:
    model = network(torch.bfloat16)
    plan = plan_of(network()).apply_to(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Decay(optimizer, nw.L2(1e-3), plan.units, compensated=True)
    _, tracker = _trained(model, optimizer, plan)
    assert tracker.findings == []


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 3e-3, 1e-2, 0.1])
def test_the_part_of_the_decay_that_rounding_swallows_is_measured(rate: float) -> None:
    """Against rounding the product in bfloat16 and looking at what has changed."""
    weight = nn.Parameter(torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
    optimizer = SGD([weight], lr=1.0)
    nw.Decay(optimizer, nw.L2(rate), weight)
    monitor = nw.Monitor(optimizer, units=[weight], every=1)
    before = weight.detach().double()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    done = (before - weight.detach().double()).mul(before).sum() / before.square().sum()
    lost = 1 - float(done) / (1 - math.exp(-rate))
    assert monitor.last is not None
    shown = monitor.last.rows[0].values.get("decay_lost", 0.0)
    if rate < 2 * torch.finfo(torch.bfloat16).eps:
        assert shown == pytest.approx(max(0.0, lost), abs=0.15)
    else:
        assert shown == 0.0
        assert abs(lost) < 0.05


def test_a_finding_ends_when_its_cause_is_gone() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e4)
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, plan=plan, every=1, trackers=tracker)

    def train(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, BATCHES[step]).backward()
            optimizer.step()

    train(5)
    assert [finding.kind for finding in monitor.findings] == ["effective rate vanished"]
    with torch.no_grad():
        model[3].weight.mul_(1e-4)
    train(5)
    assert monitor.findings == []
    assert [finding.ended for finding in tracker.findings] == [False, True]
    assert "over since step 8" in str(tracker.findings[1])


def test_findings_survive_a_restart() -> None:
    monitor, _ = vanished()
    saved = io.BytesIO()
    torch.save(monitor.state_dict(), saved)
    saved.seek(0)
    model = network()
    plan = plan_of(model)
    other = nw.Monitor(SGD(plan.param_groups(), lr=0.1), plan=plan, every=2)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert other.findings == monitor.findings
    assert repr(other.state_dict()["findings"]) == repr(monitor.state_dict()["findings"])  # with NaN


def test_dead_units_are_counted() -> None:
    monitor, tracker = dead()
    counts = [values["normwise/dead/0"] for _, values in tracker.rows]
    assert counts[: DEAD_AFTER - 1] == [0.0] * (DEAD_AFTER - 1)
    assert set(counts[DEAD_AFTER - 1 :]) == {1.0}
    assert monitor.findings[0].layers == ("0",)


def test_a_finding_is_stated_again_with_fresh_evidence() -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=1e-4)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, plan=plan, every=1, trackers=tracker)
    for step in range(40):
        if step in (0, 12):  # one more unit dies
            with torch.no_grad():
                model[1].weight[step // 12] = 0.0
                model[1].bias[step // 12] = -1.0
        optimizer.zero_grad()
        loss_of(model, BATCHES[step % len(BATCHES)]).backward()
        optimizer.step()
    stated = [finding for finding in tracker.findings if finding.kind == "dead units"]
    assert [finding.evidence.split()[1] for finding in stated] == ["1", "2"]
    assert stated[0].since == stated[1].since
    assert stated[1] in monitor.findings


def test_a_finding_as_plain_values() -> None:
    finding = Finding("dead units", ("a", "b"), 1, 2, "why", "how")
    assert finding.to_dict()["layers"] == ["a", "b"]
    assert str(finding) == "dead units: a, b (since step 1). why\n  → how"


def test_every_threshold_has_its_reason() -> None:
    assert all(threshold.reason and threshold.value > 0 for threshold in THRESHOLDS.values())


@pytest.mark.thorough
def test_a_gpt_whose_queries_and_keys_start_far_too_large() -> None:
    task = trainings.gpt()
    names = [f"blocks.{k}.{x}" for k in (0, 1) for x in ("query", "key")]
    with torch.no_grad():
        for name, param in task.model.named_parameters():
            if name.removesuffix(".weight") in names:
                param.mul_(1e4)
    optimizer = trainings.optimizer_of("gpt", task)
    _, tracker = trainings.run(task, optimizer, steps=20, every=2, total_steps=300)
    assert trainings.kinds(tracker) == {"effective rate vanished"}
    assert set(tracker.findings[-1].layers) == set(names)
