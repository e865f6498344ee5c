"""From normalised weights back to plain ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm as TorchHookWeightNorm

from normwise.normalization.attachment import detach, drop_hooks
from normwise.normalization.exact import Formula
from normwise.normalization.kernels import normalize
from normwise.normalization.members import Member, members

__all__ = ["fold"]


def fold(model: nn.Module) -> list[str]:
    """Turn every normalised weight of ``model`` into a plain parameter of the same value, in place.

    Ours and torch's own weight_norm, spectral_norm and orthogonal, as parametrizations and as hooks. No hook
    or class of theirs is left: deepcopy, pickle, ``torch.save`` and every export work on the result, and
    deep copies that were taken before are not touched. A parametrization of another kind stays, unless it
    shares its weight with one of these. Outputs stay the same (spectral norm: those of evaluation mode).

    With a gain the parameters are new ones: build the optimizer of further training after folding.

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
    found = members(model)
    for member in reversed(found.values()):  # the last first: places among the parameters count so
        if member.form == "parametrization":
            detach(member.module, member.name)
        elif member.kind == "spectral_norm":
            remove_spectral_norm(member.module, member.name)
            drop_hooks(member.module, member.name)
        else:
            _remove_weight_norm_hook(member)
    return list(found)


def _remove_weight_norm_hook(member: Member) -> None:
    """Do what torch's remove_weight_norm does, but exactly at every scale and without NaN at a zero unit."""
    module, name = member.module, member.name
    gain, weight = (getattr(module, original) for original in member.originals)
    with torch.no_grad():
        value = normalize(weight, gain, Formula(member.dim, center=False, factor=1.0))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, TorchHookWeightNorm) and hook.name == name:
            del module._forward_pre_hooks[key]
    for attribute in (name, *member.originals):
        delattr(module, attribute)
    module.register_parameter(name, nn.Parameter(value, weight.requires_grad))
