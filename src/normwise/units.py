"""What is normalised together: units, their norms and their broadcasting.

A *unit* is the slice of a parameter that a normalisation takes together: a row (``dim=0``, one output
filter), a column (``dim=1``, the filters of a transposed convolution), the whole tensor (``dim=None``),
or the same slice of several tensors jointly. This module is the one place that knows how the norm of a
unit is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unit", "check_dim", "joined_norms", "row_norms", "wide_dtype"]

# Between these norms a sum of float32 squares neither overflows nor loses its smallest terms.
_SAFE_LOW, _SAFE_HIGH = 1e-15, 1e15
# A norm in another type than the tensor's copies it: so many elements at a time (more where launches cost).
_COPIED_NUMEL, _COPIED_NUMEL_ELSEWHERE = 2**20, 2**24
# So many squares are summed before rounding adds up: of neighbours in memory, of which torch keeps several
# sums beside each other, and across memory, of which it keeps one.
_SUMMED, _SUMMED_ACROSS = 2**13, 2**10


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
    """Return the Euclidean norm of each unit of ``weight``, right for norms from 1e-37 to 1e38.

    Args:
        weight: A real floating-point tensor of any shape; not a DTensor, whose norms ``Unit.norms`` gives.
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
    shape = [weight.shape[k] if k == dim else 1 for k in range(weight.ndim)]
    return joined_norms([weight], dim)[0].view(shape)


def joined_norms(weights: Sequence[Tensor], dim: int | None) -> tuple[Tensor, bool]:
    """Return the norms of the units of several tensors, one after the other, and what is known of them.

    Args:
        weights: Tensors on one device, each with a dimension ``dim``.
        dim: The dimension that counts the units, not negative, or None.

    Returns:
        A tensor of the widest type and shape (number of units,), and whether all its values are known to be
        positive and finite (False where finding out would make an accelerator wait).

    Example:
        >>> joined_norms([torch.ones(1, 4), torch.ones(2, 9)], dim=0)
        (tensor([2., 3., 3.], dtype=torch.float64), True)
    """
    weights = [weight.detach() for weight in weights]
    wide = wide_dtype(weights[0].device)
    if weights[0].device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat([_norms(weight, dim, wide).to(wide) for weight in weights]), False
    # float32 sums are several times faster than float64 ones; their range is checked, which costs little here
    norms = [_norms(w, dim, torch.float32 if w.dtype != wide else wide) for w in weights]
    joined = norms[0] if len(norms) == 1 else torch.cat(norms)
    if not joined.numel():
        return joined.to(wide), True
    low, high = (bound.item() for bound in torch.aminmax(joined))
    if low > _SAFE_LOW and high < _SAFE_HIGH:
        return joined.to(wide), True
    corrected = torch.cat([_corrected(n.to(wide), w, dim) for n, w in zip(norms, weights, strict=True)])
    return corrected, False


def _corrected(norms: Tensor, weight: Tensor, dim: int | None) -> Tensor:
    """Replace the norms whose squares may have left the range of float32."""
    doubtful = ((norms <= _SAFE_LOW) | (norms >= _SAFE_HIGH)).nonzero().flatten()
    if weight.dtype not in (torch.float16, torch.float64) and doubtful.numel():
        rows = weight if dim is None else weight.index_select(dim, doubtful)
        norms[doubtful] = _norms(rows, dim, norms.dtype)
    return norms


def _norms(weight: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return the norms as a vector, computed in this type, in pieces where torch would copy the tensor."""
    if weight.ndim == (dim is not None):  # every element is a unit of its own
        return weight.abs().to(dtype).reshape(-1)
    limit = _COPIED_NUMEL if weight.device.type == "cpu" else _COPIED_NUMEL_ELSEWHERE
    if weight.dtype == dtype or weight.numel() <= limit:
        return _summed(weight, dim, dtype)
    pieces = weight.split(max(1, limit * len(weight) // weight.numel()))
    if dim == 0:
        return torch.cat([_summed(piece, dim, dtype) for piece in pieces])
    squares = torch.zeros((), dtype=wide_dtype(weight.device), device=weight.device)
    for piece in pieces:  # one after the other: all beside each other could be as large as the tensor
        squares = squares + _summed(piece, dim, dtype).to(squares.dtype).square()
    return squares.sqrt()


def _summed(weight: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return the norms as a vector, in pieces where so many squares are summed that rounding adds up.

    On a CPU torch sums them one after the other: over 3 million elements of float32 a norm is off by 500 ULP.
    """
    count = 1 if dim is None else weight.shape[dim]
    length = weight.numel() // max(1, count)
    dense = _as_rows(weight, dim) if length > _SUMMED_ACROSS and weight.device.type == "cpu" else None
    if length <= _SUMMED_ACROSS or weight.device.type != "cpu" or (dense is not None and length <= _SUMMED):
        reduced = [k for k in range(weight.ndim) if k != dim]
        norms: Tensor = torch.linalg.vector_norm(weight, dim=reduced, dtype=dtype).reshape(-1)
        return norms
    if dense is not None:
        whole = length - length % _SUMMED
        pieces = torch.linalg.vector_norm(dense[:, :whole].unflatten(1, (-1, _SUMMED)), dim=2, dtype=dtype)
        rest = torch.linalg.vector_norm(dense[:, whole:], dim=1, keepdim=True, dtype=dtype)
        return _together(torch.cat([pieces, rest], dim=1), 1)
    axis = max((k for k in range(weight.ndim) if k != dim), key=lambda k: weight.shape[k])
    parts = weight.split(max(1, _SUMMED_ACROSS * weight.shape[axis] // length), dim=axis)
    return _together(torch.stack([_summed(part, dim, dtype) for part in parts]), 0)


def _as_rows(weight: Tensor, dim: int | None) -> Tensor | None:
    """View a tensor as (units, elements), in any order, if each unit lies in memory in one piece."""
    if dim not in (None, 0):
        return None
    order = sorted(
        range(weight.ndim), key=lambda k: -weight.stride()[k]
    )  # in channels_last the channels are last
    ordered = weight.permute(order)
    if not ordered.is_contiguous() or (dim == 0 and order[0] != 0):
        return None
    return ordered.view(1 if dim is None else len(weight), -1)


def _together(norms: Tensor, axis: int) -> Tensor:
    """Return √Σn² along an axis, in the widest type."""
    return norms.to(wide_dtype(norms.device)).square().sum(axis).sqrt()


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
        """Return the norm of every unit, the masked ones too: shape (count,), in the widest type.

        Of sharded parameters every rank must ask, and gets the norms of all units.
        """
        from normwise import sharding

        if any(sharding.is_sharded(param) for param in self.params):
            return sharding.whole_norms([sharding.parts_of(self)])[0]
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
