"""What a forward pass may change besides values of parameters, and the way back.

A model keeps state in the attributes of its modules, in containers, in helper objects that are no modules,
in modules that are not registered (``self.teacher = [module]``), in attributes of classes, in caches of the
Python modules that define these classes, and in random generators of its own.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normwise.invariance.inputs_outputs import map_tensors

__all__ = ["LARGEST_TENSOR", "Container", "ModelState", "all_identical", "is_module", "may_hold_tensors"]

# Objects of these packages, and of these classes, are left alone: they are no part of the model.
_FOREIGN = {"torch", "numpy", "lightning", "pytorch_lightning", "accelerate", "normwise"}
_NO_PARTS = (
    torch.jit.ScriptModule,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.utils.data.Dataset,
    torch.utils.data.DataLoader,
    random.SystemRandom,
)
_HELPERS = ("types", "collections")
_MOST_HELPERS = 1000
# In helper objects, larger containers and tensors are data.
_LARGEST_CONTAINER = 10_000
LARGEST_TENSOR = 1 << 20


class ModelState:
    """The state of a model, as it was when this object was made.

    Args:
        model: The model.

    Attributes:
        attributes: Each module (those of ``model.modules()`` first) and helper object, with its attributes.
        containers: The containers in these attributes, however deep, each once.
        of_modules: How many of ``containers`` belong to modules; the others belong to helper objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attributes: list[tuple[Any, dict[str, Any]]] = []
        self.containers: list[Container] = []
        self._generators: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._helpers = 0
        for module in model.modules():
            self._add_holder(module)
        helpers = self._walk([value for _, attributes in self.attributes for value in attributes.values()])
        self.of_modules = len(self.containers)
        self._walk(helpers, into_helpers=True)
        classes = {
            cls
            for holder, _ in self.attributes
            for cls in type(holder).__mro__
            if _is_own(cls) and not _is_helper(cls)
        }
        self._classes = [(cls, _public(vars(cls))) for cls in classes]
        self._walk(
            [
                value
                for _, own in self._classes
                for value in own.values()
                if issubclass(type(value), Container.BASES)
            ],
            into_helpers=True,
        )
        modules = [sys.modules[name] for name in {c.__module__ for c in classes} if name in sys.modules]
        self._globals = [(vars(module), _public(vars(module))) for module in modules]
        # Shallow: a notebook also keeps its data there.
        self._caches = [
            Container(value)
            for _, names in self._globals
            for value in names.values()
            if issubclass(type(value), dict)
            and id(value) not in self._seen
            and len(value) <= _LARGEST_CONTAINER
        ]
        self._cached = [
            (holder, name, value, cached)
            for holder, names in [*self._globals, *self._classes]
            for name, value in names.items()
            if (cached := _CachedFunction.of(value)) is not None
        ]

    def uncache(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Keep the tensors of a probe out of the caches of functions (``functools.lru_cache``).

        Args:
            convert: Applied to the tensors that they return.
        """
        for holder, name, value, cached in self._cached:
            _set_item(holder, name, cached.during_probe(value, convert))

    def seed(self, seed: int) -> None:
        """Seed the model's own random generators, each with another number."""
        for number, (generator, _) in enumerate(self._generators):
            own = 1_000_033 * (seed + 1) + number
            if isinstance(generator, torch.Generator):
                generator.manual_seed(own)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(own).state
            else:
                generator.seed(own % 2**32)

    def restore(self) -> None:
        """Give everything back its original attributes, contents and state."""
        for holder, attributes in self.attributes:
            own = _attributes(holder)
            if own is not None and not _same_items(own, attributes):
                own.clear()
                own.update(attributes)
        for container in [*self.containers, *self._caches]:
            container.restore()
        for cls, attributes in self._classes:
            now = _public(vars(cls))
            if not _same_items(now, attributes):
                for key in now.keys() - attributes.keys():
                    type.__delattr__(cls, key)
                for key, value in attributes.items():
                    if now.get(key) is not value:
                        type.__setattr__(cls, key, value)
        for holder, name, value, cached in self._cached:
            _set_item(holder, name, value)
            cached.clean()
        for names, before in self._globals:
            for name, value in before.items():
                if names.get(name) is not value and may_hold_tensors(names.get(name)):
                    names[name] = value
        for generator, state in self._generators:
            _set_state(generator, state)

    def _walk(self, waiting: list[Any], *, into_helpers: bool = False) -> list[Any]:
        """Find containers, helper objects, hidden modules and generators, however deep, each once.

        Returns:
            The helper objects, unless the walk goes into them.
        """
        helpers: list[Any] = []
        # Not at the top of the file: numpy imports numpy.random when it is used.
        generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
        while waiting:
            value = waiting.pop()
            cls = type(value)  # not isinstance: proxies may claim another class, or raise
            if cls is tuple:
                waiting += value
            elif id(value) in self._seen or issubclass(cls, (Tensor, type, str, int, float, *_NO_PARTS)):
                continue
            elif is_module(value):
                waiting += self._add_holder(value)
            elif issubclass(cls, Container.BASES):
                self._seen.add(id(value))
                if into_helpers and len(value) > _LARGEST_CONTAINER:
                    continue
                container = Container(value)
                self.containers.append(container)
                waiting += container.contents
            elif issubclass(cls, generators):
                self._seen.add(id(value))
                self._generators.append((value, _state_of(value)))
            elif self._helpers < _MOST_HELPERS and _is_own(cls) and _attributes(value) is not None:
                if into_helpers:
                    self._helpers += 1
                    waiting += self._add_holder(value)
                else:
                    helpers.append(value)
        return helpers

    def _add_holder(self, holder: Any) -> Iterator[Any]:
        """Record a module or helper object; return the values of its attributes."""
        self._seen.add(id(holder))
        attributes = dict(_attributes(holder) or {})
        self.attributes.append((holder, attributes))
        return iter(attributes.values())


class _CachedFunction:
    """A function with ``functools.lru_cache``, or a method, whose cache must not keep a probe's tensors."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._keeps_tensors = False

    @staticmethod
    def of(value: Any) -> _CachedFunction | None:
        """Return it for a global or an attribute of a class; None for anything else."""
        if type(value) in (staticmethod, classmethod):
            value = value.__func__
        return _CachedFunction(value) if type(value) is functools._lru_cache_wrapper else None

    def during_probe(self, value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
        """Return what takes the place of ``value``.

        A cache with entries is used, as these may be what a program has set up. An empty one stays empty.
        """
        settings = self._function.cache_parameters()
        fresh = functools.lru_cache(settings["maxsize"], settings["typed"])(self._function.__wrapped__)
        use_fresh = self._function.cache_info().currsize == 0

        @functools.wraps(self._function.__wrapped__)
        def call(*args: Any, **kwargs: Any) -> Any:
            if use_fresh:
                return fresh(*args, **kwargs)
            misses = self._function.cache_info().misses
            result = self._function(*args, **kwargs)
            tensors: list[Tensor] = []

            def converted(tensor: Tensor) -> Tensor:
                tensors.append(tensor)
                return convert(tensor)

            changed = map_tensors(result, converted) if may_hold_tensors(result) else result
            self._keeps_tensors |= bool(tensors) and self._function.cache_info().misses > misses
            return changed if tensors else result

        return type(value)(call) if type(value) in (staticmethod, classmethod) else call

    def clean(self) -> None:
        """Empty the cache if it has got tensors."""
        if self._keeps_tensors:
            self._function.cache_clear()
            self._keeps_tensors = False


class Container:
    """A container of the model and its contents.

    Only the methods of the built-in base type read and write it: subclasses may refuse to be changed.
    """

    BASES = (OrderedDict, dict, list, set, deque)

    def __init__(self, container: Any) -> None:
        self.object = container
        self._base: Any = next(base for base in self.BASES if issubclass(type(container), base))
        self._is_dict = issubclass(self._base, dict)
        self.contents = self._read()
        self.takes_stand_ins = self._base is not set and any(map(may_hold_tensors, self.contents))

    def _read(self) -> list[Any]:
        """Return the values, after the keys if there are any."""
        if self._is_dict:
            return [*self._base.keys(self.object), *self._base.values(self.object)]
        return list(self._base.__iter__(self.object))

    def _items(self) -> tuple[Sequence[Any], list[Any]]:
        """Return the original keys, or places, and values."""
        if not self._is_dict:
            return range(len(self.contents)), self.contents
        half = len(self.contents) // 2
        return self.contents[:half], self.contents[half:]

    def replace(self, function: Callable[[Any], Any]) -> None:
        """Replace each value by ``function`` of it."""
        keys, values = self._items()
        replaced = [function(value) for value in values]
        if not all_identical(replaced, values):
            for key, value in zip(keys, replaced, strict=True):
                self._base.__setitem__(self.object, key, value)

    def restore(self) -> None:
        """Give the container its original contents, if it has others."""
        if all_identical(self._read(), self.contents):
            return
        self._base.clear(self.object)
        if self._is_dict:
            for key, value in zip(*self._items(), strict=True):
                self._base.__setitem__(self.object, key, value)
        elif self._base is set:
            set.update(self.object, self.contents)
        else:
            self._base.extend(self.object, self.contents)


def is_module(value: Any) -> bool:
    """Return whether ``value`` is a module; what it claims to be by ``__class__`` does not count."""
    return issubclass(type(value), nn.Module)


def may_hold_tensors(value: Any) -> bool:
    """Return whether ``value`` can be changed in place, or holds what can: a tensor, an array, or a tuple."""
    return issubclass(type(value), (Tensor, tuple, np.ndarray, bytearray))


def all_identical(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether two sequences hold the same objects."""
    return len(items) == len(others) and all(map(operator.is_, items, others))


def _same_items(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return all_identical([*now.keys(), *now.values()], [*before.keys(), *before.values()])


def _attributes(holder: Any) -> dict[str, Any] | None:
    """Return the ``__dict__`` of an object; None if it has none."""
    try:
        found = object.__getattribute__(holder, "__dict__")
    except Exception:  # it may be a property
        return None
    return found if type(found) is dict else None


def _is_own(cls: type) -> bool:
    """Return whether objects of a class may be a part of the model."""
    package = str(cls.__module__).partition(".")[0]
    return _is_helper(cls) or not (package in _FOREIGN or package in sys.stdlib_module_names)


def _is_helper(cls: type) -> bool:
    """Return whether a class of a library is for parts of models, as namespaces and distributions are."""
    return str(cls.__module__) in _HELPERS or str(cls.__module__).startswith("torch.distributions.")


def _public(names: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in names.items() if not key.startswith("__")}


def _set_item(holder: Any, name: str, value: Any) -> None:
    """Set a global, or an attribute of a class."""
    if isinstance(holder, type):
        type.__setattr__(holder, name, value)
    else:
        holder[name] = value


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
