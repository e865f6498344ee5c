"""The weight-normalisation family on a module, as torch parametrizations.

``module.weight`` is computed from trainable originals at each access. Layout of a state dict, the same for
all three members and the same as torch's own ``weight_norm``:

- with a gain: ``parametrizations.weight.original0`` (the gain, one number per unit, size 1 in every dimension
  but ``dim``; of shape ``()`` for the whole tensor) and ``parametrizations.weight.original1`` (the weight);
- without: ``parametrizations.weight.original`` (the weight).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.normalization import functional
from normwise.normalization.attachment import LegacyKeys, WatchedParametrization, attach
from normwise.normalization.exact import Formula, natural_gain
from normwise.normalization.kernels import normalize
from normwise.normalization.modes import is_transformed

__all__ = [
    "CenteredWeightNorm",
    "NormalizedWeight",
    "WeightNorm",
    "WeightStandardization",
    "centered_weight_norm",
    "weight_norm",
    "weight_standardization",
]

M = TypeVar("M", bound=nn.Module)


class NormalizedWeight(WatchedParametrization):
    """A parametrization by a member of the family; the members are subclasses.

    Args:
        formula: What it computes.
        gain: Whether each unit has a trainable gain.
        what: How to call the weight in errors.
    """

    def __init__(self, formula: Formula, gain: bool, what: str) -> None:
        super().__init__()
        self.formula = formula
        self.gain = gain
        self.what = what

    def forward(self, *originals: Tensor) -> Tensor:
        """Return the weight, from (gain, weight) or (weight,)."""
        gain, weight = originals if self.gain else (None, originals[0])
        if torch.compiler.is_compiling() or is_transformed():
            return normalize(weight, gain, self.formula)
        self.check()
        out = normalize(weight, gain, self.formula)
        self.watch(out)
        return out

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return originals that give ``weight``, exactly or as nearly as the member can."""
        self.forget()
        if not self.gain:
            return weight
        gain = natural_gain(weight, self.formula)
        if gain.device.type != "meta" and bool((gain.isinf() & ~weight.isinf().any()).any()):
            raise ValueError(
                f"{self.what}: the norm of a unit exceeds the largest {gain.dtype}: "
                "scale the weight down or use a wider type"
            )
        return gain, weight

    def extra_repr(self) -> str:
        """Describe the parametrization in the module's repr."""
        eps = f", eps={self.formula.eps}" if self.formula.eps else ""
        return f"dim={self.formula.dim}, gain={self.gain}{eps}"


class WeightNorm(NormalizedWeight):
    """w = g·v/‖v‖ (see `weight_norm`)."""


class CenteredWeightNorm(NormalizedWeight):
    """w = g·(v − mean)/‖v − mean‖ (see `centered_weight_norm`)."""


class WeightStandardization(NormalizedWeight):
    """w = g·(v − mean)/std (see `weight_standardization`)."""


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """Reparametrize a weight as w = g·v/‖v‖: a drop-in for torch.nn.utils.parametrizations.weight_norm.

    Salimans & Kingma, "Weight Normalization", 2016 (arXiv:1602.07868), equation 2. The same signature,
    meaning of ``dim`` and state_dict keys as torch's (checkpoints load both ways, those of the older
    hook-based form too), exact at every scale, and zeros instead of NaN at a zero unit. The function of the
    module is preserved: g starts as ‖w‖. A unit that is all zero has no direction: it stays zero.

    Args:
        module: The module that owns the parameter; changed in place.
        name: The parameter's name in it.
        dim: The dimension that counts the units (0: output filters; 1 for transposed convolutions). None,
            and −1 as in torch: one norm of the whole tensor.

    Returns:
        ``module``.

    Raises:
        TypeError: The parameter is not of a real floating-point type.
        ValueError: No such parameter, already parametrized, ``dim`` out of range, or units of fewer than
            2 elements, which carry no direction.

    Example:
        >>> layer = weight_norm(nn.Linear(20, 40))
        >>> layer.parametrizations.weight.original0.shape, layer.parametrizations.weight.original1.shape
        (torch.Size([40, 1]), torch.Size([40, 20]))
    """
    install(module, name, build(module, name, "weight_norm", dim, gain=True))
    return module


