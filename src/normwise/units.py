"""What is normalised together: units, their norms and their broadcasting.

A *unit* is the slice of a parameter that a normalisation takes together: a row (``dim=0``, one output
filter), a column (``dim=1``, the filters of a transposed convolution), the whole tensor (``dim=None``),
or the same slice of several tensors jointly. This module is the one place that knows how the norm of a
unit is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unit", "check_dim", "row_norms"]

# Between these norms a sum of float32 squares neither overflows nor loses its smallest terms.
_SAFE_LOW, _SAFE_HIGH = 1e-15, 1e15


def check_dim(dim: object, ndim: int, what: str) -> int | None:
    """Return ``dim`` as a non-negative int (or None), or raise an error that names it.

    Args:
        dim: What the user gave: an int in [-ndim, ndim), or None for the whole tensor.
        ndim: The number of dimensions of the tensor that it is meant for.
        what: How to call the tensor in an error.

    Example:
        >>> check_dim(-1, 2, "weight")
        1
    """
    if dim is None:
        return None
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int or None (the whole tensor), not {dim!r}")
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"dim={dim} is out of range for {what} with {ndim} dimension(s): "
            f"give an int from {-ndim} to {ndim - 1}, or None for the whole tensor"
            if ndim
            else f"dim={dim} does not fit {what}, which has no dimensions: give dim=None"
        )
    return dim % ndim


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type that ``device`` computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_norms(weight: Tensor, dim: int | None = 0) -> Tensor:
    """Return the Euclidean norm of each unit of ``weight``, exact for every representable norm.

    Args:
        weight: A real floating-point tensor of any shape (a DTensor too).
        dim: The dimension that counts the units (0: rows, 1: columns), or None: the whole tensor.

    Returns:
        A tensor of the widest type of the device (float64 but on MPS), with the number of dimensions of
        ``weight`` and size 1 in all of them but ``dim``, so that it broadcasts against ``weight``.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5.],
                [0.]], dtype=torch.float64)
    """
    dim = check_dim(dim, weight.ndim, "the weight")
    wide = wide_dtype(weight.device)
    reduced = tuple(k for k in range(weight.ndim) if k != dim)
    if not reduced:  # every element is a unit of its own
        return weight.detach().abs().to(wide)
    weight = weight.detach()
    if weight.dtype == torch.float64:
        return torch.linalg.vector_norm(weight, dim=reduced, keepdim=True)
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        # float32 sums are several times faster; their range is checked, which on a CPU costs nothing.
        norms = torch.linalg.vector_norm(weight, dim=reduced, keepdim=True, dtype=torch.float32)
        low, high = torch.aminmax(norms) if norms.numel() else (norms.sum(), norms.sum())
        if weight.dtype == torch.float16 or bool((low > _SAFE_LOW) & (high < _SAFE_HIGH)):
            return norms.to(wide)
    return torch.linalg.vector_norm(weight, dim=reduced, keepdim=True, dtype=wide)
