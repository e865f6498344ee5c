"""State of a model outside of its parameters and buffers: it is used, and given back."""

from __future__ import annotations

import collections
import functools
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw

pytestmark = pytest.mark.usefixtures("either_storage")

_TABLES: dict[int, Tensor] = {}


class Table:
    """A helper that is no module, and caches a table."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, count: int) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, count)[:, None]
        return self.table


@functools.lru_cache
def cached_table(count: int) -> Tensor:
    return torch.linspace(0, 1, count)[:, None]


def table_in_a_global(count: int) -> Tensor:
    return _TABLES.setdefault(count, torch.linspace(0, 1, count)[:, None])


class Normed(nn.Module):
    """``a`` is invariant; what comes before it is what the tests vary."""

    counted = 0

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, **state: Any) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3)
        self.before = before
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        type(self).counted += 1
        return self.head(self.norm(self.a(x if self.before is None else self.before(x))))  # type: ignore[no-any-return]


def assert_found(inv: nw.Invariances) -> None:
    assert inv.dtype == "float64"
    assert inv.scale_invariant == {"a.weight": None}
    assert inv.joint == [{"norm.weight": 1, "norm.bias": 1, "head.weight": -1}]


_OWN_TABLE = Table()
TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "in an object": lambda x: x + _OWN_TABLE(len(x)),
    "in a cached function": lambda x: x + cached_table(len(x)),
    "in a global": lambda x: x + table_in_a_global(len(x)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_cached_tables_are_neither_used_nor_kept(kind: str) -> None:
    net, x = Normed(TABLES[kind], table=_OWN_TABLE), torch.randn(8, 4)
    for _ in range(2):  # the second time, there is a table in float32
        assert_found(nw.find_invariances(net, [x]))
        assert net(x).dtype == torch.float32
    assert cached_table.cache_info().misses <= 1
    cached_table.cache_clear()
    _OWN_TABLE.table = None
    _TABLES.clear()


def test_attributes_of_the_class_are_given_back() -> None:
    net, before = Normed(), Normed.counted
    assert_found(nw.find_invariances(net, [torch.randn(8, 4)]))
    assert Normed.counted == before


def _in_object(tensor: Tensor) -> Any:
    holder = Table()
    holder.table = tensor
    return holder


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "defaultdict": (lambda t: collections.defaultdict(list, seen=t), lambda c: c["seen"]),
    "subclass of dict": (lambda t: type("Own", (dict,), {})(seen=t), lambda c: c["seen"]),
    "UserDict": (lambda t: collections.UserDict(seen=t), lambda c: c["seen"]),
    "UserList": (lambda t: collections.UserList([t]), lambda c: c[0]),
    "namespace": (lambda t: types.SimpleNamespace(seen=t), lambda c: c.seen),
    "object": (_in_object, lambda c: c.table),
    "nested": (lambda t: [{"objects": (_in_object(t),)}], lambda c: c[0]["objects"][0].table),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_that_change_in_place_are_given_back(kind: str) -> None:
    make, read = CONTAINERS[kind]
    seen = torch.zeros(4)
    state = make(seen)

    def watch(x: Tensor) -> Tensor:
        with torch.no_grad():
            read(state).add_(x.mean(0))
        return x

    assert_found(nw.find_invariances(Normed(watch, state=state), [torch.randn(8, 4)]))
    assert read(state) is seen
    assert not seen.any()


def test_arrays_and_modules_that_are_not_registered() -> None:
    array, teacher = np.zeros(2), nn.BatchNorm1d(4)

    def watch(x: Tensor) -> Tensor:
        net.array += 1
        return x + 0.1 * net.teachers[0](x)  # type: ignore[no-any-return]

    net: Any = Normed(watch, array=array, teachers=[teacher])
    assert_found(nw.find_invariances(net, [torch.randn(8, 4)]))
    assert not net.array.any()
    assert net.array is array
    assert net.teachers == [teacher]
    assert teacher.running_mean is not None
    assert not teacher.running_mean.any()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_random_generators_of_the_model(kind: str) -> None:
    """Two passes at one point draw alike, or nothing could be confirmed."""
    generator: Any = torch.Generator().manual_seed(1) if kind == "torch" else np.random.default_rng(1)

    def state() -> Any:
        return generator.get_state().tolist() if kind == "torch" else str(generator.bit_generator.state)

    def noisy(x: Tensor) -> Tensor:
        if kind == "torch":
            return x + torch.randn(x.shape, generator=generator)
        return x + torch.as_tensor(generator.normal(size=x.shape)).to(x)

    before = state()
    assert_found(nw.find_invariances(Normed(noisy, generator=generator), [torch.randn(8, 4)]))
    assert state() == before


def test_helper_objects_of_models_with_many_modules() -> None:
    """Their number is limited, that of modules is not."""
    table = Table()
    net: Any = Normed(lambda x: x + table(len(x)), table=table)
    x = torch.randn(8, 4)
    net.idle = nn.ModuleList(nn.Identity() for _ in range(1100))
    assert_found(nw.find_invariances(net, [x]))
    assert table.table is None


def test_random_generators_differ_from_one_another() -> None:
    """With equal seeds their difference would be zero, and its weight without effect."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.Generator(), torch.Generator()
            self.a, self.scale = nn.Linear(4, 6), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            first, second = (torch.randn(6, generator=g) for g in (self.first, self.second))
            return torch.tanh(self.a(x) + self.scale * (first - second))

    assert nw.find_invariances(Difference(), [torch.randn(8, 4)]).no_effect == set()


