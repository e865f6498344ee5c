"""Attaching a parametrization to a module and detaching it without leaving a trace.

torch's ``remove_parametrizations`` deletes the weight's property from the module's class. A deep copy shares
that class, so folding a copy would break the original. It also turns frozen weights into buffers and forgets
the order of the parameters. Here a class that may be shared is never edited. What a normalised module does
beyond a plain one stands in methods of its class, not in hooks, and goes when the class goes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

from normwise.normalization._kernels import has_readable_values

__all__ = ["WatchedParametrization", "attach", "chains", "detach", "drop_load_hooks"]

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class WatchedParametrization(nn.Module):
    """A parametrization that notices when a weight that it returned was changed in place.

    ``module.weight`` is computed anew at each access, so whatever ``nn.init.normal_(module.weight)`` or
    ``module.weight.data.normal_()`` writes is lost. A tensor that was returned outside of the module's
    forward is therefore kept until the next access, where its version counter and, on a CPU, a checksum show
    whether it was written to.
    """

    label: str  # the weight's name in error messages
    remedy: str  # what to do instead of writing to the weight
    old_keys = False  # whether load_state_dict accepts the keys of torch's older, hook-based weight_norm
    attached = False  # to a module: from then on, assigning to the weight calls `right_inverse`

    def __init__(self) -> None:
        super().__init__()
        self.position = 0  # of the parameter among its module's, for `detach` to restore
        self.in_forward = False  # of the module
        self._returned: tuple[Tensor, int, object, int | None] | None = None
        self._lost = False

    def watch(self, weight: Tensor) -> None:
        """Keep ``weight``, about to be returned, unless the module's forward asked for it."""
        if self.in_forward or type(weight) is not Tensor or weight.is_inference():
            return
        self._returned = weight, weight._version, weight.grad_fn, _checksum(weight)

    def check(self) -> None:
        """Raise if the weight that was returned last has been changed in place, and stop watching it."""
        written = self._was_written()
        self.forget()
        if written:
            raise RuntimeError(
                f"{self.label} was changed in place (as nn.init functions do), but it is computed from other "
                f"tensors and the change would be lost: {self.remedy}, or initialise before converting"
            )

    def forget(self) -> None:
        """Stop watching the weight that was returned last."""
        self._returned, self._lost = None, False

    def _was_written(self) -> bool:
        if self._returned is None:
            return self._lost
        weight, version, grad_fn, checksum = self._returned
        if weight._version != version:
            return weight.grad_fn is grad_fn  # autograd may write: weight.mul_(2) has a gradient
        return checksum is not None and _checksum(weight) not in (checksum, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) cannot hold tensors of a graph, but must not swallow the error.
        return {**self.__dict__, "in_forward": False, "_returned": None, "_lost": self._was_written()}


def chains(module: nn.Module) -> nn.ModuleDict:
    """Return the lists of parametrizations on the tensors of ``module``, by the tensor's name."""
    lists = getattr(module, "parametrizations", None)
    return lists if isinstance(lists, nn.ModuleDict) else nn.ModuleDict()


def attach(module: nn.Module, name: str, parametrization: WatchedParametrization) -> None:
    """Put ``parametrization`` on the parameter ``name`` of ``module``."""
    parametrization.position = list(module._parameters).index(name)
    if parametrize.is_parametrized(module):
        _renew_class(module)
    with torch.no_grad():
        parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    _add_methods(module)
    _list_of(module, name).register_state_dict_pre_hook(_check_before_saving)
    parametrization.attached = True


