"""The parameters of a model: what each is for, and its names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["ROLES", "bare", "parameter_aliases", "role_of"]

ROLES = ("weight", "bias", "gain", "vector")

# What wrappers put into names: torch.compile, FSDP, activation checkpointing; DDP puts a prefix.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# The weight of these is a weight whatever its shape: a head with a single output has a matrix of one row.
_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def role_of(model: nn.Module, name: str, parameter: Tensor) -> str:
    """Return "weight", "bias", "gain" (of a norm or a weight norm) or "vector" (any other list of values).

    The number of dimensions does not decide: the gain of a weight norm has shape (out, 1), that of a layer
    scale may have (channels, 1, 1), and the weight of a layer with one input has (out, 1) too.

    Args:
        model: The module that holds the parameter.
        name: The parameter's name in ``model``.
        parameter: The parameter.

    Example:
        >>> import torch
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> for name, parameter in layer.named_parameters():
        ...     print(name, tuple(parameter.shape), role_of(layer, name, parameter))
        bias (2,) bias
        parametrizations.weight.original0 (2, 1) gain
        parametrizations.weight.original1 (2, 3) weight
    """
    path, _, leaf = name.rpartition(".")
    if ".parametrizations." in f".{path}":
        originals = model.get_submodule(path)
        if leaf == "original0" and hasattr(originals, "original1"):
            return "gain"
        path, _, leaf = f".{path}".rpartition(".parametrizations.")
        path = path.lstrip(".")
    owner = model.get_submodule(path)
    if leaf.endswith("_g") and hasattr(owner, f"{leaf[:-2]}_v"):  # torch's older weight norm
        return "gain"
    if "bias" in leaf:
        return "bias"
    if isinstance(owner, _NORMS):
        return "gain"
    if parameter.ndim > 1 and isinstance(owner, _LAYERS):
        return "weight"
    if sum(size > 1 for size in parameter.shape) > 1:
        return "weight"
    return "gain" if "norm" in type(owner).__name__.lower() else "vector"


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {first name: other names} of every parameter of ``model``, in order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values()}


def bare(name: str) -> str:
    """Return a name without the parts that wrappers add.

    Example:
        >>> bare("module._orig_mod.fc.weight")
        'fc.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)
