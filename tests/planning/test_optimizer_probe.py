from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import optim

from normwise.planning.optimizer_probe import (
    Recipe,
    decay_coupling,
    once_per_recipe,
    step_grows_with_gradient,
)
from normwise.planning.stepping import Stepping, stepping_of

# optimizer, its settings, whether its steps grow with the gradient, how it decays
KINDS: list[tuple[Any, dict[str, Any], bool | None, str | None]] = [
    (optim.SGD, {}, True, "decoupled"),  # without momentum there is no difference
    (optim.SGD, {"momentum": 0.9}, True, "coupled"),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}, True, "coupled"),
    (optim.Adam, {}, False, "coupled"),
    (optim.Adam, {"decoupled_weight_decay": True}, False, "decoupled"),
    (optim.AdamW, {"fused": True}, False, "decoupled"),
    (optim.AdamW, {"amsgrad": True}, False, "decoupled"),
    (optim.NAdam, {}, False, "coupled"),
    (optim.RAdam, {}, False, "coupled"),
    (optim.RAdam, {"decoupled_weight_decay": True}, False, "decoupled"),
    (optim.RMSprop, {}, False, "coupled"),
    (optim.Adagrad, {}, False, "coupled"),
    (optim.Adamax, {}, False, "coupled"),
    *([(optim.Muon, {}, False, "decoupled")] if hasattr(optim, "Muon") else []),  # torch 2.9
]


@pytest.mark.parametrize(("make", "settings", "grows", "coupling"), KINDS)
def test_kinds_of_torch_optimizers(
    make: Any, settings: dict[str, Any], grows: bool | None, coupling: str | None
) -> None:
    if not settings.keys() <= inspect.signature(make).parameters.keys():
        pytest.skip("Adam(decoupled_weight_decay=...) is of torch 2.7")
    weight = torch.nn.Parameter(torch.ones(3, 4))
    before = torch.get_rng_state()
    optimizer = make([weight], lr=0.5, weight_decay=0.3, **settings)
    state = repr(optimizer.state_dict())
    assert step_grows_with_gradient(optimizer) is grows
    assert decay_coupling(optimizer) == coupling
    assert torch.equal(weight, torch.ones(3, 4))
    assert repr(optimizer.state_dict()) == state
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "coupling"), [("Lion", "decoupled"), ("AdaBelief", "decoupled")])
def test_kinds_of_a_library_of_optimizers(name: str, coupling: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = getattr(library, name)([torch.nn.Parameter(torch.ones(3, 4))], weight_decay=0.1)
    assert step_grows_with_gradient(optimizer) is False
    assert decay_coupling(optimizer) == coupling


def test_schedule_free_optimizers_which_refuse_a_step_before_train_are_measured() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    library = pytest.importorskip("pytorch_optimizer")
    for ours, other, grows in (
        (schedulefree.AdamWScheduleFree, library.ScheduleFreeAdamW, False),
        (schedulefree.SGDScheduleFree, library.ScheduleFreeSGD, True),
    ):
        optimizers = [make([torch.nn.Parameter(torch.ones(3, 4))], lr=0.1) for make in (ours, other)]
        found = [stepping_of(optimizer) for optimizer in optimizers]
        assert [step_grows_with_gradient(optimizer) for optimizer in optimizers] == [grows, grows]
        one, two = (s.per_element for s in found if isinstance(s, Stepping))
        assert one == pytest.approx(two, rel=0.05)


def test_the_settings_are_those_of_the_group() -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": weights[:1]}, {"params": weights[1:], "momentum": 0.9}]
    optimizer = optim.SGD(groups, lr=0.1)
    assert decay_coupling(optimizer, 0) == "decoupled"
    assert decay_coupling(optimizer, 1) == "coupled"


class _Wrapper(optim.Optimizer):
    """Passes everything on to another optimizer, as accelerate's does."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def test_a_wrapper_is_measured_as_the_optimizer_inside() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, 4))]
    assert step_grows_with_gradient(_Wrapper(_Wrapper(optim.AdamW(weights)))) is False
    assert step_grows_with_gradient(_Wrapper(optim.SGD(weights))) is True
    assert decay_coupling(_Wrapper(optim.AdamW(weights, weight_decay=0.1))) == "decoupled"


def test_what_needs_a_closure_cannot_be_measured() -> None:
    optimizer = optim.LBFGS([torch.nn.Parameter(torch.ones(3))])
    assert step_grows_with_gradient(optimizer) is None
    assert decay_coupling(optimizer) is None


class _Root(optim.SGD):
    """Steps that grow with the square root of the gradient."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad.abs().sqrt() * p.grad.sign()


def test_what_grows_in_some_other_way_is_of_no_kind() -> None:
    assert step_grows_with_gradient(_Root([torch.nn.Parameter(torch.ones(3))], lr=0.1)) is None


def test_what_was_measured_is_kept_for_equal_settings_and_keeps_no_optimizer_alive() -> None:
    measured: list[Recipe] = []

    @once_per_recipe
    def count(recipe: Recipe) -> int:
        measured.append(recipe)
        return len(measured)

    def made(lr: float = 0.1, **settings: Any) -> optim.Optimizer:
        return optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr, **settings)

    first = made()
    gone = weakref.ref(first)
    assert count(first, 0) == count(made(lr=0.5, weight_decay=0.3), 0) == 1
    assert count(made(betas=(0.8, 0.99)), 0) == 2
    of_tensors = made(betas=(torch.tensor(0.8), torch.tensor(0.99)))  # their values may change
    assert (count(of_tensors, 0), count(of_tensors, 0)) == (3, 4)
    del first
    gc.collect()
    assert gone() is None
