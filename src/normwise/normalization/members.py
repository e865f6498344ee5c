"""Which weights of a model are already computed by a member of the family, ours or torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as TorchHookWeightNorm

from normwise.normalization import parametrizations as ours
from normwise.normalization.attachment import chains

__all__ = ["Member", "member_of", "members"]

_KINDS: dict[type, str] = {
    ours.WeightNorm: "weight_norm",
    ours.CenteredWeightNorm: "centered_weight_norm",
    ours.WeightStandardization: "weight_standardization",
    torch_parametrizations._WeightNorm: "weight_norm",
    torch_parametrizations._SpectralNorm: "spectral_norm",
    torch_parametrizations._Orthogonal: "orthogonal",
    TorchHookWeightNorm: "weight_norm",
    SpectralNorm: "spectral_norm",
}


@dataclass(frozen=True)
class Member:
    """One weight that is computed by a member of the family.

    Attributes:
        module: The module that owns it.
        name: Its name there.
        kind: "weight_norm", "centered_weight_norm", "weight_standardization", "spectral_norm" or
            "orthogonal".
        dim: The dimension that counts the units, non-negative, or None: the whole tensor.
        gain: Whether each unit has a trainable gain.
        form: "parametrization", or "hook": torch's older functions.
        originals: The names, in ``module``, of the tensors that it is computed from.
    """

    module: nn.Module
    name: str
    kind: str
    dim: int | None
    gain: bool
    form: str
    originals: tuple[str, ...]


def member_of(module: nn.Module, name: str = "weight") -> Member | None:
    """Return what computes the weight ``name`` of ``module``, or None where no member of the family does.

    Example:
        >>> member_of(ours.weight_norm(nn.Linear(4, 3))).kind
        'weight_norm'
    """
    return next((member for member in _of_module(module) if member.name == name), None)


def members(model: nn.Module) -> dict[str, Member]:
    """Return every member of the family in ``model``, by the qualified name of its weight.

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


def _of_module(module: nn.Module) -> Iterator[Member]:
    for name, chain in chains(module).items():
        originals = tuple(
            f"parametrizations.{name}.{k}"
            for k in [*chain._parameters, *chain._buffers]
            if k.startswith("original")
        )
        for parametrization in chain.children():
            kind = _KINDS.get(type(parametrization))
            if kind is not None:
                member = Member(module, name, kind, None, False, "parametrization", originals)
                if isinstance(parametrization, ours.NormalizedWeight):
                    yield replace(member, dim=parametrization.formula.dim, gain=parametrization.gain)
                else:
                    ndim = getattr(chain, originals[-1].rpartition(".")[2]).ndim
                    yield replace(
                        member, dim=_torch_dim(parametrization, kind, ndim), gain=kind == "weight_norm"
                    )
                break
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHookWeightNorm):
            dim = _torch_dim(hook, "weight_norm", getattr(module, f"{hook.name}_v").ndim)
            yield Member(
                module, hook.name, "weight_norm", dim, True, "hook", (f"{hook.name}_g", f"{hook.name}_v")
            )
        elif isinstance(hook, SpectralNorm):
            yield Member(module, hook.name, "spectral_norm", None, False, "hook", (f"{hook.name}_orig",))


def _torch_dim(source: object, kind: str, ndim: int) -> int | None:
    """Return the dim of a torch weight norm, where −1 is the whole tensor; the others take all of it."""
    dim = getattr(source, "dim", -1) if kind == "weight_norm" else -1
    return None if dim == -1 else dim % ndim