@functools.lru_cache
def settings() -> dict[str, int]:
    """Return what a program sets up once."""
    return {}


class CachedMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    @functools.lru_cache  # noqa: B019 - what models do
    def table(self, count: int) -> Tensor:
        return torch.linspace(0, 1, count)[:, None]

    @staticmethod
    @functools.lru_cache
    def other_table(count: int) -> Tensor:
        return torch.linspace(1, 2, count)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        x = x @ torch.eye(4) + self.table(len(x)) + self.other_table(len(x))
        return self.head(F.relu(self.a(settings()["factor"] * x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("filled", [False, True])
def test_cached_functions_keep_what_a_program_set_up_and_no_tensors_of_the_probe(filled: bool) -> None:
    settings()["factor"] = 2
    own, net, x = settings(), CachedMethods(), torch.randn(8, 4)
    if filled:
        net(x[:5])
    inv = nw.find_invariances(net, [x])
    assert inv.joint == [{"a.weight": 1, "a.bias": 1, "head.weight": -1}]
    assert settings() is own
    assert net(x).dtype == torch.float32
    assert isinstance(vars(CachedMethods)["other_table"], staticmethod)


class OddProxy:
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no context")


class Thing:
    pass


def test_odd_attributes_do_not_end_the_search() -> None:
    thing = Thing()
    proxies = [weakref.proxy(thing), OddProxy()]
    del thing
    net = Normed(many=(proxies[0],), listed=proxies, draw=random.SystemRandom())
    net.__dict__["dead"] = proxies[0]
    assert_found(nw.find_invariances(net, [torch.randn(8, 4)]))


def test_data_and_optimizers_among_the_attributes_are_left_alone() -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.tensor = torch.zeros(3)

        def __getitem__(self, index: int) -> Tensor:
            self.tensor.add_(1)
            return self.tensor

    data = Data()
    net: Any = Normed(lambda x: x + 0 * data[0].sum(), data=data)
    net.optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert_found(nw.find_invariances(net, [torch.randn(8, 4)]))
    assert data.tensor.any()  # it was the data set itself
    assert net.optimizer.param_groups[0]["params"][0] is net.a.weight


class Merging(nn.Linear):
    """A low-rank adapter that eval() adds to the weight and train() takes out again, as loralib's."""

    def __init__(self) -> None:
        super().__init__(4, 6, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        self.up.requires_grad_(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.up @ self.down)


def test_a_model_whose_train_method_writes_weights_and_flags() -> None:
    torch.manual_seed(0)
    layer, head = Merging(), nn.Linear(6, 3)
    net, x = nn.Sequential(layer, nn.ReLU(), head).eval(), torch.randn(8, 4)
    weight, outputs = layer.weight.detach().clone(), net(x)
    inv = nw.find_invariances(net, [x])
    assert inv.no_effect == set()
    assert len(inv.joint) == 2
    assert {"0.down": 1, "0.up": -1} in [
        {k: e * s["0.down"] for k, e in s.items()} for s in inv.joint if "0.down" in s
    ]
    assert torch.equal(layer.weight, weight)
    assert torch.equal(net(x), outputs)
    assert layer.merged
    assert not layer.up.requires_grad


class Switches(nn.Module):
    """train() and eval() change a buffer, a list and a helper object in place; forward reads them."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
        self.register_buffer("factor", torch.ones(()))
        self.list, self.helper = [1.0], types.SimpleNamespace(on=1.0)

    def train(self, mode: bool = True) -> Switches:
        super().train(mode)
        self.factor.fill_(float(mode))
        self.list[0] = self.helper.on = float(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        on = self.factor * self.list[0] * self.helper.on
        return self.head(on * F.relu(self.a(x)))  # type: ignore[no-any-return]


def test_what_a_train_method_writes_besides_attributes_is_used_and_given_back() -> None:
    net = Switches().eval()
    inv = nw.find_invariances(net, [torch.randn(8, 4)])
    assert inv.joint == [{"a.weight": 1, "head.weight": -1}]
    assert (float(net.factor), net.list, net.helper.on) == (0.0, [0.0], 0.0)


def test_searches_in_threads_give_the_default_type_back() -> None:
    nets = [Normed() for _ in range(3)]
    threads = [
        threading.Thread(
            target=nw.find_invariances, args=(net, [torch.randn(8, 4)]), kwargs={"progress": False}
        )
        for net in nets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() == torch.float32
