"""The batches that a command line names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normwise.inspection.models import called, load

__all__ = ["random_inputs", "read_safetensors", "returned_batches"]

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def random_inputs(specifications: list[str], model: nn.Module, batches: int = 2) -> list[tuple[Tensor, ...]]:
    """Return random batches, one positional input for each ``SHAPE[:dtype]``.

    Args:
        specifications: As "8x3x32x32" or "4,16:int64". The first number is the size of the batch.
        model: Integers are drawn below the size of the model's smallest embedding, or are 0 and 1.
        batches: The number of batches.

    Raises:
        ValueError: A shape or dtype is not one.

    Example:
        >>> (batch,) = random_inputs(["4x2", "4:int64"], nn.Embedding(9, 2), batches=1)
        >>> [tuple(t.shape) for t in batch], bool(batch[1].max() < 9)
        ([(4, 2), (4,)], True)
    """
    wanted = [_parsed(text) for text in specifications]
    _check_memory(specifications, (shape for shape, _ in wanted), batches)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    below = min(sizes, default=2)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(batches):
        batch = []
        for shape, dtype in wanted:
            if dtype.is_floating_point:
                batch.append(torch.randn(shape, generator=generator).to(dtype))
            else:
                batch.append(torch.randint(0, below, shape, generator=generator).to(dtype))
        drawn.append(tuple(batch))
    return drawn


def _parsed(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+([x,]\d+)*", shape):
        raise ValueError(f"--input {text!r} is no shape: give numbers as in 8x3x32x32 or 4x16:int64")
    sizes = tuple(int(size) for size in re.split("[x,]", shape))
    if (dtype or "float32") not in _DTYPES:
        raise ValueError(f"--input {text!r}: the dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if 0 in sizes:
        raise ValueError(f"--input {text!r} has 0 values: give sizes of at least 1")
    return sizes, _DTYPES[dtype or "float32"]


def _check_memory(specifications: list[str], shapes: Iterable[tuple[int, ...]], batches: int) -> None:
    """Raise an error if the inputs, each held in float64 too, do not fit half of the memory."""
    needed = sum(math.prod(shape) for shape in shapes) * 8 * (batches + 1)
    if needed > _memory() / 2:
        sizes = " and ".join(map(repr, specifications))
        raise ValueError(f"--input {sizes} needs {needed / 1e9:.3g} GB of memory: give smaller sizes")


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 * 2**30


def read_safetensors(path: str | Path) -> list[Any]:
    """Return one batch from a safetensors file: a mapping; or a tuple, if its names are numbers.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("--batch needs the extra 'lab': pip install normwise[lab]") from error
    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except Exception as error:  # its own error class, and those of the system
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--batch {str(path)!r} cannot be read: {text}") from error
    if not tensors:
        raise ValueError(f"--batch {str(path)!r} holds no tensor")
    if set(tensors) == {str(k) for k in range(len(tensors))}:
        return [tuple(tensors[str(k)] for k in range(len(tensors)))]
    return [tensors]


def returned_batches(target: str) -> Any:
    """Return what the function ``package.module:function`` returns: batches.

    Raises:
        ValueError: It cannot be found, or raises.
    """
    return called(target, load(target))
