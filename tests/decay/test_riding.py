"""The state of a Decay rides in the state of its optimizer: saved, restored, or refused as a whole."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, Optimizer

import normwise as nw
from normwise.decay.riding import KEY, leave, ride, riders

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "scheduled": (lambda: nw.L2(lambda step: 0.5 / (1 + step)), {}),
    "sphere": (lambda: nw.Sphere(), {}),
    "clock": (lambda: nw.AdaptiveWeightShrink(0.5), {"clock": "lr^2/max_lr"}),
    "every": (lambda: nw.AdaptiveWeightShrink(0.5), {"every": 3}),
    "compensated": (lambda: nw.AdaptiveWeightShrink(0.02), {"compensated": True}),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: SGD(p, lr=0.1),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.0),
}


class Job:
    """Two weights under one Decay each; the second has the rule of a case."""

    def __init__(self, case: str = "sphere", optimizer: str = "SGD", seed: int = 1) -> None:
        rule, settings = CASES[case]
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if case == "compensated" else torch.float32
        self.params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((5, 4), (3, 6))]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.first = nw.Decay(self.optimizer, nw.L2(lambda step: 0.1 * step), self.params[0])
        self.decay = nw.Decay(self.optimizer, rule(), self.params[1], **settings)

    def train(self, first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 10)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            self.optimizer.step()
        return [param.detach().clone() for param in self.params]

    def take_weights(self, other: Job) -> None:
        for param, value in zip(self.params, other.params, strict=True):
            param.data.copy_(value.data)

    def everything(self) -> str:
        """All that a load may change, in words."""
        return repr([self.optimizer.state_dict(), self.params])


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_resume_with_the_optimizers_state_alone(case: str, optimizer: str) -> None:
    expected = Job(case, optimizer).train(0, 8)
    interrupted = Job(case, optimizer)
    interrupted.train(0, 4)
    resumed = Job(case, optimizer, seed=2)
    resumed.take_weights(interrupted)
    resumed.optimizer.load_state_dict(through_a_file(interrupted.optimizer.state_dict()))
    for mine, other in zip(resumed.train(4, 8), expected, strict=True):
        assert torch.equal(mine, other)
    assert (resumed.first.steps, resumed.decay.steps) == (8, 8)


def test_the_state_is_a_copy_in_the_order_of_attaching() -> None:
    job = Job("clock")
    job.train(0, 2)
    state = job.optimizer.state_dict()[KEY]
    before = copy.deepcopy(state)
    job.train(2, 4)
    assert repr(state) == repr(before)
    assert [one["rule"]["name"] for one in state["decay"]] == ["L2", "AdaptiveWeightShrink"]


def test_loading_by_hand_afterwards_still_works() -> None:
    """As code does that was written before the state rode: the same state twice is the state once."""
    interrupted = Job("every")
    interrupted.train(0, 4)
    parts: list[Any] = [interrupted.optimizer, interrupted.first, interrupted.decay]
    states = copy.deepcopy([part.state_dict() for part in parts])
    expected = interrupted.train(4, 8)
    resumed = Job("every")
    resumed.train(0, 4)
    parts = [resumed.optimizer, resumed.first, resumed.decay]
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(resumed.train(4, 8), expected, strict=True))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    job, other = Job("sphere"), Job("clock")
    job.train(0, 2)
    other.train(0, 3)
    before = job.everything()
    # the first Decay would take its state, the second refuses: neither takes it, nor does the optimizer
    with pytest.raises(ValueError, match=r"nothing has been changed: .*Sphere.*pop\('normwise'\)"):
        job.optimizer.load_state_dict(other.optimizer.state_dict())
    assert job.everything() == before
    state = other.optimizer.state_dict()
    del state[KEY]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.optimizer.load_state_dict(state)
        job.train(3, 4)
    assert job.decay.steps == 3


def test_a_state_that_torch_refuses_changes_no_decay() -> None:
    job, saved = Job(), Job()
    saved.train(0, 3)
    state = saved.optimizer.state_dict()
    state["param_groups"] = []
    with pytest.raises(ValueError, match="different number of parameter groups"):
        job.optimizer.load_state_dict(state)
    assert job.first.steps == job.decay.steps == 0
    job.optimizer.load_state_dict(Job().optimizer.state_dict())  # nor does a later load
    assert job.decay.steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[KEY]["decay"].pop(), "holds 1 of kind 'decay', and the optimizer has 2"),
        (lambda state: state[KEY].update(format=2), "not of format 1"),
        (lambda state: state.update({KEY: 3}), "not of format 1"),
        (lambda state: state[KEY].update(decay=3), "holds int of kind 'decay'"),
        (lambda state: state[KEY]["decay"][1].update(steps=-1), "steps=-1"),
        (lambda state: state[KEY]["decay"].reverse(), "rule="),
    ],
)
def test_a_damaged_state_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    job, saved = Job(), Job()
    saved.train(0, 3)
    state = copy.deepcopy(saved.optimizer.state_dict())
    change(state)
    before = job.everything()
    with pytest.raises(ValueError, match=message):
        job.optimizer.load_state_dict(state)
    assert job.everything() == before


def test_an_optimizer_without_a_decay_loads_the_state() -> None:
    saved = Job()
    saved.train(0, 3)
    plain = OPTIMIZERS["SGD"](Job().params)
    plain.load_state_dict(through_a_file(saved.optimizer.state_dict()))
    assert KEY not in plain.state_dict()


def test_the_last_to_be_removed_leaves_no_trace() -> None:
    job = Job()
    plain = set(vars(OPTIMIZERS["SGD"](job.params)))
    job.first.remove()
    assert len(job.optimizer.state_dict()[KEY]["decay"]) == 1
    job.decay.remove()
    assert KEY not in job.optimizer.state_dict()
    assert set(vars(job.optimizer)) == plain
    assert not job.optimizer._optimizer_load_state_dict_pre_hooks


class TestStateWithoutTheKey:
    def state(self) -> dict[str, Any]:
        job = Job()
        job.train(0, 3)
        state = job.optimizer.state_dict()
        del state[KEY]
        return state

    def test_the_next_step_warns_once(self) -> None:
        job = Job()
        job.optimizer.load_state_dict(self.state())
        with pytest.warns(UserWarning, match=r"holds no decay: Decay\(L2.*load its state_dict by hand"):
            job.train(0, 1)
        job.train(1, 3)

    @pytest.mark.parametrize("first", ["optimizer", "decays"])
    def test_no_warning_if_loaded_by_hand(self, first: str) -> None:
        job, saved = Job(), Job()
        for _ in range(2):
            for part in ("optimizer", "decays") if first == "optimizer" else ("decays", "optimizer"):
                if part == "optimizer":
                    job.optimizer.load_state_dict(self.state())
                else:
                    job.first.load_state_dict(saved.first.state_dict())
                    job.decay.load_state_dict(saved.decay.state_dict())
            with warnings.catch_warnings(record=True) as seen:
                job.train(0, 1)
            assert not seen

    def test_no_warning_once_removed(self) -> None:
        job = Job()
        job.optimizer.load_state_dict(self.state())
        job.first.remove()
        job.decay.remove()
        with warnings.catch_warnings(record=True) as seen:
            job.train(0, 1)
        assert not seen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda job: pickle.loads(pickle.dumps(job))])
def test_a_copy_saves_and_restores_its_own(copied: Callable[[Any], Any]) -> None:
    job = Job("clock")
    job.first.remove()
    job.first = nw.Decay(job.optimizer, nw.L2(0.1), job.params[0])  # a lambda cannot be pickled
    job.train(0, 2)
    twin = copied(job)
    twin.train(2, 4)
    assert (job.decay.steps, twin.decay.steps) == (2, 4)
    twin.optimizer.load_state_dict(job.optimizer.state_dict())
    assert (job.decay.steps, twin.decay.steps) == (2, 2)
    twin.decay.remove()
    assert len(job.optimizer.state_dict()[KEY]["decay"]) == 2


class WholeState(SGD):
    """Copies with everything, its hooks too, as some classes do."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


