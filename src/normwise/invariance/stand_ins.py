"""Stand-ins for everything in a model that a probe may change, and the way back.

The probe never writes the model's tensors. While it runs, the modules refer to stand-ins; afterwards they
refer to the original objects again. So values, gradients, hooks on parameters and ``requires_grad`` cannot
change.

A float64 probe does not need a float64 copy of the weights. Their stand-ins can be stored in float32
("narrow") and converted to float64 ("widened") at each read. The graph does not keep the widened tensors for
the backward pass: saved-tensor hooks record which weight a tensor came from, and widen that weight again. The
gradient of each read is reduced to sums at once, and nothing accumulates it. Linear layers and embeddings
never hold a whole float64 weight: they process a few rows at a time.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from normwise.invariance.inputs_outputs import converted, is_probed
from normwise.invariance.model_state import (
    LARGEST_TENSOR,
    ModelState,
    all_identical,
    is_module,
    may_hold_tensors,
)
from normwise.norms import wide_dtype

__all__ = ["CHUNK", "NarrowStorage", "StandIns"]

# How many values are widened, or reduced to sums, at once: so many fit into the cache of a core.
CHUNK = 1 << 18

Rows = slice | Tensor


class StandIns:
    """The stand-ins for a model's parameters and buffers.

    Args:
        model: The model.
        dtype: The floating-point type that the modules see.
        narrow: Whether stand-ins may be stored in float32 and widened at each read. In float32, nothing is
            widened, but linear layers and embeddings process a few rows at a time.

    Attributes:
        names: The name of each parameter, as ``named_parameters`` gives it; tied parameters appear once.
        unprobed: {name: reason} for parameters that have no stand-in.
        originals: The model's parameters, without those in ``unprobed``.
        parameters: Their stand-ins, uninitialised, of type ``dtype`` or float32.
        narrow: The stand-ins that are stored in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, narrow: bool = True) -> None:
        named = dict(model.named_parameters())
        self.names = [name for name, p in named.items() if is_probed(p)]
        self.unprobed = {name: _why_unprobed(p) for name, p in named.items() if not is_probed(p)}
        self.originals: list[Tensor] = [named[name] for name in self.names]
        self.narrow = NarrowStorage(dtype)
        self._state = ModelState(model)
        in_attributes = _tensors_outside(self._state)
        self.parameters = []
        for index, p in enumerate(self.originals):
            is_narrow = (
                narrow
                and (dtype == torch.float32 or p.dtype != dtype)
                and not p.is_complex()
                and id(p) not in in_attributes
            )
            self.parameters.append(_stand_in(p, torch.float32 if is_narrow else dtype))
            if is_narrow:
                self.narrow.add(index, self.parameters[index])
        self._dtype = dtype
        self._without_gradient: set[int] = set()
        self._by_id = {id(p): q for p, q in zip(self.originals, self.parameters, strict=True)}
        self._by_id |= {id(q): q for q in self.parameters}
        self._use(self._state)
        self._installed = True

    def _use(self, source: ModelState) -> None:
        """Let later installations begin with this state of the model."""
        self._source = source
        self._modules = [(m, a["_parameters"]) for m, a in source.attributes if is_module(m)]
        self._with_tensors = [
            (holder, {key: value for key, value in attributes.items() if may_hold_tensors(value)})
            for holder, attributes in source.attributes
        ]

    def widen(self) -> None:
        """Store all stand-ins in the type that the modules see; nothing is widened at reads any more."""
        for p in self.parameters:
            if p.dtype != self._dtype and not p.is_complex():
                p.data = p.data.to(self._dtype)
        self.narrow.clear()

    def install(self, seed: int = 0, *, as_stored: bool = False) -> None:
        """Make every module refer to the stand-ins, and to fresh clones of its buffers and other tensors.

        Args:
            seed: The seed of the model's own random generators.
            as_stored: Whether reads give the stand-ins as they are stored, in float32 perhaps.
        """
        if self._installed:
            self.restore()
        self._installed = True
        if self._source is not self._state:
            self._source.restore()
        self._state.uncache(lambda tensor: converted(tensor.detach().clone(), self._dtype))
        self._source.seed(seed)
        self.narrow.forget()
        for stand_in in self.parameters:
            stand_in.requires_grad_(id(stand_in) not in self._without_gradient)
        clones: dict[int, Any] = {}
        for holder, with_tensors in self._with_tensors:
            for key, value in with_tensors.items():
                if is_module(holder) or _size(value) <= LARGEST_TENSOR:
                    holder.__dict__[key] = self._replaced(value, clones)
        wraps = bool(self.narrow) and not as_stored
        narrow_parameters = {id(parameters) for _, parameters in self._modules} if wraps else set()
        for container in self._source.containers:
            if container.takes_stand_ins and id(container.object) not in narrow_parameters:
                container.replace(lambda item: self._replaced(item, clones))
        for module, own in self._modules:
            if wraps:
                replaced = {name: self._replaced(p, clones) for name, p in own.items()}
                self._install_narrow(module, _NarrowParameters(replaced, self.narrow))
            if isinstance(module, nn.RNNBase):
                module.__dict__["dropout"] = 0.0  # its dropout runs inside one native function
            if isinstance(module, nn.SyncBatchNorm):  # only this process probes: use its statistics alone
                module.__dict__["forward"] = nn.BatchNorm2d.forward.__get__(module)

    def _install_narrow(self, module: nn.Module, parameters: _NarrowParameters) -> None:
        module.__dict__["_parameters"] = parameters
        forward = _forward_by_rows(module, parameters, self.narrow)
        if forward is not None:
            module.__dict__["forward"] = forward

    def train(self, model: nn.Module) -> None:
        """Switch to training mode by ``model.train()``, for every later :meth:`install`.

        A model's own ``train`` may write weights (an adapter that it had merged), buffers and attributes. It
        writes stand-ins and clones, and later installations begin with the state that it leaves.
        """
        with torch.no_grad():
            for original, stand_in in zip(self.originals, self.parameters, strict=True):
                stand_in.copy_(original)
        self.install(as_stored=True)
        model.train()
        self._use(ModelState(model))
        self.restore()

    def without_gradients(self, indices: Iterable[int]) -> None:
        """Let the stand-ins of these parameters need no gradient, and those of all others need one."""
        self._without_gradient = {id(self.parameters[index]) for index in indices}
        for stand_in in self.parameters:
            stand_in.requires_grad_(id(stand_in) not in self._without_gradient)

    def restore(self) -> None:
        """Give every module back its original objects, and every container its original contents."""
        self._state.restore()
        self._installed = False

    def _replaced(self, value: Any, clones: dict[int, Any]) -> Any:
        """Return the stand-in of a parameter, a clone of another tensor or array, or the value itself."""
        if not may_hold_tensors(value):
            return value
        if type(value) is tuple:
            items = tuple(self._replaced(item, clones) for item in value)
            return value if all_identical(items, value) else items
        if id(value) in self._by_id:
            return self._by_id[id(value)]
        if isinstance(value, tuple):
            return value
        if isinstance(value, Tensor) and value.grad_fn is not None:
            return value
        if isinstance(value, nn.Parameter) and (type(value) is not nn.Parameter or not is_probed(value)):
            return value  # quantised, say
        if id(value) not in clones:
            clones[id(value)] = self._clone(value)
        return clones[id(value)]

    def _clone(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.copy(value)
        clone = converted(value.detach().clone(), self._dtype)
        if isinstance(value, nn.Parameter):  # of a module that is not registered
            return nn.Parameter(clone, requires_grad=value.requires_grad)
        return clone


def _tensors_outside(state: ModelState) -> set[int]:
    """Return the ids of tensors that are held outside ``_parameters``; an LSTM lists its weights."""
    parameters = {id(attributes.get("_parameters")) for _, attributes in state.attributes}
    held = [
        value for holder, attributes in state.attributes if is_module(holder) for value in attributes.values()
    ]
    for container in state.containers[: state.of_modules]:
        if id(container.object) not in parameters:
            held += container.contents
    return {
        id(item)
        for value in held
        for item in (value if type(value) is tuple else (value,))
        if issubclass(type(item), Tensor)
    }


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else getattr(value, "size", 0)


def _why_unprobed(parameter: Tensor) -> str:
    if parameter.is_floating_point():
        return f"values of type {parameter.dtype} cannot be probed: convert them to a wider type"
    return f"frozen: values of type {parameter.dtype} have no gradient"


def _stand_in(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    stand_in = nn.Parameter(
        torch.empty_like(
            parameter,
            dtype=dtype.to_complex() if parameter.is_complex() else dtype,
            requires_grad=False,
            memory_format=torch.contiguous_format,
        )
    )
    stand_in.__dict__.update(parameter.__dict__)  # some models set attributes on their parameters
    return stand_in


class NarrowStorage:
    """The stand-ins that are stored narrow, and the record of their reads.

    Args:
        dtype: The type of the widened tensors.

    Attributes:
        on_gradient: Called in a backward pass with (parameter, gradient, rows of dimension 0 to which the
            gradient belongs); None to ignore gradients.
        on_sums: Called instead with (parameter, Σwg of each row, Σwg of each column) where these follow from
            activations, without a gradient of the weight; None if gradients are needed. A backward pass can
            use it only if it was there in the forward pass, which then keeps the outputs of layers.
        ignored: The parameters whose gradients nobody reads, so that linear layers need not compute them.
        factors: {parameter: what its widened values are multiplied by}.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.on_gradient: Callable[[int, Tensor, Rows], None] | None = None
        self.on_sums: Callable[[int, Tensor, Tensor], None] | None = None
        self.ignored: Set[int] = frozenset()
        self.factors: Mapping[int, float] = {}
        self._stored: dict[int, tuple[int, Tensor]] = {}
        self._by_index: dict[int, Tensor] = {}
        self._latest: dict[tuple[int, bool], weakref.ref[Tensor]] = {}
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def add(self, index: int, stored: Tensor) -> None:
        """Register ``stored`` as the stand-in of parameter ``index``."""
        self._stored[id(stored)] = index, stored
        self._by_index[index] = stored

    def __bool__(self) -> bool:
        return bool(self._stored)

    def __deepcopy__(self, memo: dict[int, Any]) -> NarrowStorage:
        return self  # weak references to storages must not be copied

    def __contains__(self, index: int) -> bool:
        return index in self._by_index

    def clear(self) -> None:
        """Forget all stand-ins: none is stored narrow any more."""
        self.forget()
        self._stored.clear()
        self._by_index.clear()

    def index_of(self, value: Any) -> int | None:
        """Return the number of the parameter whose stand-in ``value`` is, or None."""
        entry = self._stored.get(id(value))
        return None if entry is None else entry[0]

    def read(self, value: Any) -> Any:
        """Return ``value``, widened if it is a narrow stand-in. Reads return one object while it lives."""
        index = self.index_of(value)
        if index is None or value.dtype == self.dtype:
            return value
        key = index, torch.is_grad_enabled()
        latest = self._latest.get(key)
        wide = None if latest is None else latest()
        if wide is None:
            wide = _Read.apply(value, index, self)
            wide.__dict__.update(value.__dict__)  # some models set attributes on their parameters
            self._latest[key] = weakref.ref(wide)
        return wide

    def widen(self, index: int) -> Tensor:
        """Return parameter ``index`` in the wide type, and record that its storage holds this parameter."""
        wide = self.widened(index, self._by_index[index].detach())
        storage = wide.untyped_storage()
        # The weak reference keeps another storage from getting the same address.
        self._storages[storage._cdata] = index, StorageWeakRef(storage)
        return wide

    def widened(self, index: int, values: Tensor) -> Tensor:
        """Return stored values of parameter ``index`` in the wide type."""
        wide = values.to(self.dtype)
        return wide * self.factors[index] if index in self.factors else wide

    def forget(self) -> None:
        """Forget all reads, before another forward pass."""
        self._latest.clear()
        self._storages.clear()

    def send(self, index: int, gradient: Tensor, rows: Rows = slice(None)) -> None:
        """Pass a gradient to ``on_gradient``."""
        if self.on_gradient is not None:
            self.on_gradient(index, gradient, rows)

    def not_saved_for_backward(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the graph does not keep widened tensors."""
        if not self or self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            # Detached: otherwise the graph would refer to itself through the tensor that the hook gets.
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
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self.widen(index).as_strided(size, stride, offset)


class _NarrowParameters(dict[str, Any]):
    """The ``_parameters`` of a module; narrow stand-ins are widened when they are read."""

    def __init__(self, items: dict[str, Any], narrow: NarrowStorage) -> None:
        super().__init__(items)
        self._narrow = narrow

    def __getitem__(self, key: str) -> Any:
        return self._narrow.read(super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        return self._narrow.read(super().get(key, default))

    def values(self) -> Any:
        return (self._narrow.read(value) for value in super().values())

    def items(self) -> Any:
        return ((key, self._narrow.read(value)) for key, value in super().items())

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Return wide parameters of their own: a model may copy its modules in a forward pass."""
        return {
            key: None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
            for key, value in self.items()
        }

    def stored(self, key: str) -> Any:
        """Return the stand-in as it is stored."""
        return super().get(key)


def _forward_by_rows(
    module: nn.Module, parameters: _NarrowParameters, narrow: NarrowStorage
) -> Callable[[Tensor], Tensor] | None:
    """Return a forward function that widens a few rows at a time; None if there is none for ``module``."""
    if "forward" in module.__dict__:
        return None
    stored = parameters.stored("weight")
    index = narrow.index_of(stored)
    if index is None or stored.ndim != 2 or stored.numel() <= CHUNK // 4:
        return None
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # of transformers: transposed
    if type(module) is nn.Linear or is_conv1d:

        def linear(x: Tensor) -> Tensor:
            bias = parameters["bias"]
            if x.dtype != narrow.dtype:
                weight = parameters["weight"]
                return F.linear(x, weight.T if is_conv1d else weight, bias)
            out: Tensor = _Product.apply(x, stored, bias, index, narrow, is_conv1d)
            return out

        return linear
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        padding = module.padding_idx

        def embedding(x: Tensor) -> Tensor:
            out: Tensor = _Embedding.apply(stored, x, index, narrow, padding)
            return out

        return embedding
    return None


def _row_slices(stored: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, stored[0].numel()))
    return [slice(a, min(a + step, len(stored))) for a in range(0, len(stored), step)]


class _Read(torch.autograd.Function):
    """The whole tensor, widened."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, index: int, narrow: NarrowStorage) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.index, ctx.narrow = index, narrow
        with torch._C.DisableTorchFunction():
            return narrow.widen(index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:
        if gradient is not None:
            ctx.narrow.send(ctx.index, gradient)
        return None, None, None


class _Product(torch.autograd.Function):
    """x · weightᵀ + bias (transposed: x · weight + bias), a few rows of the weight at a time.

    With y = x·Wᵀ, δ the gradient of y and g that of W, Σⱼ Wᵢⱼgᵢⱼ = Σₜ δₜᵢyₜᵢ and Σᵢ Wᵢⱼgᵢⱼ = Σₜ xₜⱼ(δW)ₜⱼ:
    sums over rows and columns need no gradient of the weight. The output, which what follows mostly keeps
    too, gives y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stored: Tensor,
        bias: Tensor | None,
        index: int,
        narrow: NarrowStorage,
        transposed: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.stored, ctx.index, ctx.narrow, ctx.transposed = stored.detach(), index, narrow, transposed
        with torch._C.DisableTorchFunction():
            flat = x.reshape(-1, stored.shape[0 if transposed else 1])
            size = stored.shape[1 if transposed else 0]
            # No view is returned, so that the model may change the output in place.
            out = flat.new_zeros(*x.shape[:-1], size)
            of_rows = out.view(-1, size)
            for rows in _row_slices(stored):
                weight = narrow.widened(index, stored[rows])
                if transposed:
                    of_rows.addmm_(flat[:, rows], weight)
                else:
                    torch.mm(flat, weight.T, out=of_rows[:, rows])
            if bias is not None:
                out += bias
            ctx.out = None if narrow.on_sums is None else out.detach()
            ctx.bias = None if bias is None else bias.detach()
            ctx.version = out._version
            return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None, None
        (x,) = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        of_weight = of_weight and ctx.index not in ctx.narrow.ignored
        with torch._C.DisableTorchFunction():
            flat = x.reshape(-1, ctx.stored.shape[0 if ctx.transposed else 1])
            gradient = gradient.reshape(len(flat), -1)
            # an output that the model changed in place is not what the layer computed
            by_sums = of_weight and ctx.out is not None and ctx.out._version == ctx.version
            by_sums = by_sums and ctx.narrow.on_sums is not None
            input_gradient = torch.zeros_like(flat) if of_input or by_sums else None
            for rows in _row_slices(ctx.stored):
                if input_gradient is not None:
                    weight = ctx.narrow.widened(ctx.index, ctx.stored[rows])
                    if ctx.transposed:
                        torch.mm(gradient, weight.T, out=input_gradient[:, rows])
                    else:
                        input_gradient.addmm_(gradient[:, rows], weight)
                if of_weight and not by_sums:
                    of_rows = flat[:, rows].T @ gradient if ctx.transposed else gradient[:, rows].T @ flat
                    ctx.narrow.send(ctx.index, of_rows, rows)
            if by_sums and input_gradient is not None:
                out = ctx.out.reshape(gradient.shape)
                products = gradient * (out if ctx.bias is None else out - ctx.bias)
                wide = wide_dtype(out.device)
                of_outputs = products.sum(0, dtype=wide)
                of_inputs = (flat * input_gradient).sum(0, dtype=wide)
                sums = (of_inputs, of_outputs) if ctx.transposed else (of_outputs, of_inputs)
                ctx.narrow.on_sums(ctx.index, *sums)
            bias_gradient = gradient.sum(0) if of_bias else None
            if not of_input or input_gradient is None:
                return None, None, bias_gradient, None, None, None
            return input_gradient.view(x.shape), None, bias_gradient, None, None, None


class _Embedding(torch.autograd.Function):
    """The rows that ``ids`` select; only these have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, stored: Tensor, ids: Tensor, index: int, narrow: NarrowStorage, padding: int | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ids, ctx.index, ctx.narrow, ctx.padding = ids, index, narrow, padding
        with torch._C.DisableTorchFunction():
            return narrow.widened(index, F.embedding(ids, stored))

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
                ctx.narrow.send(ctx.index, sums, rows)
        return None, None, None, None, None
