"""Decay that is finer than a weight's precision, kept beside the weight until it can be seen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from normwise.decay.arithmetic import multiply
from normwise.decay.live import Live
from normwise.norms import slice_norms, wide_dtype
from normwise.units import Unit

__all__ = ["Compensation"]


class Compensation:
    """A compensated scale: one factor per unit of each parameter, by which the weight that is meant differs.

    A shrink below half a unit in the last place (in bfloat16: below 2⁻⁹) rounds to nothing, at every step.
    So the factor that could not be applied is kept, as Kahan's summation keeps what an addition lost. It is
    applied when it has grown to a unit in the last place, and what the norm then lost to rounding is kept in
    its turn. So the norm that is meant, ``pending`` times the norm of the weight, follows the rule exactly,
    and the weight follows it to within one unit in the last place. Nothing is random.

    Attributes:
        pending: For each Unit and each of its parameters, the factors that are still to come.

    Example:
        >>> weight = torch.full((1, 4), 1.5, dtype=torch.bfloat16)
        >>> unit = Unit(weight)
        >>> compensation = Compensation((unit,))
        >>> for _ in range(9):  # each too little to be seen
        ...     compensation.multiply(Live(0, 0, unit, weight, 0, weight), torch.tensor([1 - 2**-10]), None)
        >>> weight[0, 0].item(), round(compensation.norms(0).item() / 3, 6) == round((1 - 2**-10) ** 9, 6)
        (1.484375, True)
    """

    def __init__(self, units: tuple[Unit, ...]) -> None:
        self.units = units
        self.pending = [
            [torch.ones(unit.count, dtype=wide_dtype(p.device), device=p.device) for p in unit.params]
            for unit in units
        ]

    def norms(self, which: int) -> Tensor:
        """Return the norms that are meant, of the units of one Unit."""
        unit = self.units[which]
        scaled = zip(unit.params, self.pending[which], strict=True)
        return functools.reduce(torch.hypot, (_norms(param, unit) * factors for param, factors in scaled))

    @torch.no_grad()
    def multiply(self, one: Live, factor: float | Tensor, found_inf: Tensor | None) -> None:
        """Multiply what is meant, and of the weight what can be seen."""
        pending = self.pending[one.which][one.place]
        before = _norms(one.param, one.unit)
        wanted = pending * factor
        if one.unit.mask is not None:
            wanted = torch.where(one.unit.mask, wanted, pending)
        if found_inf is not None:
            wanted = torch.where(found_inf.to(pending.device) > 0, pending, wanted)
        visible = (wanted - 1).abs() >= torch.finfo(one.param.dtype).eps
        multiply(one.param, torch.where(visible, wanted, torch.ones_like(wanted)), one.unit)
        after = _norms(one.param, one.unit)
        kept = wanted * before / after
        pending.copy_(torch.where((after > 0) & kept.isfinite(), kept, torch.ones_like(kept)))


def _norms(param: Tensor, unit: Unit) -> Tensor:
    return slice_norms(param, unit.dim).reshape(-1)
