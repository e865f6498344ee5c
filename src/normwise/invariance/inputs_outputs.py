"""Batches and outputs of any structure: how they are read, converted, flattened and described."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Forward",
    "bind_forward",
    "converted",
    "describe",
    "differentiable_outputs",
    "is_about_precision",
    "is_probed",
    "map_tensors",
    "suggested_forward",
    "take_batches",
]

Forward = Callable[[nn.Module, Any], Any]


def take_batches(batches: Any, most: int) -> list[Any]:
    """Return the first batches, at most ``most``.

    Args:
        batches: An iterable of batches (a list, a DataLoader, a generator), or a single tensor or mapping,
            which is one batch. A list or tuple is always an iterable of batches.
        most: The largest number of batches to read.

    Raises:
        TypeError: If ``batches`` is not iterable.
        ValueError: If it is empty.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> len(take_batches([x, x], 4)), len(take_batches(x, 4))
        (2, 1)
    """
    if isinstance(batches, (Tensor, Mapping)):
        return [batches]
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches (or one tensor or mapping), not "
            f"{type(batches).__name__}: give for example [x], [(x, mask)] or [dict(input_ids=ids)]"
        )
    taken = list(itertools.islice(batches, most))
    if not taken:
        raise ValueError("batches is empty (too few batches: 0): give at least one, as in [x]")
    return taken


def bind_forward(forward: Callable[..., Any] | None) -> Forward:
    """Return a function (model, batch) → outputs.

    Args:
        forward: None, a function of (model, batch), or a function of the batch alone, such as a bound method
            or a closure. None passes a tensor as ``model(x)``, a mapping as ``model(**x)``, and a tuple or
            list as ``model(*x)``, or as ``model(x[0])`` if the model fails on that.

    Raises:
        TypeError: If ``forward`` is not callable.
    """
    if forward is None:
        return _DirectCall()
    if not callable(forward):
        raise TypeError(f"forward must be a function (model, batch) -> outputs or None, not {forward!r}")
    given = forward
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # builtins have none
        return lambda model, batch: given(model, batch)
    try:
        signature.bind(None, None)
    except TypeError:
        return lambda model, batch: given(batch)
    return lambda model, batch: given(model, batch)


class _DirectCall:
    """Call the model with a batch; if it fails on all parts of a tuple, with the first part from then on.

    So the pairs (inputs, labels) of a DataLoader serve a model that takes inputs only.
    """

    def __init__(self) -> None:
        self._first_part_only: bool | None = None  # None: not known yet

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        if not isinstance(batch, (tuple, list)):
            return model(batch)
        if self._first_part_only:
            return model(batch[0])
        random_state = torch.get_rng_state()
        try:
            outputs = model(*batch)
        except Exception as error:
            if self._first_part_only is not None or len(batch) < 2 or is_about_precision(error):
                raise
            torch.set_rng_state(random_state)
            try:
                outputs = model(batch[0])
            except Exception:
                outputs = None
            if outputs is None:
                raise  # what the model said about the whole batch
            self._first_part_only = True
            logging.getLogger("normwise").warning(
                "the model takes the first of the %d parts of a batch %s only, and the others are ignored: "
                "pass forward= to choose",
                len(batch),
                describe(batch),
            )
        else:
            self._first_part_only = False
        return outputs


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``tree`` with ``function`` applied to each tensor in lists, tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function) for item in tree))
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(item, function) for item in tree]
        try:
            return type(tree)(items)
        except TypeError:  # some subclasses cannot be built from their items; a list or tuple serves as well
            return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(item, function) for key, item in tree.items()}
        # An output of transformers is both. Some mapping classes (a tokenizer's batch) cannot be built from
        # a dict; a dict serves as well.
        return type(tree)(**mapped) if dataclasses.is_dataclass(tree) else mapped
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                item = map_tensors(getattr(tree, field.name), function)
                object.__setattr__(changed, field.name, item)
        return changed
    return tree


def is_probed(tensor: Tensor) -> bool:
    """Return whether a probe can convert ``tensor``: real or complex, and wider than float8."""
    return tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() > 1)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``, or in the complex type of the same precision if it is complex.

    Example:
        >>> converted(torch.ones(1, dtype=torch.complex64), torch.float64).dtype
        torch.complex128
    """
    if not is_probed(tensor):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        for item in tree:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, field.name))


def differentiable_outputs(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of ``outputs`` that carry a gradient, each once.

    Args:
        outputs: The return value of a model: a tensor, or tensors in (nested) tuples, lists, mappings or
            dataclasses. Other objects, such as a cache of keys and values, are ignored.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> len(differentiable_outputs({"logits": x * 2, "ids": torch.tensor([1]), "again": (x + 1,)}))
        2
    """
    unique = {id(t): t for t in _tensors(outputs)}
    carrying = [t for t in unique.values() if (t.is_floating_point() or t.is_complex()) and t.requires_grad]
    return [torch.view_as_real(t) if t.is_complex() else t for t in carrying]


def is_about_precision(error: BaseException) -> bool:
    """Return whether a model may have failed because of the probe's type or its narrow weights."""
    text = str(error).lower()
    of_type = ("dtype", "scalar type", "double", "float64")
    # torch.func transforms support neither saved-tensor hooks nor the autograd functions of narrow weights.
    of_storage = ("functorch", "torch.func", "saved tensor hooks", "once_differentiable")
    # Narrow weights are read as tensors that are neither parameters nor leaves of the graph.
    of_reads = ("not have been used in the graph", "leaf variable", "not an nn.parameter", "cannot assign")
    return any(word in text for word in (*of_type, *of_storage, *of_reads, "graph leaves"))


def suggested_forward(batch: Any) -> str:
    """Return how to pass one part of a batch only, for an error message.

    Example:
        >>> suggested_forward({"image": 0, "label": 1})
        "forward=lambda model, batch: model(batch['image'])"
    """
    if isinstance(batch, Mapping) and batch:
        return f"forward=lambda model, batch: model(batch[{next(iter(batch))!r}])"
    if isinstance(batch, (tuple, list)) and batch:
        return "forward=lambda model, batch: model(batch[0])"
    return "forward="


def describe(tree: Any) -> str:
    """Return the shapes in a batch, for an error message.

    Example:
        >>> describe({"x": torch.zeros(2, 3), "n": 4})
        '{x: (2, 3), n: int}'
    """
    if isinstance(tree, Tensor):
        return str(tuple(tree.shape))
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        return "[" + ", ".join(describe(item) for item in tree) + "]"
    return type(tree).__name__
