"""The first batches of a trainer's loader, read without a trace: its random state is as before."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["first_batches", "on_device", "preserved_random_states"]

NUMBER = 4
_PARTS = ("sampler", "batch_sampler", "dataset", "base_dataloader", "loader")


def first_batches(loader: Any, number: int = NUMBER) -> list[Any]:
    """Return the first batches that a loader would give.

    A torch DataLoader is rebuilt without workers, as theirs would have to be started for this.

    Raises:
        ValueError: The loader can be read only once, or is empty.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            "the training data are an iterator, which can be read only once: give plan=, made from batches "
            "of your own"
        )
    with preserved_random_states(loader):
        batches = list(itertools.islice(iter(_without_workers(loader)), number))
    if not batches:
        raise ValueError("the training data are empty: give plan=, made from batches of your own")
    return batches


def _without_workers(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    given: dict[str, Any] = {"collate_fn": loader.collate_fn}
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        given |= {"batch_size": loader.batch_size}
    elif loader.batch_sampler is not None:
        given |= {"batch_sampler": loader.batch_sampler}
    else:
        given |= {"batch_size": None, "sampler": loader.sampler}
    return DataLoader(loader.dataset, **given)


@contextmanager
def preserved_random_states(loader: Any = None) -> Iterator[None]:
    """Restore the random states of python, numpy, torch and of the parts of a loader."""
    generators = list(_generators(loader, 0))
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(part: Any, depth: int) -> Iterator[torch.Generator]:
    if isinstance(getattr(part, "generator", None), torch.Generator):
        yield part.generator
    for name in _PARTS if depth < 4 else ():
        inner = getattr(part, name, None)
        if inner is not None and inner is not part:
            yield from _generators(inner, depth + 1)


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, or several, with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(on_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(on_device(value, device) for value in batch)
    return batch