def test_a_copy_that_carries_the_hooks_of_the_original_leaves_it_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = WholeState([weight], lr=0.1)
    decay = nw.Decay(optimizer, nw.L2(0.1), weight)
    twin, other = copy.deepcopy((optimizer, decay))
    other.steps = 5
    assert twin.state_dict()[KEY]["decay"][0]["steps"] == 5
    assert optimizer.state_dict()[KEY]["decay"][0]["steps"] == 0
    optimizer.load_state_dict(twin.state_dict())
    assert decay.steps == 5
    weight.grad = torch.zeros(2, 2)
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.zeros(2, 2)
    twin.step()
    assert (decay.steps, other.steps) == (5, 6)
    decay.steps, other.steps = 7, 5
    twin.load_state_dict(twin.state_dict())
    assert (decay.steps, other.steps) == (7, 5)


def test_torch_distributed_checkpoint_drops_the_key_and_keeps_its_own_way() -> None:
    """``get_optimizer_state_dict`` drops what it does not know: save the Decay beside it."""
    model = nn.Linear(4, 3, bias=False)
    optimizer = Adam(model.parameters(), lr=0.1)
    decay = nw.Decay(optimizer, nw.Sphere(), model.weight, clock="lr^2/max_lr")
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state) == {"state", "param_groups"}
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state, of_decay = get_optimizer_state_dict(model, optimizer), decay.state_dict()
    optimizer.step()
    steps = of_decay["steps"]
    for order in ("before", "after"):
        if order == "before":
            decay.load_state_dict(of_decay)
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(state))
        if order == "after":
            decay.load_state_dict(of_decay)
        assert decay.steps == steps
        optimizer.step()


class Counter:
    """Another kind of object that rides."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def check_state_dict(self, state_dict: Any) -> None:
        if not isinstance(state_dict, dict) or set(state_dict) != {"count"}:
            raise ValueError("state_dict is not one of a Counter")

    def load_state_dict(self, state_dict: Any) -> None:
        self.count = state_dict["count"]


def test_other_objects_ride_the_same_way() -> None:
    job, counter = Job(), Counter()
    ride(job.optimizer, "counter", counter)
    assert riders(job.optimizer, "counter") == [counter]
    assert riders(job.optimizer, "decay") == [job.first, job.decay]
    counter.count = 4
    state = through_a_file(job.optimizer.state_dict())
    counter.count = 0
    state[KEY]["counter"] = [{"count": 4, "more": 1}]
    with pytest.raises(ValueError, match="not one of a Counter"):
        job.optimizer.load_state_dict(state)
    state[KEY]["counter"] = [{"count": 4}]
    job.optimizer.load_state_dict(state)
    assert counter.count == 4
    # what is saved and not attached now is left alone; what is attached and was not saved goes on as it is
    leave(job.optimizer, counter)
    job.optimizer.load_state_dict(state)
    ride(job.optimizer, "counter", counter)
    del state[KEY]["counter"]
    job.optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="holds no counter"):
        job.train(0, 1)
