"""Changes to the torch functions that a model calls: the eps of norms, dropout, random draws, precision.

A model may define its eps as a module attribute, as an argument or as a literal. Each of them reaches a torch
function in the end, so one :class:`torch.overrides.TorchFunctionMode` sees all of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["TorchOverrides"]

# A larger constant is part of the function, not a guard against division by zero.
_LARGEST_EPS = 1e-2
# A larger tensor (a mask, positions) is no constant, nor is one of several values above the usual eps.
_LARGEST_CONSTANT = 4096
# A constant above this is usually no eps, so that results are checked at its real value.
_USUAL_EPS = 1e-4

# The position of the argument eps of each function.
_EPS_ARGUMENT: dict[Callable[..., Any], int] = {
    F.layer_norm: 4,
    F.rms_norm: 3,
    F.group_norm: 4,
    F.batch_norm: 7,
    F.instance_norm: 7,
    F.normalize: 3,
    F.cosine_similarity: 3,
    torch.layer_norm: 4,
    torch.rms_norm: 3,
    torch.group_norm: 4,
    torch.batch_norm: 7,
    torch.instance_norm: 7,
    torch.native_layer_norm: 4,
    torch.native_group_norm: 7,
    torch.native_batch_norm: 7,
}
_MISSING_EPS_IS_MACHINE_EPS = {F.rms_norm, torch.rms_norm}
_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    torch.clamp,
    torch.clamp_min,
    torch.clip,
    Tensor.clamp,
    Tensor.clamp_,
    Tensor.clip,
    Tensor.clamp_min,
    Tensor.clamp_min_,
    torch.maximum,
    Tensor.maximum,
    torch.fmax,
    Tensor.fmax,
    torch.hypot,
    Tensor.hypot,
}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__, Tensor.clamp_, Tensor.clamp_min_}
_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
}
# The mode is disabled inside of composite functions, so their dropout is set by an argument.
_DROPOUT_ARGUMENT: dict[Callable[..., Any], str] = {
    F.multi_head_attention_forward: "dropout_p",
    F.scaled_dot_product_attention: "dropout_p",
}
_BERNOULLI = {torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_}
_DRAWS = {torch.rand, torch.rand_like, Tensor.uniform_, *_BERNOULLI}
# Other functions whose draws a model may branch on.
_NUMBERS = {torch.randint, torch.randn, torch.normal, torch.multinomial, Tensor.random_, Tensor.normal_}
_TRUTH = {Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero}
_CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_COMPLEX_CASTS = {getattr(Tensor, name) for name in ("cfloat", "cdouble", "chalf")}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}
# Functions whose arguments or results may be changed.
_CHANGED = {
    *_DROPOUTS,
    *_DROPOUT_ARGUMENT,
    *_EPS_ARGUMENT,
    *_ADDITIONS,
    *_DRAWS,
    *_NUMBERS,
    *_CASTS,
    *_COMPLEX_CASTS,
}


class TorchOverrides(TorchFunctionMode):
    """A context in which every eps is multiplied by a factor, dropout is off, and all floats have one type.

    Args:
        eps_factor: The factor of every eps; 1 leaves the model unchanged.
        dtype: The type that replaces the target of every cast to a floating-point type.
        keep_branches: Whether to keep every layer and branch that the model drops with a probability below
            one half. Stochastic depth draws one number per sample or per layer and compares it with a rate:
            such a draw becomes one half, and a Bernoulli draw becomes its more likely value.
        keep_layers: Whether to do the same with single draws only.
        shrink_constants: Whether a constant from 1e-4 to 0.01 that is added to a value, or clamps it, counts
            as an eps. Smaller ones always do.

    Attributes:
        fixed_draws: Whether draws of several numbers were replaced.
        fixed_single_draws: Whether a single draw was replaced.
        draws_single_numbers: Whether the model has drawn a single number.
        differentiates: Whether the model computes gradients by itself.
        branches_on_draws: Whether the model branches (``if``) on a single draw: it skips layers.
        shrunk_constants: Whether such a constant counted as an eps.
        largest_result: The number of values of the largest tensor that a function returned.

    Example:
        >>> tiny = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
        >>> with TorchOverrides(1e-8, torch.float64):
        ...     round(F.layer_norm(tiny, (2,))[0, 0].item(), 6)
        1.0
    """

    def __init__(
        self,
        eps_factor: float,
        dtype: torch.dtype,
        keep_branches: bool = True,
        keep_layers: bool = True,
        shrink_constants: bool = True,
    ) -> None:
        super().__init__()
        self.keep_branches = keep_branches
        self.keep_layers = keep_layers
        self.fixed_draws = self.fixed_single_draws = self.branches_on_draws = False
        self._of_draws: dict[int, Tensor] = {}  # values computed from single draws
        self._constant_factor = eps_factor if shrink_constants else 1.0
        self.shrunk_constants = False
        self.largest_result = 0
        self.differentiates = self.draws_single_numbers = False
        self.eps_factor = eps_factor
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        self.differentiates = self.differentiates or func in _DERIVATIVES
        if func not in _CHANGED and not self._of_draws and not _names_a_type(args, named):
            return self._noting_size(func(*args, **named))  # most calls
        if func in _DROPOUTS:
            return args[0] if args else named["input"]
        if func in _CASTS:
            return args[0].to(self.dtype.to_complex() if args[0].is_complex() else self.dtype)
        if func in _COMPLEX_CASTS:
            return args[0].to(self.dtype.to_complex())
        args = tuple(self._one_type(a) for a in args)
        named = {key: self._one_type(a) for key, a in named.items()}
        if func in _EPS_ARGUMENT:
            args, named = self._with_shrunk_eps(func, args, named)
        elif func in _ADDITIONS and _has_gradient((*args, *named.values())):
            kept = 1 if func in _IN_PLACE else 0  # the tensor that is written
            args = (*args[:kept], *(self._shrink(a) for a in args[kept:]))
            named = {k: v if k == "alpha" else self._shrink(v) for k, v in named.items()}
        elif func in _DROPOUT_ARGUMENT:
            args, named = _with_argument(func, args, named, _DROPOUT_ARGUMENT[func], 0.0)
        result = self._noting_size(func(*args, **named))
        if func in _NUMBERS and isinstance(result, Tensor):
            self.draws_single_numbers = self.draws_single_numbers or result.numel() == 1
        if func in _DRAWS and isinstance(result, Tensor):
            is_single = result.numel() == 1
            self.draws_single_numbers = self.draws_single_numbers or is_single
            if self.keep_branches or (is_single and self.keep_layers):
                fixed = _fix_draw(func, result, args, named)
                self.fixed_draws = self.fixed_draws or (fixed and not is_single)
                self.fixed_single_draws = self.fixed_single_draws or (fixed and is_single)
                self._of_draws.update({id(result): result} if is_single else {})
        elif self._of_draws and any(id(a) in self._of_draws for a in args):
            self.branches_on_draws = self.branches_on_draws or func in _TRUTH
            if isinstance(result, Tensor) and result.numel() == 1:
                self._of_draws[id(result)] = result
        return result

    def _noting_size(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            self.largest_result = max(self.largest_result, result.numel())
        return result

    def _one_type(self, argument: Any) -> Any:
        if not isinstance(argument, torch.dtype):
            return argument
        if argument in _FLOATS:
            return self.dtype
        return self.dtype.to_complex() if argument in _COMPLEX else argument

    def _shrink(self, argument: Any) -> Any:
        """Return ``argument``, times the factor if it is a small positive constant."""
        if isinstance(argument, Tensor):
            if argument.requires_grad or not argument.is_floating_point() or not argument.numel():
                return argument
            if argument.layout != torch.strided or argument.is_nested or argument.numel() > _LARGEST_CONSTANT:
                return argument
            low, high = (float(bound) for bound in argument.aminmax())
            if low != high or (argument.numel() > 1 and high > _USUAL_EPS):
                return argument
        elif isinstance(argument, (float, np.floating)):
            high = float(argument)
        else:
            return argument
        if not 0.0 < high <= _LARGEST_EPS:
            return argument
        if high <= _USUAL_EPS:
            return argument * self.eps_factor
        self.shrunk_constants = self._constant_factor != 1.0 or self.shrunk_constants
        return argument * self._constant_factor

    def _with_shrunk_eps(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = _EPS_ARGUMENT[func]
        eps = args[place] if len(args) > place else named.get("eps", _default_eps(func))
        if eps is None and func in _MISSING_EPS_IS_MACHINE_EPS:
            eps = torch.finfo(self.dtype).eps
        if not isinstance(eps, (int, float, np.floating)) or not math.isfinite(eps):
            return args, named
        eps = float(eps) * self.eps_factor
        if len(args) > place:
            return (*args[:place], eps, *args[place + 1 :]), named
        return args, {**named, "eps": eps}


def _fix_draw(func: Callable[..., Any], result: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Overwrite a draw that may decide on layers or branches by its likeliest value; return if it did."""
    with torch.no_grad():
        if func in _BERNOULLI:
            rate = named.get("p", args[1] if len(args) > 1 else 0.5 if func is Tensor.bernoulli_ else args[0])
            result.copy_(torch.as_tensor(rate) >= 0.5)
        elif result.numel() == 1 or (result.ndim > 1 and result.numel() == result.shape[0]):
            result.fill_(0.5)
        else:
            return False
    return True


def _names_a_type(args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    return torch.dtype in map(type, args) or torch.dtype in map(type, named.values())


def _has_gradient(args: tuple[Any, ...]) -> bool:
    """Return whether a sum depends on a parameter: elsewhere (a time, a mask) it guards no weight."""
    return not torch.is_grad_enabled() or any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _default_eps(func: Callable[..., Any]) -> float | None:
    """Return the default eps of ``func``."""
    if func in _MISSING_EPS_IS_MACHINE_EPS:
        return None
    defaults = {F.normalize: 1e-12, F.cosine_similarity: 1e-8}
    return defaults.get(func, 1e-5)


def _with_argument(
    func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``func`` with the argument ``name`` set to ``value``."""
    if func is F.scaled_dot_product_attention:  # a builtin has no signature
        if len(args) > 4:
            return (*args[:4], value, *args[5:]), named
        return args, {**named, name: value}
    bound = inspect.signature(func).bind(*args, **named)
    bound.arguments[name] = value
    return bound.args, bound.kwargs
