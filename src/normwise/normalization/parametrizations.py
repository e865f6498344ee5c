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

from normwise.normalization._attachment import WatchedParametrization, attach
from normwise.normalization._exact import Formula, exact_forward, natural_gain
from normwise.normalization._kernels import is_transformed, normalize
from normwise.normalization.functional import formula_of
from normwise.norms import slice_norms

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
# How far, in ULP of the unit's norm, a weight may move and still count as preserved.
_PRESERVED_ULP = 8


class NormalizedWeight(WatchedParametrization):
    """A parametrization by a member of the family; each member is a subclass.

    Args:
        formula: The formula that it computes.
        gain: Whether each unit has a trainable gain.
        name: The name of the weight in its module.
        label: The name of the weight in error messages.
    """

    def __init__(self, formula: Formula, gain: bool, name: str, label: str) -> None:
        super().__init__()
        self.formula = formula
        self.gain = gain
        self.label = label
        if gain and not formula.center:
            self.remedy = f"assign the new values instead (module.{name} = tensor)"
        else:
            self.remedy = f"set module.parametrizations.{name}.original{'1' if gain else ''} instead"

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
        """Return originals for ``weight``: for an assignment exact ones, on attaching the nearest ones."""
        self.forget()
        gain = natural_gain(weight, self.formula) if self.gain else None
        if gain is not None and not gain.is_meta and bool((gain.isinf() & ~weight.isinf().any()).any()):
            raise ValueError(
                f"{self.label}: the norm of a unit exceeds the largest {gain.dtype}: "
                "scale the weight down or use a wider type"
            )
        limits = (["mean 0"] if self.formula.center else []) + (
            [] if self.gain else [f"Euclidean norm {self.formula.factor:.6g}"]
        )
        if self.attached and limits and not weight.is_meta and not self.preserves(weight):
            raise ValueError(
                f"{self.label} cannot have the values assigned to it: with {type(self).__name__}(gain="
                f"{self.gain}) every unit has {' and '.join(limits)}; {self.remedy}"
            )
        return weight if gain is None else (gain, weight)

    def preserves(self, weight: Tensor) -> bool:
        """Return whether the originals of ``weight`` give it back, up to rounding."""
        if weight.is_meta:
            return self.gain and not self.formula.center
        weight = weight.detach()
        gain = natural_gain(weight, self.formula) if self.gain else None
        change = exact_forward(weight, gain, self.formula).double() - weight.double()
        tolerance = _PRESERVED_ULP * torch.finfo(weight.dtype).eps * slice_norms(weight, self.formula.dim)
        return not bool((slice_norms(change, self.formula.dim) > tolerance).any())


class WeightNorm(NormalizedWeight):
    """w = g·v/‖v‖ (see `weight_norm`)."""


class CenteredWeightNorm(NormalizedWeight):
    """w = g·(v − mean)/‖v − mean‖ (see `centered_weight_norm`)."""


class WeightStandardization(NormalizedWeight):
    """w = g·(v − mean)/std (see `weight_standardization`)."""


_CLASSES = {
    "weight_norm": WeightNorm,
    "centered_weight_norm": CenteredWeightNorm,
    "weight_standardization": WeightStandardization,
}


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
        ValueError: No such parameter, already parametrized, ``dim`` out of range, units of fewer than 2
            elements, which have no direction, or an embedding with sparse gradients.

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
        ValueError: No such parameter, already parametrized, ``dim`` out of range, units of fewer than 3
            elements, which have no direction once centered, or an embedding with sparse gradients.

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
        ValueError: No such parameter, already parametrized, ``dim`` or ``eps`` out of range, units of fewer
            than 3 elements, which have no direction once centered, or an embedding with sparse gradients.

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

    Arguments as for `weight_standardization`; ``label`` is the name of the weight in error messages.
    """
    weight, label = _parameter(module, name, label)
    if dim == -1 and not isinstance(dim, bool):
        dim = None
    formula = formula_of(kind, weight, dim, label, eps)
    if fan_in_scale:
        # A unit of a grouped transposed convolution spans the groups; each output sees one of them.
        groups = int(getattr(module, "groups", 1)) if getattr(module, "transposed", False) else 1
        formula = formula._replace(factor=groups**0.5)
    return _CLASSES[kind](formula, gain, name, label)


def install(module: nn.Module, name: str, parametrization: NormalizedWeight) -> None:
    """Put a parametrization from `build` on the weight."""
    parametrization.old_keys = isinstance(parametrization, WeightNorm) and parametrization.gain
    attach(module, name, parametrization)


def _parameter(module: nn.Module, name: str, label: str | None) -> tuple[nn.Parameter, str]:
    """Return the parameter and its name in error messages, or raise where there is no plain parameter."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
    label = f"{name if label is None else label!r} of {type(module).__name__}({module.extra_repr()})"
    hooked = any(getattr(hook, "name", None) == name for hook in module._forward_pre_hooks.values())
    if hooked or parametrize.is_parametrized(module, name):
        raise ValueError(f"{label} is parametrized already: fold it first")
    weight = module._parameters.get(name)
    if weight is None:
        present = sorted(key for key, value in module._parameters.items() if value is not None)
        raise ValueError(f"{label} is not a plain parameter: choose one of {present}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{label} has no shape yet: run the lazy module once first")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        raise ValueError(
            f"{label} has sparse gradients, which do not pass through a normalisation: "
            "set sparse=False or skip it"
        )
    return weight, label
