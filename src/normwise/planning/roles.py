"""What a parameter is for: a weight, a bias, a gain or another vector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["ROLES", "role_of"]

ROLES = ("weight", "bias", "gain", "vector")

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Whatever its shape, their weight is one: a head with a single output has a matrix of one row.
_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def role_of(model: nn.Module, name: str, parameter: Tensor) -> str:
    """Return "weight", "bias", "gain" (of a norm or a weight norm) or "vector" (any other list of values).

    A number of dimensions alone does not tell: the gain of a weight norm is (out, 1), that of a layer
    scale may be (channels, 1, 1), and the weight of a layer with one input is (out, 1) too.

    Args:
        model: The module that holds it.
        name: Its name in ``model``.
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
