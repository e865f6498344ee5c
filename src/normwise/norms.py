"""Norms of slices of tensors, accurate for norms from 1e-37 to 1e38.

This is the only module that computes the norm of a slice. It knows tensors, not units or DTensors:
:mod:`normwise.units` builds on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = [
    "check_dim",
    "check_tensor",
    "concatenated_norms",
    "of_shape",
    "overlap",
    "slice_norms",
    "wide_dtype",
]

_FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Within these norms, a float32 sum of squares neither overflows nor loses its smallest terms.
_SAFE_LOW, _SAFE_HIGH = 1e-15, 1e15
# Computing a norm in a wider type copies the tensor. Copy at most this many elements at a time; on an
# accelerator, where each launch has a cost, more.
_COPIED_NUMEL, _COPIED_NUMEL_ELSEWHERE = 2**20, 2**24
# Summing more squares than this in one go accumulates rounding error: along contiguous memory, where torch
# keeps several partial sums, and across memory, where it keeps one.
_SUMMED, _SUMMED_ACROSS = 2**13, 2**10


def check_dim(dim: object, ndim: int, what: str) -> int | None:
    """Return ``dim`` as a non-negative int (or None), or raise an error that names it.

    Args:
        dim: The user's argument: an int in [-ndim, ndim), or None for the whole tensor.
        ndim: The number of dimensions of the tensor.
        what: The name of the tensor in an error message.

    Raises:
        TypeError: ``dim`` is not an int or None.
        ValueError: ``dim`` is out of range.

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


def of_shape(tensor: object) -> str:
    """Return `` of shape (...)`` for an error message; nothing for what has no shape, as a lazy parameter.

    Example:
        >>> of_shape(torch.ones(3, 2))
        ' of shape (3, 2)'
    """
    has_shape = isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.is_nested
    return f" of shape {tuple(tensor.shape)}" if has_shape else ""  # type: ignore[attr-defined]


