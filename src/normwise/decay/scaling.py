"""How a rule scales weights: the factors for norms, and the product in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normwise.decay.rules import Rule
from normwise.norms import wide_dtype
from normwise.units import Unit

__all__ = [
    "constant_flow_factor",
    "explicit_factors",
    "flow_factors",
    "has_direction",
    "is_representable",
    "scale_unit",
    "scale_units",
]

# A factor in another type than the weight's makes torch copy the weight: so many elements at a time.
_COPIED_NUMEL = 2**20
# The factors that float32 represents to its full precision.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def has_direction(magnitudes: Tensor) -> Tensor:
    """Return where a unit can be moved along its ray: where its norm is positive and finite."""
    return (magnitudes > 0) & magnitudes.isfinite()


def flow_factors(rule: Rule, magnitudes: Tensor, time: float | Tensor) -> Tensor:
    """Return φ(n, t)/n, and 1 for units whose norm is zero or not finite.

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
    return torch.where(has_direction(magnitudes), factors, torch.ones_like(factors))


def is_representable(factors: Tensor, magnitudes: Tensor, limits: Tensor) -> Tensor:
    """Return where the type of the weights can represent a unit after it is scaled.

    A factor of at least 1/2 makes no unit vanish: more than half of the smallest number rounds to that
    number. A factor that is not finite fits nowhere.

    Args:
        factors: One for each unit.
        magnitudes: n, of the same shape.
        limits: The smallest and the largest magnitude of each unit, of shape (2, units).

    Example:
        >>> limits = torch.tensor([[1e-4], [1e4]]).expand(2, 3)
        >>> is_representable(torch.tensor([1e-6, 0.5, 1e6]), torch.tensor([1.0, 1e-4, 1.0]), limits)
        tensor([False,  True, False])
    """
    scaled, (smallest, largest) = factors * magnitudes, limits
    fits: Tensor = ((factors >= 0.5) | (scaled >= smallest)) & ((factors <= 1) | (scaled <= largest))
    return fits


def constant_flow_factor(rule: Rule, time: float | Tensor) -> float | Tensor:
    """Return φ(n, t)/n of a rule whose rate does not depend on the norm: a tensor if the time is on CUDA.

    Example:
        >>> from normwise.decay.rules import L2
        >>> round(constant_flow_factor(L2(0.1), 2.0), 4)
        0.8187
    """
    device = time.device if isinstance(time, Tensor) else torch.device("cpu")  # no copy that would wait
    factor = rule.flow(torch.ones((), dtype=wide_dtype(device), device=device), time)
    return factor.item() if device.type == "cpu" else factor


def explicit_factors(
    rule: Rule, magnitudes: Tensor, time: float | Tensor, mask: Tensor | None, name: Callable[[int], str]
) -> float | Tensor:
    """Return 1 − t·c(n): one number where the rate is constant, else a tensor of the magnitudes' shape.

    Args:
        rule: The rule.
        magnitudes: n, of shape (units,). Units whose norm is zero or not finite get the factor 1.
        time: t.
        mask: Which of the units the rule acts on, or None for all.
        name: Returns the name of the parameter that the unit with this index belongs to, for an error.

    Raises:
        ValueError: t·c(n) ≥ 1 for a unit that the rule acts on. Reading this waits for CUDA.

    Example:
        >>> from normwise.decay.rules import L2
        >>> explicit_factors(L2(0.1), torch.tensor([2.0]), 0.5, None, lambda unit: "parameter 'w'")
        0.95
    """
    constant = rule.constant_rate
    if constant is not None:  # the very expression of AdamW
        if not float(time * constant) < 1:
            raise ValueError(_too_strong(name(0), float(time * constant), None, rule))
        return 1 - time * constant
    shrunk = time * rule.rate(magnitudes)
    shrunk = torch.where(has_direction(magnitudes), shrunk, torch.zeros_like(shrunk))
    acting = shrunk if mask is None else torch.where(mask, shrunk, torch.zeros_like(shrunk))
    if not bool((acting < 1).all()):
        worst = int(acting.nan_to_num(torch.inf).argmax())
        raise ValueError(_too_strong(name(worst), float(acting[worst]), float(magnitudes[worst]), rule))
    return 1 - shrunk


