"""The arithmetic of a decay step: what multiplies a weight, and what is added to a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.decay.rules import Rule
from normwise.units import Unit

__all__ = ["add_pull", "explicit_factors", "flow_factors", "shrink"]


def flow_factors(rule: Rule, magnitudes: Tensor, time: float | Tensor) -> Tensor:
    """Return φ(n, t)/n, and 1 for units that have no direction (zero) or no norm (not finite).

    Args:
        rule: The rule.
        magnitudes: n, of any shape.
        time: t.

    Example:
        >>> from normwise.decay.rules import AdaptiveWeightShrink
        >>> flow_factors(AdaptiveWeightShrink(1.0), torch.tensor([0.0, 1.0, 3.0]), time=1.0)
        tensor([1.0000, 0.5000, 0.2500])
    """
    factors = rule.flow(magnitudes, time) / magnitudes
    return torch.where((magnitudes > 0) & magnitudes.isfinite(), factors, torch.ones_like(factors))


def explicit_factors(
    rule: Rule, magnitudes: Tensor, time: float | Tensor, mask: Tensor | None, name: str
) -> float | Tensor:
    """Return 1 − t·c(n): one number where the rate is constant, else a tensor of the magnitudes' shape.

    Raises:
        ValueError: t·c(n) ≥ 1 (or not a number) for a unit that is meant; reading this waits for CUDA.

    Example:
        >>> from normwise.decay.rules import L2
        >>> explicit_factors(L2(0.1), torch.tensor([2.0]), 0.5, None, "parameter 'w'")
        0.95
    """
    constant = rule.constant_rate
    if constant is not None:  # the very expression of AdamW
        if not float(time * constant) < 1:
            raise ValueError(_too_strong(name, float(time * constant), None, rule))
        return 1 - time * constant
    shrunk = time * rule.rate(magnitudes)
    meant = shrunk if mask is None else torch.where(mask, shrunk, torch.zeros_like(shrunk))
    fine = meant < 1
    if not bool(fine.all()):
        worst = int(torch.where(fine, -torch.inf, meant.nan_to_num(torch.inf)).argmax())
        raise ValueError(_too_strong(name, float(meant[worst]), float(magnitudes[worst]), rule))
    return 1 - shrunk


def _too_strong(name: str, strength: float, magnitude: float | None, rule: Rule) -> str:
    where = "" if magnitude is None else f" at magnitude {magnitude:.4g}"
    return (
        f'{name}: mode="explicit" would multiply it by 1 − {strength:.4g}{where} with {rule}, which flips or '
        'blows up the weight: use mode="flow", which is stable for any coefficient, or a smaller coefficient'
    )


def shrink(param: Tensor, unit: Unit, factor: float | Tensor, found_inf: Tensor | None) -> None:
    """Multiply the units of a parameter in place, unless a GradScaler found infinities.

    Args:
        param: The parameter; its storage is changed.
        unit: The Unit that it belongs to.
        factor: A number or 0-dim tensor for all units, or a tensor of shape (count,).
        found_inf: What the GradScaler left with a fused optimizer: 1 where the step is skipped.
    """
    if unit.mask is not None or (isinstance(factor, Tensor) and factor.ndim):
        # in float32 at least: a factor rounded to bfloat16 would be 1
        wide = torch.promote_types(param.dtype, torch.float32)
        factors = factor if isinstance(factor, Tensor) else torch.tensor(factor, device=param.device)
        factors = factors.to(dtype=wide).expand(unit.count)
        if unit.mask is not None:
            factors = torch.where(unit.mask, factors, torch.ones_like(factors))
        factor = unit.broadcast(factors, param)
    if found_inf is not None:
        factor = torch.where(found_inf.to(param.device) > 0, torch.ones((), device=param.device), factor)
    param.mul_(factor)


def add_pull(
    grad: Tensor,
    param: Tensor,
    unit: Unit,
    rule: Rule,
    magnitudes: Tensor,
    sign: float = 1.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Return ∇ + c(n)·w, in the gradient's type, as a new tensor.

    Args:
        grad: ∇, of the shape of ``param``.
        param: w.
        unit: The Unit that it belongs to.
        rule: The rule.
        magnitudes: n, of shape (count,).
        sign: −1 for an optimizer that maximizes, which turns the sum around.
        scale: What a fused optimizer will divide the gradient by (GradScaler), or None.
    """
    constant = rule.constant_rate
    if constant is not None and unit.mask is None and scale is None:  # the very expression of torch.optim
        return torch.add(grad, param, alpha=sign * constant)
    rates = sign * rule.rate(magnitudes)
    rates = torch.where(magnitudes > 0, rates, torch.zeros_like(rates))
    if unit.mask is not None:
        rates = torch.where(unit.mask, rates, torch.zeros_like(rates))
    if scale is not None:
        rates = rates * scale.to(rates)
    wide = torch.promote_types(param.dtype, torch.float32)
    pull = unit.broadcast(rates.to(wide), param)
    return torch.addcmul(grad.to(wide), param.to(wide), pull).to(grad.dtype)
