"""Training that is interrupted, saved as plain data and resumed ends at the same bits."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

import normwise as nw
from normwise.decay.clock import CLOCKS
from normwise.decay.rules import Rule

RULES: dict[str, Rule] = {
    "L2": nw.L2(0.1),
    "AdaptiveWeightShrink": nw.AdaptiveWeightShrink(0.05),
    "PowerShrink": nw.PowerShrink(0.01, 1.5),
    "EpsilonShiftedL2": nw.EpsilonShiftedL2(0.1, 0.3),
    "published": nw.PublishedEpsilonShift(0.1, 0.01),
    "Sphere": nw.Sphere(),
    "rotated Sphere": nw.RotatingSphere(),
    "scheduled": nw.AdaptiveWeightShrink(lambda step: 0.05 / (1 + step)),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0, fused=True),
    "Adafactor": lambda p: Adafactor(p, lr=0.01),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0)


class Job:
    """A training job with a one-cycle schedule, whose state can be written and read."""

    def __init__(
        self,
        optimizer: str,
        rule: Rule,
        seed: int,
        dtype: torch.dtype,
        tensor_lr: bool = False,
        **settings: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((5, 4), (3, 6))]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": [p]} for p in self.params])
        for group in self.optimizer.param_groups if tensor_lr else ():
            group["lr"] = torch.tensor(group["lr"])
        self.decay = nw.Decay(self.optimizer, rule, self.params, **settings)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 8, cycle_momentum=False)

    def train(self, first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            self.optimizer.step()
            self.scheduler.step()
        return [param.detach() for param in self.params]

    def save(self) -> bytes:
        buffer = io.BytesIO()
        parts: dict[str, Any] = {
            "optimizer": self.optimizer,
            "decay": self.decay,
            "scheduler": self.scheduler,
        }
        torch.save({"params": self.params, **{k: v.state_dict() for k, v in parts.items()}}, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for param, value in zip(self.params, state["params"], strict=True):
            param.data.copy_(value.data)
        self.optimizer.load_state_dict(state["optimizer"])
        self.decay.load_state_dict(state["decay"])
        self.scheduler.load_state_dict(state["scheduler"])


def resumed_equals_uninterrupted(
    optimizer: str, rule: Rule, dtype: torch.dtype = torch.float32, stop: int = 4, **settings: Any
) -> None:
    whole = Job(optimizer, rule, 1, dtype, **settings)
    expected = whole.train(0, 8)
    interrupted = Job(optimizer, rule, 1, dtype, **settings)
    interrupted.train(0, stop)
    resumed = Job(optimizer, rule, 2, dtype, **settings)  # other weights, other reference norms
    resumed.load(interrupted.save())
    for mine, other in zip(resumed.train(stop, 8), expected, strict=True):
        assert torch.equal(mine, other)
    assert resumed.decay.steps == 8


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.one_in(2)
def test_resume(name: str, optimizer: str) -> None:
    rule = RULES[name]
    for mode, clock in itertools.product(rule.modes, CLOCKS):
        if mode != "coupled" or clock == "lr":
            resumed_equals_uninterrupted(optimizer, rule, mode=mode, clock=clock)


@pytest.mark.parametrize("name", ["L2", "AdaptiveWeightShrink", "Sphere", "scheduled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_resume_with_a_compensated_scale(dtype: torch.dtype, name: str) -> None:
    for mode in set(RULES[name].modes) - {"coupled"}:
        resumed_equals_uninterrupted("SGD", RULES[name], dtype, mode=mode, compensated=True)


@pytest.mark.parametrize("name", ["L2", "AdaptiveWeightShrink", "PowerShrink", "EpsilonShiftedL2", "Sphere"])
@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.one_in(2)
def test_resume_between_applications(stop: int, name: str) -> None:
    """Interrupted at any step, with the rule applied at every third."""
    for optimizer, settings in (
        ("SGD", {"clock": "lr^2/max_lr"}),
        ("AdamW", {"measure": "rms"}),
        ("SGD", {"tensor_lr": True}),
        ("SGD", {"tensor_lr": True, "clock": "lr^2/max_lr"}),
    ):
        resumed_equals_uninterrupted(optimizer, RULES[name], stop=stop, every=3, **settings)
    resumed_equals_uninterrupted("SGD", RULES[name], torch.bfloat16, stop, every=3, compensated=True)


def test_the_saved_state_is_a_copy() -> None:
    job = Job("SGD", nw.Sphere(), 1, torch.bfloat16, compensated=True, clock="lr^2/max_lr")
    job.train(0, 2)
    state = job.decay.state_dict()
    before = [[factors.clone() for factors in one] for one in state["pending"]]
    job.train(2, 4)
    assert state["steps"] == 2
    assert all(
        torch.equal(a, b)
        for x, y in zip(before, state["pending"], strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_the_state_says_what_it_belongs_to() -> None:
    state = Job("SGD", nw.Sphere(), 1, torch.float32, clock="step", dim=1).decay.state_dict()
    assert state["rule"] == {"name": "Sphere", "radius": None}
    assert (state["mode"], state["clock"], state["measure"], state["compensated"]) == (
        "flow",
        "step",
        "norm",
        False,
    )
    assert state["units"][0] == {"shapes": [[5, 4]], "dim": 1, "mask": None}
    assert [len(reference) for reference in state["reference"]] == [4, 6]


def test_a_state_without_the_compensated_scale_is_refused() -> None:
    plain = Job("SGD", RULES["L2"], 1, torch.bfloat16).decay
    compensated = Job("SGD", RULES["L2"], 1, torch.bfloat16, compensated=True).decay
    with pytest.raises(ValueError, match=r"compensated=False.*compensated=True"):
        compensated.load_state_dict(plain.state_dict())