def _too_strong(name: str, strength: float, magnitude: float | None, rule: Rule) -> str:
    where = "" if magnitude is None else f" at magnitude {magnitude:.4g}"
    return (
        f'{name}: mode="explicit" would multiply it by 1 − {strength:.4g}{where} with {rule}, which flips or '
        'blows up the weight: use mode="flow", which is stable for any coefficient, or a smaller coefficient'
    )


def scale_unit(param: Tensor, factor: float | Tensor, unit: Unit) -> None:
    """Scale the units of one parameter in place; arguments as for :func:`scale_units`."""
    scale_units([param], [factor], [unit])


def scale_units(
    params: Sequence[Tensor],
    factors: Sequence[float | Tensor],
    units: Sequence[Unit],
    found_inf: Tensor | None = None,
) -> None:
    """Scale the units of parameters in place, unless a GradScaler skips the step.

    Args:
        params: The parameters; their storage is changed.
        factors: For each parameter a number or 0-dim tensor for all units, or a tensor with one value per
            unit.
        units: For each parameter its Unit, which knows the dim and the mask.
        found_inf: What the GradScaler left with a fused optimizer: 1 where the step is skipped.
    """
    by_number: dict[tuple[float, torch.device, torch.dtype], list[Tensor]] = {}
    by_tensor: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, Unit]]] = {}
    for param, factor, unit in zip(params, factors, units, strict=True):
        if isinstance(factor, Tensor) and factor.ndim == 0 and factor.device.type == "cpu":
            factor = factor.item()  # a kernel takes it in full precision, wherever the parameter is
        is_number = not isinstance(factor, Tensor) and _SMALLEST <= factor <= _LARGEST
        if is_number and unit.mask is None and found_inf is None:
            assert not isinstance(factor, Tensor)
            by_number.setdefault((factor, param.device, param.dtype), []).append(param)
            continue
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=wide_dtype(param.device), device=param.device)
        factor = factor.expand(unit.count)
        if unit.mask is not None:  # torch.where would make a tensor of the number first
            factor = factor.masked_fill(unit.mask.logical_not(), 1.0)
        if found_inf is not None:
            factor = factor.masked_fill(found_inf.to(param.device) > 0, 1.0)
        by_tensor.setdefault((param.device, param.dtype), []).append((param, factor, unit))
    for (number, device, dtype), some in by_number.items():
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            for param in some:  # torch._foreach_mul_ would round the number to this type
                param.mul_(number)
        else:
            torch._foreach_mul_(some, number)
    for (_, dtype), triples in by_tensor.items():
        joined = _for_product(torch.cat([factor for _, factor, _ in triples]), dtype)
        split = joined.split([unit.count for _, _, unit in triples])
        shaped = [unit.broadcast(f, param) for f, (param, _, unit) in zip(split, triples, strict=True)]
        if joined.dtype == dtype:
            torch._foreach_mul_([param for param, _, _ in triples], shaped)
        else:
            for factor, (param, _, unit) in zip(shaped, triples, strict=True):
                _scale_in_pieces(param, factor, unit)


def _for_product(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return factors in the type in which weights of type ``dtype`` are multiplied by them.

    This is float32 for weights of at most float32 and factors in its range. A factor beyond that range, new
    norm over old, stays in float64. On an accelerator, where looking would wait, all factors stay in float64,
    but with the value that they have in float32 where they are in its range: a float32 product has the same
    bits then.
    """
    wide = torch.promote_types(dtype, torch.float32)  # a factor rounded to bfloat16 would be 1
    if wide == wide_dtype(factors.device) or not factors.numel():
        return factors.to(wide)
    if factors.device.type == "cpu":
        low, high = (bound.item() for bound in torch.aminmax(factors))
        if low >= _SMALLEST and high <= _LARGEST:
            return factors.to(wide)
    factors = factors.to(torch.float64)
    ordinary = (factors >= _SMALLEST) & (factors <= _LARGEST)
    return torch.where(ordinary, factors.to(wide).to(torch.float64), factors)


def _scale_in_pieces(param: Tensor, factor: Tensor, unit: Unit) -> None:
    """Multiply a parameter by a factor of a wider type, piece by piece where torch makes a copy of it."""
    if param.numel() <= _COPIED_NUMEL or param.device.type != "cpu":
        param.mul_(factor)
        return
    rows = max(1, _COPIED_NUMEL * len(param) // param.numel())
    for start in range(0, len(param), rows):
        piece = slice(start, start + rows)
        param[piece].mul_(factor[piece] if unit.dim == 0 else factor)
