"""Weights stored in float32 and widened at each read, so that a float64 probe needs no float64 copy.

A module that reads ``self.weight`` gets a float64 tensor of the moment. The graph does not hold it for the
backward pass: saved-tensor hooks note which weight it was and widen that again. Its gradient goes straight to
whoever reduces it to sums, one read at a time, and is accumulated nowhere. Linear layers and embeddings never
see a whole float64 weight: they work on some rows at a time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["CHUNK", "NarrowParameters", "Reads", "Receiver"]

# How many values are widened, or reduced to sums, at once: they stay in the cache of a core.
CHUNK = 1 << 18

Rows = slice | Tensor
Receiver = Callable[[int, Tensor, Rows], None]


class Reads:
    """The stand-ins that are stored narrow, and what happens when one is read.

    Args:
        dtype: What they are widened to.

    Attributes:
        receive: Called with (parameter, gradient, rows of dimension 0 that it is of) in a backward pass.
        holds: Whether the graph may hold the widened tensors: the hooks are off, which some models need.
    """

    def __init__(self, dtype: torch.dtype, *, holds: bool = False) -> None:
        self.dtype, self.holds = dtype, holds
        self.receive: Receiver | None = None
        self._stored: dict[int, tuple[int, Tensor]] = {}
        self._by_index: dict[int, Tensor] = {}
        self._latest: dict[tuple[int, bool], weakref.ref[Tensor]] = {}
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def add(self, index: int, stored: Tensor) -> None:
        """Enter a stand-in: parameter ``index``."""
        self._stored[id(stored)] = index, stored
        self._by_index[index] = stored

    def __bool__(self) -> bool:
        return bool(self._stored)

    def index_of(self, value: Any) -> int | None:
        """Return the number of the parameter that ``value`` is the stand-in of, or None."""
        found = self._stored.get(id(value))
        return None if found is None else found[0]

    def widened(self, value: Any) -> Any:
        """Return ``value`` in float64 if it is a stand-in stored narrow; the same object while it lives."""
        index = self.index_of(value)
        if index is None:
            return value
        key = index, torch.is_grad_enabled()
        latest = self._latest.get(key)
        wide = None if latest is None else latest()
        if wide is None:
            wide = _Read.apply(value, index, self)
            wide.__dict__.update(value.__dict__)  # some models read settings from attributes of parameters
            self._latest[key] = weakref.ref(wide)
        return wide

    def widen(self, index: int) -> Tensor:
        """Return parameter ``index`` in float64, and remember whose storage that is."""
        wide = self._by_index[index].detach().to(self.dtype)
        storage = wide.untyped_storage()
        # The weak reference keeps the address from being given to another storage.
        self._storages[storage._cdata] = index, StorageWeakRef(storage)
        return wide

    def forget(self) -> None:
        """Forget earlier reads, before another forward pass."""
        self._latest.clear()
        self._storages.clear()

    def send(self, index: int, gradient: Tensor, rows: Rows = slice(None)) -> None:
        """Hand a gradient on."""
        if self.receive is not None:
            self.receive(index, gradient, rows)

    def unheld(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the graph does not hold widened tensors."""
        if not self or self.holds:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            # Detached: the graph would hold itself through the very tensor that the hook was given.
            if tensor.layout != torch.strided or tensor.dtype != self.dtype or tensor._version:
                return tensor.detach()
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is None:
                return tensor.detach()
            return known[0], tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, size, stride, offset = packed
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return self.widen(index).as_strided(size, stride, offset)


class NarrowParameters(dict[str, Any]):
    """The ``_parameters`` of a module, of which those stored narrow come out widened."""

    def __init__(self, items: dict[str, Any], reads: Reads) -> None:
        super().__init__(items)
        self._reads = reads

    def __getitem__(self, key: str) -> Any:
        return self._reads.widened(super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, widened."""
        return self._reads.widened(super().get(key, default))

    def values(self) -> Any:
        """Return the values, widened one by one."""
        return (self._reads.widened(value) for value in super().values())

    def items(self) -> Any:
        """Return the items, widened one by one."""
        return ((key, self._reads.widened(value)) for key, value in super().items())

    def stored(self, key: str) -> Any:
        """Return the value of ``key`` as it is stored."""
        return super().get(key)


def by_rows(
    module: nn.Module, parameters: NarrowParameters, reads: Reads
) -> Callable[[Tensor], Tensor] | None:
    """Return a forward function that widens some rows at a time; None if ``module`` has none."""
    if "forward" in module.__dict__:
        return None
    stored = parameters.stored("weight")
    index = reads.index_of(stored)
    if index is None or stored.ndim != 2 or stored.numel() <= CHUNK // 4:
        return None
    if type(module) is nn.Linear:

        def linear(x: Tensor) -> Tensor:
            if x.dtype != reads.dtype:
                return F.linear(x, module.weight, module.bias)
            out: Tensor = _Linear.apply(x, stored, index, reads)
            return out if module.bias is None else out + module.bias

        return linear
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        padding = module.padding_idx

        def embedding(x: Tensor) -> Tensor:
            out: Tensor = _Embedding.apply(stored, x, index, reads, padding)
            return out

        return embedding
    return None


def _pieces(stored: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, stored[0].numel()))
    return [slice(a, min(a + step, len(stored))) for a in range(0, len(stored), step)]


class _Read(torch.autograd.Function):
    """The whole tensor, widened."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, index: int, reads: Reads) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.index, ctx.reads = index, reads
        with torch._C.DisableTorchFunction():
            return reads.widen(index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:
        if gradient is not None:
            ctx.reads.send(ctx.index, gradient)
        return None, None, None


class _Linear(torch.autograd.Function):
    """x · weightᵀ, some rows of the weight at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, index: int, reads: Reads) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.stored, ctx.index, ctx.reads = stored.detach(), index, reads
        with torch._C.DisableTorchFunction():
            flat = x.reshape(-1, stored.shape[1])
            out = flat.new_empty(len(flat), len(stored))
            for rows in _pieces(stored):
                torch.mm(flat, stored[rows].to(reads.dtype).T, out=out[:, rows])
            return out.view(*x.shape[:-1], len(stored))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None
        (x,) = ctx.saved_tensors
        of_input, of_weight, *_ = ctx.needs_input_grad
        with torch._C.DisableTorchFunction():
            flat = x.reshape(-1, ctx.stored.shape[1])
            gradient = gradient.reshape(len(flat), -1)
            back = torch.zeros_like(flat) if of_input else None
            for rows in _pieces(ctx.stored):
                part = gradient[:, rows]
                if back is not None:
                    back.addmm_(part, ctx.stored[rows].to(back.dtype))
                if of_weight:
                    ctx.reads.send(ctx.index, part.T @ flat, rows)
            return None if back is None else back.view(x.shape), None, None, None


class _Embedding(torch.autograd.Function):
    """The rows that ``ids`` name; only they have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, stored: Tensor, ids: Tensor, index: int, reads: Reads, padding: int | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ids, ctx.index, ctx.reads, ctx.padding = ids, index, reads, padding
        with torch._C.DisableTorchFunction():
            return F.embedding(ids, stored).to(reads.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None, None, None]:
        if gradient is not None:
            with torch._C.DisableTorchFunction():
                rows, place = ctx.ids.reshape(-1).unique(return_inverse=True)
                flat = gradient.reshape(len(place), -1)
                sums = flat.new_zeros(len(rows), flat.shape[1]).index_add_(0, place, flat)
                if ctx.padding is not None:
                    sums[rows == ctx.padding] = 0
                ctx.reads.send(ctx.index, sums, rows)
        return None, None, None, None, None
