"""The arithmetic of a decay step: what multiplies a weight, and what is added to a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normwise.decay.rules import EpsilonShiftedL2, Rule
from normwise.norms import wide_dtype
from normwise.units import Unit

__all__ = ["add_pull", "explicit_factors", "flow_factors", "multiply", "multiply_all"]

# A factor in another type than the weight's makes torch copy the weight: so many elements at a time.
_COPIED_NUMEL = 2**20


def flow_factors(rule: Rule, magnitudes: Tensor, time: float | Tensor, regular: bool = False) -> Tensor:
    """Return φ(n, t)/n, and 1 for units that have no direction (zero) or no norm (not finite).

    Args:
        rule: The rule.
        magnitudes: n, of any shape.
        time: t.
        regular: Whether all n are known to be positive and finite, which saves the test.

    Example:
        >>> from normwise.decay.rules import AdaptiveWeightShrink
        >>> flow_factors(AdaptiveWeightShrink(1.0), torch.tensor([0.0, 1.0, 3.0]), time=1.0)
        tensor([1.0000, 0.5000, 0.2500])
    """
    factors = rule.flow(magnitudes, time) / magnitudes
    return factors if regular else torch.where(_has_direction(magnitudes), factors, torch.ones_like(factors))


def explicit_factors(
    rule: Rule, magnitudes: Tensor, time: float | Tensor, mask: Tensor | None, name: Callable[[], str]
) -> float | Tensor:
    """Return 1 − t·c(n): one number where the rate is constant, else a tensor of the magnitudes' shape.

    Units without a direction or a finite norm get 1. ``name`` is asked how to call the parameter in an error.

    Raises:
        ValueError: t·c(n) ≥ 1 for a unit that is meant; reading this waits for CUDA.

    Example:
        >>> from normwise.decay.rules import L2
        >>> explicit_factors(L2(0.1), torch.tensor([2.0]), 0.5, None, lambda: "parameter 'w'")
        0.95
    """
    constant = rule.constant_rate
    if constant is not None:  # the very expression of AdamW
        if not float(time * constant) < 1:
            raise ValueError(_too_strong(name(), float(time * constant), None, rule))
        return 1 - time * constant
    shrunk = _where(_has_direction(magnitudes), time * rule.rate(magnitudes))
    meant = shrunk if mask is None else _where(mask, shrunk)
    if not bool((meant < 1).all()):
        worst = int(meant.nan_to_num(torch.inf).argmax())
        raise ValueError(_too_strong(name(), float(meant[worst]), float(magnitudes[worst]), rule))
    return 1 - shrunk


def _has_direction(magnitudes: Tensor) -> Tensor:
    return (magnitudes > 0) & magnitudes.isfinite()


def _where(condition: Tensor, values: Tensor) -> Tensor:
    return torch.where(condition, values, torch.zeros_like(values))


def _too_strong(name: str, strength: float, magnitude: float | None, rule: Rule) -> str:
    where = "" if magnitude is None else f" at magnitude {magnitude:.4g}"
    return (
        f'{name}: mode="explicit" would multiply it by 1 − {strength:.4g}{where} with {rule}, which flips or '
        'blows up the weight: use mode="flow", which is stable for any coefficient, or a smaller coefficient'
    )


def multiply(param: Tensor, factor: float | Tensor, unit: Unit, found_inf: Tensor | None = None) -> None:
    """Multiply the units of a parameter in place, unless a GradScaler found infinities.

    Args:
        param: The parameter; its storage is changed.
        factor: A number or 0-dim tensor for all units, or a tensor with one value per unit.
        unit: The Unit that it belongs to, which knows the dim and the mask.
        found_inf: What the GradScaler left with a fused optimizer: 1 where the step is skipped.
    """
    if isinstance(factor, Tensor) and factor.ndim == 0 and factor.device.type == "cpu":
        factor = factor.item()  # which a kernel takes in full precision, wherever the parameter is
    if unit.mask is None and found_inf is None and not isinstance(factor, Tensor):
        param.mul_(factor)
        return
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=wide_dtype(param.device), device=param.device)
    multiply_all([param], [factor.expand(unit.count)], [unit], found_inf)


def multiply_all(
    params: Sequence[Tensor], factors: Sequence[Tensor], units: Sequence[Unit], found_inf: Tensor | None
) -> None:
    """Multiply the units of parameters of one type in place; arguments as for :func:`multiply`."""
    dtype = params[0].dtype
    wide = torch.promote_types(dtype, torch.float32)  # a factor rounded to bfloat16 would be 1
    ready = []
    for param, factor, unit in zip(params, factors, units, strict=True):
        factor = factor.to(wide)
        if unit.mask is not None:  # torch.where would make a tensor of the number first
            factor = factor.masked_fill(unit.mask.logical_not(), 1.0)
        if found_inf is not None:
            factor = factor.masked_fill(found_inf.to(param.device) > 0, 1.0)
        ready.append(unit.broadcast(factor, param))
    if dtype == wide:
        torch._foreach_mul_(list(params), ready)
        return
    for param, factor, unit in zip(params, ready, units, strict=True):
        if param.numel() <= _COPIED_NUMEL:
            param.mul_(factor)
            continue
        rows = max(1, _COPIED_NUMEL * len(param) // param.numel())
        for start in range(0, len(param), rows):
            part = slice(start, start + rows)
            param[part].mul_(factor[part] if unit.dim == 0 else factor)


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
    wide = torch.promote_types(param.dtype, torch.float32)
    strength = torch.full((unit.count,), sign, dtype=magnitudes.dtype, device=magnitudes.device)
    if unit.mask is not None:
        strength = _where(unit.mask, strength)
    if scale is not None:
        strength = strength * scale.to(strength)
    if isinstance(rule, EpsilonShiftedL2) and rule.form == "std":
        pulled, factors = _published_pull(rule, unit, param), strength
    else:
        pulled, factors = param, strength * _where(_has_direction(magnitudes), rule.rate(magnitudes))
    by_unit = unit.broadcast(factors.to(wide), param)
    if param.device.type != "cpu" or not bool(magnitudes.isfinite().all()):
        pulled = pulled.masked_fill(by_unit == 0, 0.0)  # zero times infinity is not a number
    return torch.addcmul(grad.to(wide), pulled.to(wide), by_unit).to(grad.dtype)


def _published_pull(rule: EpsilonShiftedL2, unit: Unit, param: Tensor) -> Tensor:
    """Return λ((1 − ε/s)(w − m) + m), with the unbiased deviation s and the mean m of each unit."""
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in unit.params]
    sums = [one.sum([k for k in range(one.ndim) if k != unit.dim]) if one.ndim else one for one in wide]
    mean = torch.stack([s.reshape(-1) for s in sums]).sum(0) / unit.numel
    centered = [one - unit.broadcast(mean, one) for one in wide]
    deviation = Unit(centered, unit.dim).norms() / max(1, unit.numel - 1) ** 0.5
    own = next(c for one, c in zip(unit.params, centered, strict=True) if one is param)
    shifted, level = rule.rate(deviation).to(own), rule.strength * mean
    pulled: Tensor = own.mul_(unit.broadcast(shifted, own)).add_(unit.broadcast(level, own))
    return pulled