def check_tensor(tensor: object, name: str) -> None:
    """Raise an error if the slices of a tensor have no norms, or cannot be scaled in place.

    Args:
        tensor: The user's argument.
        name: The name of the tensor in an error message, as in ``"parameter 'fc.weight'"``.

    Raises:
        TypeError: It is not a tensor of float16, bfloat16, float32 or float64.
        ValueError: It is sparse, nested, an MKL-DNN tensor, a lazy negation, an uninitialised lazy parameter,
            or a view in which several elements share one place in memory.

    Example:
        >>> check_tensor(torch.ones(3, 1).expand(3, 2), "the weight")
        Traceback (most recent call last):
        ValueError: the weight is a view of shape (3, 2) and strides (1, 0) whose elements overlap in memory,
        so it cannot be scaled in place: give a tensor without overlap, such as its clone()
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"params must be tensors, not {type(tensor).__name__}")
    if is_lazy(tensor):
        raise ValueError(f"{name} is a lazy parameter without values: run the model once to initialise it")
    if tensor.dtype not in _FLOATING_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATING_DTYPES)
        raise TypeError(f"{name} has type {tensor.dtype}, and a unit needs one of {allowed}")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").strip("_")
        raise ValueError(f"{name} has layout {layout}, and a unit needs a dense (strided) tensor: convert it")
    if tensor.is_neg():
        raise ValueError(f"{name} is a lazily negated view: give tensor.resolve_neg() instead")
    if _overlaps_itself(tensor):
        raise ValueError(
            f"{name} is a view of shape {tuple(tensor.shape)} and strides {tensor.stride()} whose elements "
            "overlap in memory, so it cannot be scaled in place: give a tensor without overlap, such as its "
            "clone()"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether several elements of a strided tensor may share one place in memory."""
    if tensor.numel() <= 1 or tensor.is_contiguous():
        return False
    reach = 0  # the largest offset that the dimensions seen so far lead to
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def overlap(first: Tensor, second: Tensor) -> bool:
    """Return whether two dense tensors in the same storage have an element in common.

    Example:
        >>> both = torch.ones(2, 4)
        >>> overlap(both[:, :2], both[:, 2:]), overlap(both[:, :2], both[:, 1:])
        (False, True)
    """
    size = first.element_size()
    start, end = _reach(first)
    other_start, other_end = _reach(second)
    if end <= other_start or other_end <= start:
        return False
    if second.element_size() != size or (start - other_start) % size:
        return True  # views of other types; they are not compared byte by byte
    lowest = min(start, other_start)
    is_taken = torch.zeros((max(end, other_end) - lowest) // size, dtype=torch.bool)
    is_taken.as_strided(first.shape, first.stride(), (start - lowest) // size).fill_(True)
    return bool(is_taken.as_strided(second.shape, second.stride(), (other_start - lowest) // size).any())


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the byte after its last."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum(int((size - 1) * step) for size, step in steps)
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type that ``device`` computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


def slice_norms(weight: Tensor, dim: int | None = 0) -> Tensor:
    """Return the Euclidean norm of each slice of ``weight`` along ``dim``.

    Args:
        weight: A real floating-point tensor of any shape. For a DTensor, use ``Unit.norms``.
        dim: 0 for the norms of rows, 1 for the norms of columns, ..., None for the norm of the whole tensor.

    Returns:
        A tensor of the widest type of the device (float64; float32 on MPS). It has as many dimensions as
        ``weight``, each of size 1 except ``dim``, so that it broadcasts against ``weight``.

    Example:
        >>> slice_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5.],
                [0.]], dtype=torch.float64)
    """
    dim = check_dim(dim, weight.ndim, "the weight")
    shape = [weight.shape[k] if k == dim else 1 for k in range(weight.ndim)]
    return concatenated_norms([weight], dim)[0].view(shape)


def concatenated_norms(weights: Sequence[Tensor], dim: int | None) -> tuple[Tensor, bool]:
    """Return the norms of the slices of several tensors as one vector, and whether all are ordinary.

    Args:
        weights: Tensors on one device.
        dim: The dimension to slice along (not negative), or None for one norm per tensor.

    Returns:
        A tensor of the widest type and shape (number of slices,), and a flag. The flag is True if all norms
        are known to be positive and finite; it is False where checking would synchronise an accelerator.

    Example:
        >>> concatenated_norms([torch.ones(1, 4), torch.ones(2, 9)], dim=0)
        (tensor([2., 3., 3.], dtype=torch.float64), True)
    """
    weights = [weight.detach() for weight in weights]
    wide = wide_dtype(weights[0].device)
    if weights[0].device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat([_norms(weight, dim, wide).to(wide) for weight in weights]), False
    # Sums in float32 are several times faster than in float64. On a CPU, checking their range is cheap.
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
    """Recompute in the widest type the norms whose squares may have left the range of float32."""
    doubtful = ((norms <= _SAFE_LOW) | (norms >= _SAFE_HIGH)).nonzero().flatten()
    if weight.dtype not in (torch.float16, torch.float64) and doubtful.numel():
        rows = weight if dim is None else weight.index_select(dim, doubtful)
        norms[doubtful] = _norms(rows, dim, norms.dtype)
    return norms


def _norms(weight: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return the norms as a vector, computed in ``dtype``, in pieces where torch would copy the tensor."""
    if weight.ndim == (dim is not None):  # each slice is a single element
        return weight.abs().to(dtype).reshape(-1)
    limit = _COPIED_NUMEL if weight.device.type == "cpu" else _COPIED_NUMEL_ELSEWHERE
    if weight.dtype == dtype or weight.numel() <= limit:
        return _summed(weight, dim, dtype)
    pieces = weight.split(max(1, limit * len(weight) // weight.numel()))
    if dim == 0:
        return torch.cat([_summed(piece, dim, dtype) for piece in pieces])
    squares = torch.zeros((), dtype=wide_dtype(weight.device), device=weight.device)
    for piece in pieces:  # one at a time: all partial results together could be as large as the tensor
        squares = squares + _summed(piece, dim, dtype).to(squares.dtype).square()
    return squares.sqrt()


def _summed(weight: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return the norms as a vector, summing long slices in pieces to limit rounding error.

    On a CPU torch adds squares one after the other: over 3 million float32 elements, that costs 500 ULP.
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
        return _combined(torch.cat([pieces, rest], dim=1), 1)
    axis = max((k for k in range(weight.ndim) if k != dim), key=lambda k: weight.shape[k])
    parts = weight.split(max(1, _SUMMED_ACROSS * weight.shape[axis] // length), dim=axis)
    return _combined(torch.stack([_summed(part, dim, dtype) for part in parts]), 0)


def _as_rows(weight: Tensor, dim: int | None) -> Tensor | None:
    """View a tensor as (slices, elements), elements in any order, if each slice is contiguous in memory."""
    if dim not in (None, 0):
        return None
    order = sorted(range(weight.ndim), key=lambda k: -weight.stride()[k])  # channels_last: channels come last
    ordered = weight.permute(order)
    if not ordered.is_contiguous() or (dim == 0 and order[0] != 0):
        return None
    return ordered.view(1 if dim is None else len(weight), -1)


def _combined(norms: Tensor, axis: int) -> Tensor:
    """Return √Σn² along ``axis``, in the widest type."""
    return norms.to(wide_dtype(norms.device)).square().sum(axis).sqrt()
