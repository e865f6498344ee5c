"""Decay that is finer than a weight's precision, kept beside the weight until it can be seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.decay.scaling import scale_unit
from normwise.norms import slice_norms, wide_dtype
from normwise.units import Unit

__all__ = ["LARGEST_PENDING", "SMALLEST_PENDING", "KahanScale"]

# What is kept differs from 1 by a few units in the last place, and by more only for the subnormal numbers of
# a type, which have few digits.
SMALLEST_PENDING, LARGEST_PENDING = 0.25, 4.0


class KahanScale:
    """The factors that the precision of the weights could not represent: one per unit of each parameter.

    A shrink below half a unit in the last place (in bfloat16: below 2⁻⁹) rounds to nothing at every step. As
    Kahan's summation keeps what an addition lost, this class keeps the factor that a product lost. When the
    factor has grown to a unit in the last place, it is applied to the weight, and what rounding then took
    from the norm is kept again. So the *exact norm*, which is ``pending`` times the norm of the weight,
    follows the rule exactly, and the weight follows it to within one unit in the last place. Nothing is
    random.

    Args:
        units: This rank's part of each Unit.

    Attributes:
        pending: For each Unit and each of its parameters, the factors that are still to be applied.

    Example:
        >>> weight = torch.full((1, 4), 1.5, dtype=torch.bfloat16)
        >>> unit = Unit(weight)
        >>> kahan = KahanScale([unit])
        >>> for _ in range(9):  # each factor is too close to 1 to change the weight
        ...     kahan.scale(0, 0, unit, torch.tensor([1 - 2**-10]), None)
        >>> weight[0, 0].item(), round(kahan.norms(0).item() / 3, 6) == round((1 - 2**-10) ** 9, 6)
        (1.484375, True)
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.pending = [
            [torch.ones(unit.count, dtype=wide_dtype(p.device), device=p.device) for p in unit.params]
            for unit in units
        ]

    def norms(self, which: int) -> Tensor:
        """Return the exact norms of the units of a Unit, given its index."""
        unit = self.units[which]
        pairs = zip(unit.params, self.pending[which], strict=True)
        return functools.reduce(torch.hypot, (_norms(param, unit) * pending for param, pending in pairs))

    @torch.no_grad()
    def scale(
        self, which: int, place: int, unit: Unit, factor: float | Tensor, found_inf: Tensor | None
    ) -> None:
        """Scale a parameter, and keep the part of the factor that its precision cannot represent.

        Args:
            which: The index of the Unit.
            place: The index of the parameter in it.
            unit: This rank's part of the Unit.
            factor: A number, or a tensor with one value per unit.
            found_inf: 1 where a GradScaler skips the step, or None.
        """
        param, pending = unit.params[place], self.pending[which][place]
        before = _norms(param, unit)
        wanted = pending * factor
        if unit.mask is not None:
            wanted = torch.where(unit.mask, wanted, pending)
        if found_inf is not None:
            wanted = torch.where(found_inf.to(pending.device) > 0, pending, wanted)
        vanishes = (wanted < 0.5) & (before * wanted < torch.finfo(param.dtype).tiny * unit.numel**0.5)
        wanted = torch.where(vanishes, pending, wanted)
        visible = (wanted - 1).abs() >= torch.finfo(param.dtype).eps
        scale_unit(param, torch.where(visible, wanted, torch.ones_like(wanted)), unit)
        after = _norms(param, unit)
        lost = wanted * before / after
        is_kept = (lost >= SMALLEST_PENDING) & (lost <= LARGEST_PENDING)  # not where a norm is 0 or infinite
        pending.copy_(torch.where(is_kept, lost, torch.ones_like(lost)))


def _norms(param: Tensor, unit: Unit) -> Tensor:
    return slice_norms(param, unit.dim).reshape(-1)
