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

__all__ = ["Unit", "check_dim", "row_norms", "wide_dtype"]

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
        return _norm(weight, reduced, torch.float64)
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        # float32 sums are several times faster; their range is checked, which on a CPU costs nothing.
        norms = _norm(weight, reduced, torch.float32)
        low, high = torch.aminmax(norms) if norms.numel() else (norms.sum(), norms.sum())
        if weight.dtype == torch.float16 or bool((low > _SAFE_LOW) & (high < _SAFE_HIGH)):
            return norms.to(wide)
    return _norm(weight, reduced, wide)


def _norm(weight: Tensor, reduced: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=reduced, keepdim=True, dtype=dtype)
    return norms


class Unit:
    """One parameter, or several taken jointly, and which slices of it a rule acts on.

    Args:
        params: A tensor, or several that are taken jointly: then the norm of a unit is √Σₖ‖wₖ‖² over the
            same slice of each.
        dim: The dimension that counts the units: 0 for rows, 1 for columns, ..., None for the whole tensor
            (jointly: one unit made of all elements of all tensors).
        mask: Which rows or columns are meant: booleans, one per unit. None: all of them.

    Attributes:
        params: The tensors, as a tuple.
        dim: As given, made non-negative; None for the whole tensor.
        mask: A bool tensor of shape (count,), or None.
        count: How many units there are along ``dim`` (1 for ``dim=None``).
        numel: How many elements one unit has, over all tensors.

    Raises:
        TypeError: A parameter is not a real floating-point tensor, or ``dim`` is not an int or None.
        ValueError: ``dim`` or ``mask`` does not fit, or joint tensors have different numbers of slices.

    Example:
        >>> query, key = torch.ones(4, 3), torch.ones(4, 2)
        >>> Unit([query, key]).norms()
        tensor([2.2361, 2.2361, 2.2361, 2.2361], dtype=torch.float64)
        >>> Unit([query, key], dim=None).numel
        20
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        dim: int | None = 0,
        mask: Tensor | Iterable[bool] | None = None,
    ) -> None:
        self.params = (params,) if isinstance(params, Tensor) else tuple(params)
        if not self.params:
            raise ValueError("params is empty: a Unit needs at least one tensor")
        for param in self.params:
            if not isinstance(param, Tensor):
                raise TypeError(f"params must be tensors, not {type(param).__name__}")
            if not param.is_floating_point():
                raise TypeError(f"a unit needs real floating-point tensors, not {param.dtype}")
        if len({id(param) for param in self.params}) < len(self.params):
            raise ValueError("params holds the same tensor twice: give each tensor of a joint unit once")
        shapes = [tuple(param.shape) for param in self.params]
        dims = {check_dim(dim, len(shape), f"a tensor of shape {shape}") for shape in shapes}
        if len(dims) > 1:
            raise ValueError(
                f"dim={dim} means different dimensions of tensors with shapes {shapes}: give dim >= 0"
            )
        self.dim = dims.pop()
        counts = {1 if self.dim is None else param.shape[self.dim] for param in self.params}
        if len(counts) > 1:
            raise ValueError(
                f"tensors of shapes {shapes} have different numbers of slices along dim={dim}, so they "
                "cannot be taken jointly slice by slice: give dim=None to take the whole tensors jointly"
            )
        self.count = counts.pop()
        self.numel = sum(p.numel() // max(1, self.count) for p in self.params)
        self.mask = self._checked_mask(mask)

    def _checked_mask(self, mask: Tensor | Iterable[bool] | None) -> Tensor | None:
        if mask is None:
            return None
        if self.dim is None:
            raise ValueError("mask selects rows or columns, and dim=None has none: give dim, or no mask")
        mask = mask if isinstance(mask, Tensor) else torch.tensor(list(mask))
        if mask.dtype != torch.bool or mask.shape != (self.count,):
            raise ValueError(
                f"mask must hold {self.count} booleans, one per slice along dim={self.dim}, "
                f"not {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if not bool(mask.any()):
            raise ValueError("mask selects nothing: give at least one True, or leave the unit out")
        return mask.to(self.params[0].device)

    def norms(self) -> Tensor:
        """Return the norm of every unit, the masked ones too: shape (count,), in the widest type."""
        norms = row_norms(self.params[0], self.dim).reshape(-1)
        for param in self.params[1:]:
            norms = torch.hypot(norms, row_norms(param, self.dim).reshape(-1))
        return norms

    def broadcast(self, values: Tensor, param: Tensor) -> Tensor:
        """View ``values`` of shape (count,) so that it multiplies the units of ``param``."""
        return values.view([-1 if k == self.dim else 1 for k in range(param.ndim)])

    def overlaps(self, other: Unit) -> bool:
        """Return whether the two share an element of some parameter."""
        mine = {id(param) for param in self.params}
        if not any(id(param) in mine for param in other.params):
            return False
        if self.mask is None or other.mask is None or self.dim != other.dim:
            return True
        return bool((self.mask & other.mask.to(self.mask.device)).any())

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(param.shape)) for param in self.params)
        masked = "" if self.mask is None else f", mask={int(self.mask.sum())} of {self.count}"
        return f"Unit({shapes}, dim={self.dim}{masked})"

    def describe(self) -> dict[str, Any]:
        """Return shapes, dim and mask as plain values, for a state_dict."""
        mask = None if self.mask is None else self.mask.tolist()
        return {"shapes": [list(param.shape) for param in self.params], "dim": self.dim, "mask": mask}
