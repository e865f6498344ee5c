"""Stand-ins for everything a model owns that a probe may change, and the way back.

The model's own tensors are never written: its modules point at stand-ins while the probe runs, and at
their own again afterwards. So values, gradients, hooks on parameters and ``requires_grad`` cannot change.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from normwise.invariance.narrow import NarrowParameters, Reads, by_rows

__all__ = ["Swap", "eager", "preserved_random_state"]

_CONTAINERS = (list, dict, set)


class Swap:
    """The model's modules with stand-ins for parameters and buffers, until :meth:`restore`.

    Args:
        model: The model.
        dtype: The floating-point type that modules see.
        narrow: Whether stand-ins may be stored in float32 and widened at each read.

    Attributes:
        names: The name of each parameter, tied ones once, as ``named_parameters`` gives them.
        originals: The model's own parameters.
        parameters: Their stand-ins, uninitialised, of type ``dtype`` or float32.
        reads: Those that are stored in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, narrow: bool = True) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
        self.names = [name for name, _ in named]
        self.originals: list[Tensor] = [p for _, p in named]
        self.reads = Reads(dtype)
        held = _held_elsewhere(model)
        self.parameters = []
        for index, p in enumerate(self.originals):
            narrower = narrow and dtype == torch.float64 and p.dtype != dtype and id(p) not in held
            self.parameters.append(_stand_in(p, torch.float32 if narrower else dtype))
            if narrower:
                self.reads.add(index, self.parameters[index])
        self._dtype = dtype
        self._by_id = {id(p): q for p, q in zip(self.originals, self.parameters, strict=True)}
        self._snapshot = [(m, dict(m.__dict__), _copies(m.__dict__)) for m in model.modules()]
        self._flags = [m.training for m, _, _ in self._snapshot]

    def install(self) -> None:
        """Point every module at the stand-ins, with fresh clones of its buffers and other tensors."""
        self.restore()
        self.reads.forget()
        clones: dict[int, Tensor] = {}
        for (module, attributes, _), training in zip(self._snapshot, self._flags, strict=True):
            module.__dict__["training"] = training
            for key, value in attributes.items():
                if key == "_parameters" and self.reads:
                    own = {name: self._replaced(item, clones) for name, item in value.items()}
                    self._install_narrow(module, NarrowParameters(own, self.reads))
                elif key in ("_parameters", "_buffers"):
                    value.update({name: self._replaced(item, clones) for name, item in value.items()})
                elif isinstance(value, Tensor):
                    module.__dict__[key] = self._replaced(value, clones)
                elif type(value) is list:
                    value[:] = [self._replaced(item, clones) for item in value]
                elif type(value) is tuple and any(isinstance(item, Tensor) for item in value):
                    module.__dict__[key] = tuple(self._replaced(item, clones) for item in value)
                elif type(value) is dict:
                    value.update({name: self._replaced(item, clones) for name, item in value.items()})
            if isinstance(module, nn.RNNBase):
                module.__dict__["dropout"] = 0.0  # its dropout is inside one native function
            if isinstance(module, nn.SyncBatchNorm):  # statistics of this process: the others do not probe
                module.__dict__["forward"] = nn.BatchNorm2d.forward.__get__(module)

    def _install_narrow(self, module: nn.Module, parameters: NarrowParameters) -> None:
        module.__dict__["_parameters"] = parameters
        forward = by_rows(module, parameters, self.reads)
        if forward is not None:
            module.__dict__["forward"] = forward

    def train(self, model: nn.Module) -> None:
        """Switch to training, as the model itself does it, in every later :meth:`install`."""
        model.train()
        self._flags = [m.training for m, _, _ in self._snapshot]
        self.restore()

    def restore(self) -> None:
        """Give every module back the very objects that it had, containers with what was in them."""
        for module, attributes, copies in self._snapshot:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, copy in copies.items():
                container: Any = attributes[key]
                if isinstance(container, list):
                    container[:] = copy
                else:
                    container.clear()
                    container.update(copy)

    def _replaced(self, value: Any, clones: dict[int, Tensor]) -> Any:
        """Return the stand-in of a tensor: a parameter's, or a clone; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._by_id:
            return self._by_id[id(value)]
        if value.grad_fn is not None or isinstance(value, nn.Parameter):
            return value
        if id(value) not in clones:
            kept = value.detach().clone()
            clones[id(value)] = kept.to(self._dtype) if kept.is_floating_point() else kept
        return clones[id(value)]


def _held_elsewhere(model: nn.Module) -> set[int]:
    """Return the ids of tensors that modules hold beside their parameters, as an LSTM does in a list."""
    held: set[int] = set()
    for module in model.modules():
        for key, value in module.__dict__.items():
            if key == "_parameters":
                continue
            items = (
                value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
            )
            held |= {id(item) for item in items if isinstance(item, Tensor)}
    return held


def _copies(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v.copy() for k, v in attributes.items() if isinstance(v, _CONTAINERS)}


def _stand_in(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    kept = nn.Parameter(
        torch.empty_like(parameter, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
    )
    kept.__dict__.update(parameter.__dict__)  # some models read settings from attributes of their parameters
    return kept


def check_model(model: Any) -> None:
    """Raise an error, in one line, if ``model`` cannot be probed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(
            "model contains a scripted module, whose parameters cannot be swapped: give the eager model"
        )
    trainable = False
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of a lazy module has no shape yet: run the model on one batch first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device: move the model to a real device first"
            )
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"parameter {name!r} is a DTensor: find the invariances before sharding the model"
            )
        trainable = trainable or parameter.requires_grad
    if not trainable:
        raise ValueError(
            "model has no trainable parameter (none with requires_grad=True): unfreeze what will be trained"
        )


@contextlib.contextmanager
def preserved_random_state(devices: set[torch.device]) -> Iterator[None]:
    """Keep torch's random state (of the CPU and of ``devices``), Python's and numpy's as they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that models use
    cuda = [d for d in devices if d.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - see above


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the compiled parts of ``model`` run uncompiled."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    if compiled or "torch._dynamo" in sys.modules:
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
