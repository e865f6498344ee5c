"""The model, the random state and the batches are the same afterwards, whatever happens."""

from __future__ import annotations

import collections
import functools
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.invariance.checks import same, snapshot
from tests.invariance.modules import legacy_weight_norm
from tests.invariance.networks import CASES, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw

pytestmark = pytest.mark.usefixtures("either_storage")


class BoomError(Exception):
    pass


def lived_in(watched: bool = True) -> nn.Module:
    """A network with all that could be disturbed: statistics, gradients, hooks, flags, frozen parts."""
    torch.manual_seed(3)
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    legacy_weight_norm(net[4])
    net[7].weight.requires_grad_(False)
    net(torch.randn(5, 3, 8, 8)).square().mean().backward()
    net[5].eval()
    net.register_forward_hook(lambda module, inputs, output: None)
    if watched:
        parameters = dict(net.named_parameters())
        parameters["4.bias"].register_hook(_never)
        parameters["7.bias"].register_post_accumulate_grad_hook(_never)
    return net


def _never(*_: Any) -> None:
    raise AssertionError("a hook of the model's own parameter must not run")


def state_of_random() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_are_untouched(training: bool) -> None:
    net = lived_in()
    if not training:
        net.eval()
    x = torch.randn(6, 3, 8, 8)
    kept = x.clone()
    before, drawn = snapshot(net), state_of_random()
    nw.find_invariances(net, [x])
    assert same(before, snapshot(net))
    assert same(drawn, state_of_random())
    assert torch.equal(x, kept)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("error", [BoomError("stop"), KeyboardInterrupt(), RuntimeError("stop")])
@pytest.mark.parametrize("call", [1, 3, 5])
def test_model_is_untouched_after_an_exception(error: BaseException, call: int) -> None:
    net, calls, x = lived_in(), 0, torch.randn(6, 3, 8, 8)
    before = snapshot(net)

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        out = model(batch)
        if calls == call:
            raise error
        return out

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RuntimeError):
        nw.find_invariances(net, [x], forward)
    assert same(before, snapshot(net))


class Refuses(dict[str, Any]):
    """A configuration that cannot be changed, as diffusers has them."""

    def update(self, *_: Any, **__: Any) -> None:
        raise BoomError("frozen")

    clear = copy = __setitem__ = update  # type: ignore[assignment]


def with_containers() -> Any:
    """A network whose forward pass changes containers, nested and of every type."""
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    net.settings = Refuses({"width": 8})
    net.cache = {"seen": [torch.zeros(2)], "order": collections.OrderedDict(a=1, b=2)}
    net.recent = (collections.deque([1, 2], maxlen=2), {3})

    def change(module: Any, *_: Any) -> None:
        module.cache["seen"][0].add_(1)
        module.cache["seen"].append(torch.ones(1))
        module.cache["order"].move_to_end("a")
        module.recent[0].append(5)
        module.recent[1].add(7)

    net.register_forward_hook(change)
    return net.eval()


def contents(net: Any) -> Any:
    seen = net.cache["seen"]
    return (
        [id(net.cache), id(seen), *(id(t) for t in seen)],
        [t.clone() for t in seen],
        [list(net.cache["order"]), list(net.recent[0]), sorted(net.recent[1])],
        dict(net.settings),
    )


class Steps:
    """Counts the calls of every function of normwise.invariance, and lets one of them raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.raises, self.left = "", 0
        package = {n: m for n, m in sys.modules.items() if n.startswith("normwise.invariance.")}
        for module in package.values():
            for name, value in list(vars(module).items()):
                if getattr(value, "__module__", None) not in package:
                    continue
                if isinstance(value, types.FunctionType):
                    monkeypatch.setattr(module, name, self._counted(value))
                elif isinstance(value, type) and value.__module__ == module.__name__:
                    for key, method in list(vars(value).items()):
                        if isinstance(method, types.FunctionType):
                            monkeypatch.setattr(value, key, self._counted(method))

    def _counted(self, function: Any) -> Any:
        step = f"{function.__module__}.{function.__qualname__}"

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[step] += 1
            if step == self.raises:
                self.left -= 1
                if self.left == 0:
                    raise BoomError(step)
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.thorough)])
def test_model_is_untouched_when_any_step_of_the_search_raises(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every function of the search, or every 8th, raises in turn, except for those that restore the model."""
    net, x = with_containers(), torch.randn(6, 3)
    before, kept, drawn = snapshot(net), contents(net), state_of_random()
    find = nw.find_invariances
    steps = Steps(monkeypatch)
    find(net, [x])
    restoring: tuple[str, ...] = ("restore", "release", "close", "__exit__")
    restoring += ("_read", "all_identical", "_same_items", "_attributes", "_public", "_set_state")
    calls = {step: count for step, count in steps.calls.items() if not step.endswith(restoring)}
    assert len(calls) > 50
    for step, count in list(calls.items())[::every]:
        steps.raises, steps.left = step, (count + 1) // 2  # in the middle of the search
        with pytest.raises(Exception, match=re.escape(step)):
            find(net, [x])
        assert same(before, snapshot(net)), step
        assert same(kept, contents(net)), step
        assert same(drawn, state_of_random()), step


def test_model_is_untouched_after_an_exception_in_the_backward_pass() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise KeyboardInterrupt

    net, x = lived_in(), torch.randn(6, 3, 8, 8)
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        nw.find_invariances(net, [x], lambda m, b: Fails.apply(m(b)))
    assert same(before, snapshot(net))


def test_lists_of_parameters_and_attributes_are_given_back() -> None:
    net = nn.LSTM(4, 3)
    flat = list(net._flat_weights)
    net.seen = []
    net.scale = torch.ones(())
    nw.find_invariances(net, [torch.randn(5, 2, 4)], lambda m, b: (m.seen.append(1), m(b))[1])
    assert all(a is b for a, b in zip(net._flat_weights, flat, strict=True))
    assert net.seen == []
    assert net.scale.dtype == torch.float32


def test_the_model_still_trains_as_if_nothing_had_been() -> None:
    def train(look: bool) -> Tensor:
        net = lived_in(watched=False)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for step in range(3):
            if look and step == 1:
                nw.find_invariances(
                    net, [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
                )
            optimizer.zero_grad()
            net(torch.randn(6, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.manual_seed(0)
    expected = train(False)
    torch.manual_seed(0)
    assert torch.equal(train(True), expected)


def test_a_data_loader_is_read_no_further_than_needed_and_draws_no_random_numbers() -> None:
    case: Case = CASES["mlp_relu"]
    loader = DataLoader(TensorDataset(torch.randn(64, 6)), batch_size=4, shuffle=True)
    drawn = state_of_random()
    inv = nw.find_invariances(case.build(), loader)
    assert len(inv.joint) == 2
    drawn = state_of_random()
    net = case.build()
    drawn = state_of_random()
    nw.find_invariances(net, loader)
    assert same(drawn, state_of_random())

    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.randn(8, 6)

    assert len(nw.find_invariances(case.build(), endless()).joint) == 2


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def test_the_result_does_not_depend_on_the_random_state() -> None:
    net = build(CASES["resnet"].build)
    batches = CASES["resnet"].batches()
    one = nw.find_invariances(net, batches)
    torch.manual_seed(99)
    two = nw.find_invariances(net, batches)
    assert one.joint == two.joint
    assert {n: e.residual for n, e in one.evidence.items()} == {
        n: e.residual for n, e in two.evidence.items()
    }
