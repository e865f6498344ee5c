"""The family in float64, written as the papers write it, and how far from it a result is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.normalization._attachment import chains

KINDS = ("weight_norm", "centered_weight_norm", "weight_standardization")
FUNCTIONS = {kind: getattr(nw.functional, kind) for kind in KINDS}


def reduced(w: Tensor, dim: int | None) -> list[int]:
    return [k for k in range(w.ndim) if dim is None or k != dim % w.ndim]


def reference(kind: str, w: Tensor, dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """Return the member in float64; units without a direction give zeros without a gradient."""
    w, dims = w.double(), reduced(w, dim)
    c = w if kind == "weight_norm" else w - w.mean(dims, keepdim=True)
    scale = c.detach().abs().amax(dims, keepdim=True)
    dead = scale <= 1e-14 * w.detach().abs().amax(dims, keepdim=True)
    if eps:
        return c / (c.square().mean(dims, keepdim=True) + eps).sqrt()
    c = torch.where(dead, 1.0, c / torch.where(dead, 1.0, scale))
    power = (
        c.square().mean(dims, keepdim=True)
        if kind == "weight_standardization"
        else c.square().sum(dims, keepdim=True)
    )
    return torch.where(dead, 0.0, c / power.sqrt())


def with_gradient(function: object, w: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value at ``w`` and the gradient of ⟨upstream, value⟩."""
    leaf = w.detach().clone().requires_grad_()
    out = function(leaf)  # type: ignore[operator]
    out.backward(upstream.to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def error_in_ulp(computed: Tensor, exact: Tensor, dim: int | None = 0) -> float:
    """Return the largest error of a unit, relative to the unit's norm, in ULP of its type."""
    dims = reduced(computed, dim)
    assert computed.isfinite().all(), "not finite although the true value is"
    size = torch.linalg.vector_norm(exact, dim=dims)
    error = torch.linalg.vector_norm(computed.double() - exact, dim=dims)
    assert bool((error[size == 0] == 0).all()), "not zero although the true value is"
    relative = torch.where(size == 0, 0.0, error / torch.where(size == 0, 1.0, size))
    return float(relative.max()) / torch.finfo(computed.dtype).eps


def originals(module: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    """Return (gain, weight) or (weight,) of a normalised weight."""
    return list(chains(module)[name].parameters())


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    return weight


def network(kind: str) -> nn.Sequential:
    """A small network whose layers are converted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 4))
    nw.convert(model, kind)
    return model
