"""Attaching a parametrization to a module and taking it off again, without a trace.

torch's ``remove_parametrizations`` deletes the attribute from the class, which a deep copy shares: folding a
copy would break the original. It turns frozen weights into buffers, and forgets the order of parameters.
Here the class is never edited once it may be shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

__all__ = [
    "LegacyKeys",
    "WatchedParametrization",
    "attach",
    "chains",
    "detach",
    "drop_hooks",
    "forget_after_forward",
]


class WatchedParametrization(nn.Module):
    """A parametrization that notices when the weight that it returned was changed in place.

    ``module.weight`` is computed; what ``nn.init.normal_(module.weight)`` fills is lost with it. A tensor
    that was returned outside of the module's own forward is kept until the next access, where its version
    counter tells whether it was written to.
    """

    what: str
    position: int  # of the parameter among its module's, to be restored by `detach`

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self._returned: tuple[Tensor, int, object] | None = None
        self._lost = False

    def watch(self, weight: Tensor) -> None:
        """Keep ``weight``, about to be returned, under observation."""
        if type(weight) is Tensor and not weight.is_inference():
            self._returned = weight, weight._version, weight.grad_fn

    def check(self) -> None:
        """Raise if what was returned last was changed in place, other than by autograd's own operations."""
        if self._was_written():
            self.forget()
            raise RuntimeError(
                f"{self.what} was changed in place (as nn.init functions do), but it is computed from other "
                "tensors and the change would be lost: assign the new values, module.weight = tensor, or "
                "initialise before converting"
            )

    def _was_written(self) -> bool:
        if self._returned is None:
            return self._lost
        weight, version, grad_fn = self._returned
        return self._lost or (weight._version != version and weight.grad_fn is grad_fn)

    def forget(self) -> None:
        """Stop observing what was returned last."""
        self._returned, self._lost = None, False

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) cannot hold tensors of a graph, but must not swallow the error.
        return {**self.__dict__, "_returned": None, "_lost": self._was_written()}


def chains(module: nn.Module) -> nn.ModuleDict:
    """Return the lists of parametrizations on the tensors of ``module``, by the tensor's name."""
    lists = getattr(module, "parametrizations", None)
    return lists if isinstance(lists, nn.ModuleDict) else nn.ModuleDict()


class LegacyKeys:
    """Reads the keys ``weight_g`` and ``weight_v`` of torch's hook-based weight_norm; can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename the keys in place: a pre-hook of load_state_dict."""
        old = [f"{prefix}{self.name}_g", f"{prefix}{self.name}_v"]
        if all(key in state_dict for key in old):
            for k, key in enumerate(old):
                state_dict[f"{prefix}parametrizations.{self.name}.original{k}"] = state_dict.pop(key)


def forget_after_forward(module: nn.Module, *_: Any) -> None:
    """Forward hook: weights that the module's own forward asked for need no watch, and no memory."""
    if torch.compiler.is_compiling():
        return
    for chain in chains(module).values():
        for parametrization in chain.children():
            if isinstance(parametrization, WatchedParametrization):
                parametrization.forget()
    if isinstance(module, nn.RNNBase):
        # It would keep the computed weights, and with them be impossible to copy; it asks for them anew.
        flat = module._flat_weights
        module._flat_weights = [torch.empty(0) if w is not None and not w.is_leaf else w for w in flat]


def _check_before_saving(parametrizations: nn.Module, *_: Any) -> None:
    """state_dict pre-hook: a checkpoint must not miss what nn.init wrote."""
    for parametrization in parametrizations.children():
        if isinstance(parametrization, WatchedParametrization):
            parametrization.check()


def attach(module: nn.Module, name: str, parametrization: WatchedParametrization) -> None:
    """Put ``parametrization`` on the parameter ``name`` of ``module``."""
    parametrization.position = list(module._parameters).index(name)
    if parametrize.is_parametrized(module):
        _take_own_class(module)
    with torch.no_grad():
        parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    _list_of(module, name).register_state_dict_pre_hook(_check_before_saving)
    if forget_after_forward not in module._forward_hooks.values():
        module.register_forward_hook(forget_after_forward)


def detach(module: nn.Module, name: str) -> None:
    """Make the parametrized tensor ``name`` of ``module`` a plain parameter of its present value."""
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
    _take_own_class(module)
    _put_at(module, name, parameter, getattr(first, "position", None))
    drop_hooks(module, name)


def _list_of(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    parametrizations = chains(module)[name]
    assert isinstance(parametrizations, parametrize.ParametrizationList)
    return parametrizations


def _take_own_class(module: nn.Module) -> None:
    """Give ``module`` a class of its own with the properties that it needs, or its plain class back."""
    modules = chains(module)
    module.__class__ = type(module).__bases__[0]
    if len(modules):
        parametrize._inject_new_class(module)
        for name in modules:
            parametrize._inject_property(module, name)
    else:
        delattr(module, "parametrizations")


def _put_at(module: nn.Module, name: str, parameter: nn.Parameter, position: int | None) -> None:
    """Register ``parameter`` at ``position``, so that a saved optimizer finds its parameters in order."""
    module.register_parameter(name, parameter)
    if position is not None:
        for later in [key for key in module._parameters if key != name][position:]:
            module._parameters[later] = module._parameters.pop(later)


def drop_hooks(module: nn.Module, name: str) -> None:
    """Remove what `attach`, our weight_norm and torch's own norms left on the module for ``name``."""
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        wrapped = getattr(hook, "hook", hook)
        ours = isinstance(wrapped, LegacyKeys) and wrapped.name == name
        # torch's remove_spectral_norm misses its own hook, which is wrapped.
        spectral = isinstance(wrapped, SpectralNormLoadStateDictPreHook) and wrapped.fn.name == name
        if ours or spectral or getattr(wrapped, "__name__", "") == "_weight_norm_compat_hook":
            del module._load_state_dict_pre_hooks[key]
    if not parametrize.is_parametrized(module):
        for key, forward_hook in list(module._forward_hooks.items()):
            if forward_hook is forget_after_forward:
                del module._forward_hooks[key]