def detach(module: nn.Module, name: str) -> None:
    """Replace the parametrized tensor ``name`` of ``module`` by a plain parameter of its present value."""
    parametrizations = _list_of(module, name)
    first = parametrizations[0]
    was_training = parametrizations.training
    parametrizations.eval()  # spectral norm: no further power iteration
    with torch.no_grad():
        value = parametrizations().detach().clone()
    parametrizations.train(was_training)
    trainable = any(p.requires_grad for p in parametrizations.parameters(recurse=False))
    old = parametrizations._parameters.get("original")
    if old is not None:  # keep the parameter that the optimizer knows
        old.data = value
    parameter = nn.Parameter(value, trainable) if old is None else old
    del chains(module)[name]
    _renew_class(module)
    _put_at(module, name, parameter, getattr(first, "position", None))
    drop_load_hooks(module, name)


def drop_load_hooks(module: nn.Module, name: str) -> None:
    """Remove the load_state_dict hooks that torch's own norms leave on the module for ``name``."""
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        wrapped = getattr(hook, "hook", hook)
        spectral = isinstance(wrapped, SpectralNormLoadStateDictPreHook) and wrapped.fn.name == name
        if spectral or getattr(wrapped, "__name__", "") == "_weight_norm_compat_hook":
            del module._load_state_dict_pre_hooks[key]


def _checksum(weight: Tensor) -> int | None:
    """Return a number that changes with the bits of ``weight``, or None where its values cannot be read."""
    if not has_readable_values(weight) or weight.element_size() not in _SAME_SIZE:
        return None
    return int(weight.detach().view(_SAME_SIZE[weight.element_size()]).sum())


def _list_of(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    parametrizations = chains(module)[name]
    assert isinstance(parametrizations, parametrize.ParametrizationList)
    return parametrizations


def _watched(module: nn.Module) -> list[tuple[str, WatchedParametrization]]:
    return [
        (name, parametrization)
        for name, chain in chains(module).items()
        for parametrization in chain.children()
        if isinstance(parametrization, WatchedParametrization)
    ]


def _check_before_saving(parametrizations: nn.Module, *_: Any) -> None:
    """state_dict pre-hook: a checkpoint must not miss what nn.init wrote."""
    for parametrization in parametrizations.children():
        if isinstance(parametrization, WatchedParametrization):
            parametrization.check()


def _renew_class(module: nn.Module) -> None:
    """Give ``module`` its plain class or, if still parametrized, a class that no other module shares."""
    lists = chains(module)
    plain: type[nn.Module] = type(module).__bases__[0]
    module.__class__ = plain
    if not len(lists):
        delattr(module, "parametrizations")
        return
    parametrize._inject_new_class(module)
    for name in lists:
        parametrize._inject_property(module, name)
    if _watched(module):
        _add_methods(module)


def _add_methods(module: nn.Module) -> None:
    """Add what a normalised module does beyond a plain one to its class, which no other module may share."""
    renewed: Any = type(module)
    plain: type[nn.Module] = renewed.__bases__[0]

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        watched = [parametrization for _, parametrization in _watched(self)]
        for parametrization in watched:
            parametrization.in_forward = True
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            for parametrization in watched:
                parametrization.in_forward = False
            if isinstance(self, nn.RNNBase):
                # It would keep the computed weights, and could then not be copied.
                flat = self._flat_weights
                self._flat_weights = [torch.empty(0) if w is not None and not w.is_leaf else w for w in flat]

    def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parametrization in _watched(self):
            old = [f"{prefix}{name}_g", f"{prefix}{name}_v"]
            if parametrization.old_keys and all(key in state_dict for key in old):
                for k, key in enumerate(old):
                    state_dict[f"{prefix}parametrizations.{name}.original{k}"] = state_dict.pop(key)
        plain._load_from_state_dict(self, state_dict, prefix, *args)

    renewed.forward, renewed._load_from_state_dict = forward, _load_from_state_dict


def _put_at(module: nn.Module, name: str, parameter: nn.Parameter, position: int | None) -> None:
    """Register ``parameter`` at ``position``, so that a saved optimizer finds its parameters in order."""
    module.register_parameter(name, parameter)
    if position is not None:
        for later in [key for key in module._parameters if key != name][position:]:
            module._parameters[later] = module._parameters.pop(later)
