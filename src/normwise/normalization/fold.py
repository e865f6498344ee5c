"""Which weights of a model are normalised, by this library or by torch, and turning them into plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as HookWeightNorm

from normwise.normalization._attachment import chains, detach, drop_load_hooks
from normwise.normalization._exact import Formula
from normwise.normalization._kernels import normalize
from normwise.normalization.parametrizations import (
    CenteredWeightNorm,
    NormalizedWeight,
    WeightNorm,
    WeightStandardization,
)

__all__ = ["Member", "fold", "members"]

_KINDS: dict[type, str] = {
    WeightNorm: "weight_norm",
    CenteredWeightNorm: "centered_weight_norm",
    WeightStandardization: "weight_standardization",
    torch_parametrizations._WeightNorm: "weight_norm",
    torch_parametrizations._SpectralNorm: "spectral_norm",
    torch_parametrizations._Orthogonal: "orthogonal",
}


@dataclass(frozen=True)
class Member:
    """One weight that is computed by a normalisation.

    Attributes:
        module: The module that owns the weight.
        name: The name of the weight in the module.
        kind: "weight_norm", "centered_weight_norm", "weight_standardization", "spectral_norm" or
            "orthogonal".
        dim: The dimension that counts the units, non-negative, or None: the whole tensor.
        gain: Whether each unit has a trainable gain.
        form: "parametrization", or "hook": torch's older functions.
        originals: The names, in ``module``, of the tensors from which the weight is computed.
    """

    module: nn.Module
    name: str
    kind: str
    dim: int | None
    gain: bool
    form: str
    originals: tuple[str, ...]


def members(model: nn.Module) -> dict[str, Member]:
    """Return every normalised weight of ``model``, by its qualified name.

    Example:
        >>> model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        >>> {name: member.kind for name, member in members(model).items()}
        {'0.weight': 'spectral_norm'}
    """
    return {
        f"{prefix}.{member.name}" if prefix else member.name: member
        for prefix, module in model.named_modules()
        for member in _of_module(module)
    }


def fold(model: nn.Module) -> list[str]:
    """Turn every normalised weight of ``model`` into a plain parameter of the same value, in place.

    This covers the members of this library and torch's own weight_norm, spectral_norm and orthogonal, as
    parametrizations and as hooks. No hook or class of theirs remains, so deepcopy, pickle, ``torch.save`` and
    every export work on the result. Deep copies taken before are not touched. Other parametrizations stay,
    unless they share a weight with one of these. Outputs stay the same (for spectral norm, those of
    evaluation mode).

    Folding a weight with a gain makes a new parameter: to train on, build the optimizer after folding.

    Args:
        model: Any module, also a single layer.

    Returns:
        The qualified names of the weights that were folded.

    Example:
        >>> from normwise.normalization.parametrizations import weight_norm
        >>> layer = weight_norm(nn.Linear(4, 3))
        >>> fold(layer), type(layer).__name__, [name for name, _ in layer.named_parameters()]
        (['weight'], 'Linear', ['weight', 'bias'])
    """
    normalized = members(model)
    for member in reversed(normalized.values()):  # the last first, so that positions among parameters hold
        if member.form == "parametrization":
            detach(member.module, member.name)
        elif member.kind == "spectral_norm":
            remove_spectral_norm(member.module, member.name)
            drop_load_hooks(member.module, member.name)
        else:
            _remove_weight_norm_hook(member)
    return list(normalized)


def _remove_weight_norm_hook(member: Member) -> None:
    """Do what torch's remove_weight_norm does, exactly at every scale and without NaN at a zero unit."""
    module, name = member.module, member.name
    gain, weight = (getattr(module, original) for original in member.originals)
    with torch.no_grad():
        value = normalize(weight, gain, Formula(member.dim, center=False, factor=1.0))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, HookWeightNorm) and hook.name == name:
            del module._forward_pre_hooks[key]
    for attribute in (name, *member.originals):
        delattr(module, attribute)
    module.register_parameter(name, nn.Parameter(value, weight.requires_grad))


def _of_module(module: nn.Module) -> Iterator[Member]:
    for name, chain in chains(module).items():
        stored = [key for key in [*chain._parameters, *chain._buffers] if key.startswith("original")]
        originals = tuple(f"parametrizations.{name}.{key}" for key in stored)
        for parametrization in chain.children():
            kind = _KINDS.get(type(parametrization))
            if kind is None:
                continue
            if isinstance(parametrization, NormalizedWeight):
                dim, gain = parametrization.formula.dim, parametrization.gain
            else:
                dim = _torch_dim(parametrization, kind, getattr(chain, stored[-1]))
                gain = kind == "weight_norm"
            yield Member(module, name, kind, dim, gain, "parametrization", originals)
            break
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, HookWeightNorm):
            dim = _torch_dim(hook, "weight_norm", getattr(module, f"{hook.name}_v"))
            pair = f"{hook.name}_g", f"{hook.name}_v"
            yield Member(module, hook.name, "weight_norm", dim, True, "hook", pair)
        elif isinstance(hook, SpectralNorm):
            yield Member(module, hook.name, "spectral_norm", None, False, "hook", (f"{hook.name}_orig",))


def _torch_dim(source: object, kind: str, weight: Tensor) -> int | None:
    """Return the dim of a torch weight norm, where −1 is the whole tensor; the others take all of it."""
    dim = getattr(source, "dim", -1) if kind == "weight_norm" else -1
    return None if dim == -1 else dim % weight.ndim
