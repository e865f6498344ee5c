"""The weight-normalisation family as functions from tensor to tensor.

All three functions are exact at every scale and in every floating-point type: f(αw) = f(w) and
∇f(αw) = ∇f(w)/α for unit norms from 1e-30 to 1e30. A unit is a slice along ``dim`` (0: one output filter
each), or the whole tensor (``dim=None``). A unit without a direction (all zero or, for the two members that
subtract the mean, constant) gives zeros and receives a zero gradient, never NaN.
"""

from __future__ import annotations

from torch import Tensor

from normwise.normalization._exact import Formula, unit_size
from normwise.normalization._kernels import normalize
from normwise.norms import check_dim

__all__ = ["centered_weight_norm", "weight_norm", "weight_standardization"]


def weight_norm(w: Tensor, dim: int | None = 0) -> Tensor:
    """Return w/‖w‖ of each unit: weight normalisation without the gain.

    Salimans & Kingma, "Weight Normalization", 2016 (arXiv:1602.07868), equation 2 with g = 1.

    Args:
        w: The weight: floating point, any shape.
        dim: The dimension that counts the units; negative ones count from the end. None: the whole tensor.

    Returns:
        A tensor of the shape and type of ``w``, each unit of Euclidean norm 1.

    Raises:
        TypeError: ``w`` is not a real floating-point tensor.
        ValueError: ``dim`` is out of range, or a unit has fewer than 2 elements and so no direction.

    Example:
        >>> import torch
        >>> weight_norm(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return normalize(w, None, formula_of("weight_norm", w, dim, "w"))


def centered_weight_norm(w: Tensor, dim: int | None = 0) -> Tensor:
    """Return (w − mean)/‖w − mean‖ of each unit: centered weight normalisation without the gain.

    Huang et al., "Centered Weight Normalization in Accelerating Training of Deep Neural Networks",
    ICCV 2017, equation 2.

    Args:
        w: The weight: floating point, any shape.
        dim: The dimension that counts the units; negative ones count from the end. None: the whole tensor.

    Returns:
        A tensor of the shape and type of ``w``, each unit of mean 0 and Euclidean norm 1.

    Raises:
        TypeError: ``w`` is not a real floating-point tensor.
        ValueError: ``dim`` is out of range, or a unit has fewer than 3 elements and so no direction.

    Example:
        >>> import torch
        >>> centered_weight_norm(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-0.7071,  0.0000,  0.7071]])
    """
    return normalize(w, None, formula_of("centered_weight_norm", w, dim, "w"))


def weight_standardization(w: Tensor, dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """Return (w − mean)/√(var + eps) of each unit, var the biased variance: weight standardisation.

    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019
    (arXiv:1903.10520), equation 5.

    Args:
        w: The weight: floating point, any shape.
        dim: The dimension that counts the units; negative ones count from the end. None: the whole tensor.
        eps: Added to the variance. Use it only for checkpoints that were trained with one: it breaks scale
            invariance (with 1e-6, weights of standard deviation 1e-4 come out ten times too small).

    Returns:
        A tensor of the shape and type of ``w``, each unit of mean 0 and standard deviation 1.

    Raises:
        TypeError: ``w`` is not a real floating-point tensor.
        ValueError: ``dim`` is out of range, ``eps`` is negative or not finite, or a unit has fewer than 3
            elements and so no direction.

    Example:
        >>> import torch
        >>> weight_standardization(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    return normalize(w, None, formula_of("weight_standardization", w, dim, "w", eps))


def formula_of(kind: str, w: Tensor, dim: int | None, label: str, eps: float = 0.0) -> Formula:
    """Check the arguments and return the formula of a member of the family.

    Args:
        kind: "weight_norm", "centered_weight_norm" or "weight_standardization".
        w: The weight.
        dim: As for the functions above.
        label: The name of the weight in error messages.
        eps: As for `weight_standardization`; 0 for the others.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"{label} must be a tensor, not {type(w).__name__}")
    if not w.is_floating_point():
        raise TypeError(f"{label} must be a real floating-point tensor, not {w.dtype}: convert it first")
    dim = check_dim(dim, w.ndim, label)
    center = kind != "weight_norm"
    size, smallest = unit_size(w, dim), 3 if center else 2
    if size < smallest:
        raise ValueError(
            f"{label} of shape {tuple(w.shape)} has units of {size} element(s) along dim={dim}, which have "
            f"no direction: {kind} needs at least {smallest}; leave this weight out or choose another dim"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, not {eps!r}: 0 keeps scale invariance")
    return Formula(dim, center, size**0.5 if kind == "weight_standardization" else 1.0, float(eps))