def centered_weight_norm(module: M, name: str = "weight", dim: int | None = 0, gain: bool = True) -> M:
    """Reparametrize a weight as w = g·(v − mean)/‖v − mean‖ (without a gain: g = 1).

    Huang et al., "Centered Weight Normalization in Accelerating Training of Deep Neural Networks",
    ICCV 2017, equations 2 and 5. The mean of each unit is lost; with a gain, which starts as ‖w − mean‖,
    nothing else changes.

    Args:
        module: The module that owns the parameter; changed in place.
        name: The parameter's name in it.
        dim: The dimension that counts the units. None, and −1 as in torch: the whole tensor.
        gain: Whether each unit has a trainable gain.

    Returns:
        ``module``.

    Raises:
        TypeError: The parameter is not of a real floating-point type.
        ValueError: No such parameter, already parametrized, ``dim`` out of range, or units of fewer than
            3 elements, which carry no direction once centered.

    Example:
        >>> layer = centered_weight_norm(nn.Conv2d(8, 16, 3))
        >>> bool(layer.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """
    install(module, name, build(module, name, "centered_weight_norm", dim, gain))
    return module


def weight_standardization(
    module: M,
    name: str = "weight",
    dim: int | None = 0,
    gain: bool = False,
    eps: float = 0.0,
    fan_in_scale: bool = False,
) -> M:
    """Reparametrize a weight as w = g·(v − mean)/√(var + eps) (without a gain: g = 1), var biased.

    Qiao et al., 2019 (arXiv:1903.10520), equation 5. With ``fan_in_scale`` the scaled weight standardisation
    of normaliser-free networks: w/√fan_in (Brock et al., 2021, arXiv:2101.08692, equation 1).

    Args:
        module: The module that owns the parameter; changed in place.
        name: The parameter's name in it.
        dim: The dimension that counts the units. None, and −1 as in torch: the whole tensor.
        gain: Whether each unit has a trainable gain. It starts at the value that preserves the unit less its
            mean. Normaliser-free networks start it at 1:
            ``nn.init.ones_(module.parametrizations.weight.original0)``.
        eps: Added to the variance, for checkpoints that were trained with one. It breaks scale invariance.
        fan_in_scale: Whether to divide by √fan_in, the number of weights that reach one output.

    Returns:
        ``module``.

    Raises:
        TypeError: The parameter is not of a real floating-point type.
        ValueError: No such parameter, already parametrized, ``dim`` or ``eps`` out of range, or units of
            fewer than 3 elements, which carry no direction once centered.

    Example:
        >>> layer = weight_standardization(nn.Linear(20, 40))
        >>> bool((layer.weight.std(1, correction=0) - 1).abs().max() < 1e-6)
        True
    """
    install(module, name, build(module, name, "weight_standardization", dim, gain, eps, fan_in_scale))
    return module


def build(
    module: nn.Module,
    name: str,
    kind: str,
    dim: int | None,
    gain: bool,
    eps: float = 0.0,
    fan_in_scale: bool = False,
    label: str | None = None,
) -> NormalizedWeight:
    """Return the parametrization for a weight, or raise; change nothing.

    Arguments as for `weight_standardization`; ``label`` is how errors call the weight.
    """
    weight, what = _parameter(module, name, label)
    if dim == -1 and not isinstance(dim, bool):
        dim = None
    if kind == "weight_norm":
        return WeightNorm(functional.weight_norm_formula(weight, dim, what), gain, what)
    if kind == "centered_weight_norm":
        return CenteredWeightNorm(functional.centered_weight_norm_formula(weight, dim, what), gain, what)
    formula = functional.weight_standardization_formula(weight, dim, what, eps)
    if fan_in_scale:
        # A unit of a grouped transposed convolution spans the groups; each output sees one of them.
        groups = int(getattr(module, "groups", 1)) if getattr(module, "transposed", False) else 1
        formula = formula._replace(factor=groups**0.5)
    return WeightStandardization(formula, gain, what)


def install(module: nn.Module, name: str, parametrization: NormalizedWeight) -> None:
    """Put what `build` returned on the weight."""
    attach(module, name, parametrization)
    if isinstance(parametrization, WeightNorm) and parametrization.gain:
        module._register_load_state_dict_pre_hook(LegacyKeys(name))


def _parameter(module: nn.Module, name: str, label: str | None) -> tuple[nn.Parameter, str]:
    """Return the parameter and how errors call it, or raise where there is none to reparametrize."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
    what = f"{name if label is None else label!r} of {type(module).__name__}({module.extra_repr()})"
    hooked = any(getattr(hook, "name", None) == name for hook in module._forward_pre_hooks.values())
    if hooked or parametrize.is_parametrized(module, name):
        raise ValueError(f"{what} is parametrized already: fold it first")
    weight = module._parameters.get(name)
    if weight is None:
        own = sorted(key for key, value in module._parameters.items() if value is not None)
        raise ValueError(f"{what} is not a plain parameter: choose one of {own}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{what} has no shape yet: run the lazy module once first")
    return weight, what
