"""Accelerate: its wrappers are taken off, one call sets decay up, and its checkpoints hold what is needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.decay import wrappers

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate|torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def data(n: int = 48) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (n,), generator=generator)), batch_size=8)


class Job:
    """A training script as users of Accelerate write it."""

    def __init__(self, seed: int = 0, by_hand: bool = False, accumulated: int = 1, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        plan = nw.plan(net, list(data())[:4], progress=False) if by_hand else None
        groups: Any = net.named_parameters() if plan is None else plan.param_groups(weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            net, optimizer, data(), scheduler
        )
        settings = {"scheduler": self.scheduler, "total_steps": 12 // accumulated, **settings}
        if plan is not None:
            self.decay: Any = plan.attach(self.optimizer, **settings)
            self.accelerator.register_for_checkpointing(self.decay)
        else:
            if "rule" in settings:
                settings = {k: v for k, v in settings.items() if k not in ("scheduler", "total_steps")}
            self.decay = nw.accelerate.attach(
                self.accelerator, self.model, self.optimizer, self.loader, **settings
            )

    def train(self, epochs: int) -> list[Tensor]:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return [p.detach().clone() for p in self.model.parameters()]


CASES: dict[str, dict[str, Any]] = {
    "plan.attach": {"by_hand": True},
    "nothing given": {},
    "scheduled": {"rule": nw.L2(lambda step: 0.5 / (1 + step))},
    "sphere": {"rule": nw.Sphere()},
    "peaks": {"rule": nw.AdaptiveWeightShrink(0.5), "clock": "lr^2/max_lr"},
}


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(2)
def test_resumed_equals_uninterrupted(name: str, registered: bool, tmp_path: Path) -> None:
    """By load_state, whether the Decay is registered for checkpointing or rides in the optimizer's state."""

    def job(seed: int = 0) -> Job:
        made = Job(seed, **CASES[name])
        if not registered:
            made.accelerator._custom_objects.clear()
        return made

    expected = job().train(2)
    interrupted = job()
    interrupted.train(1)
    interrupted.accelerator.save_state(str(tmp_path))
    resumed = job(seed=4)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.decay.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(resumed.train(1), expected, strict=True))
    assert resumed.decay.steps == 12


def test_what_one_call_sets_up() -> None:
    job = Job()
    assert job.decay.optimizer is wrappers.unwrapped(job.optimizer)
    decays = {name: g["weight_decay"] for g in job.optimizer.param_groups for name in g["param_names"]}
    assert decays.pop("0.weight") == 0
    assert set(decays.values()) == {0.1}
    job.train(1)
    assert job.decay.steps == 6
    assert len({group["lr"] for group in job.optimizer.param_groups}) == 1


def test_an_optimizer_that_is_prepared_after_it_was_attached_to() -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    decay = nw.Decay(optimizer, nw.Sphere(), net.get_parameter("0.weight"))
    net, wrapped = accelerate.Accelerator(cpu=True).prepare(net, optimizer)
    net(torch.randn(4, 6)).sum().backward()
    wrapped.step()
    assert decay.steps == 1


def test_wrappers_are_taken_off_by_everything_that_takes_an_optimizer() -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    net, wrapped = accelerate.Accelerator(cpu=True).prepare(net, optimizer)
    weight = net.get_parameter("0.weight")
    decay = nw.Decay(wrapped, nw.L2(0.5), weight)
    assert decay.optimizer is optimizer
    with pytest.raises(ValueError, match=r"is under .* already"):
        nw.Decay(optimizer, nw.L2(0.5), weight)
    assert "L2 0.5" in str(nw.audit(net, wrapped))
    decay.remove()
    plan = nw.plan(net, [torch.randn(16, 6)], progress=False)
    assert plan.attach(wrapped, total_steps=10).optimizer is optimizer


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_prepared_schedule_steps_once_per_process(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_number_of_processes", lambda: processes)
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    accelerator = accelerate.Accelerator(cpu=True)
    net, wrapped, prepared = accelerator.prepare(net, optimizer, scheduler)
    plan = nw.plan(net, [torch.randn(16, 6)], progress=False)
    expected = sum(0.5 ** (processes * step) for step in range(4))
    decay = plan.attach(wrapped, scheduler=prepared, total_steps=4)
    assert f"Σlr = {expected:.4g} " in decay.explain()


def test_accumulation(tmp_path: Path) -> None:
    job = Job(accumulated=2)
    used = []
    job.decay.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    job.train(2)
    assert job.decay.steps == len(used) == 6
    assert f"Σlr = {sum(used):.4g} " in job.decay.explain()


def test_a_prepared_schedule_goes_on_where_a_rule_needs_none() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    nw.accelerate.attach(accelerator, net, optimizer, [(torch.randn(8, 6),)], rule=nw.L2(0.1))
    for _ in range(2):
        accelerator.backward(net(torch.randn(8, 6)).square().mean())
        optimizer.step()
        scheduler.step()
    assert len(optimizer.param_groups) == 2
    assert scheduler.get_last_lr() == [0.25]
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_what_is_missing_is_named() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="loader is missing"):
        nw.accelerate.attach(accelerator, net, optimizer)
    with pytest.raises(ValueError, match="the budget is missing"):
        nw.accelerate.attach(accelerator, net, optimizer, [(torch.randn(8, 6),)])
    with pytest.raises(ValueError, match="can be read only once"):
        nw.accelerate.attach(accelerator, net, optimizer, iter([(torch.randn(8, 6),)]), total_steps=3)
