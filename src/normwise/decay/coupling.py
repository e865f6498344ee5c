"""Mode "coupled": the optimizer sees ∇ + c(n)·w for ∇, for the length of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.arithmetic import add_pull
from normwise.decay.checks import name_of
from normwise.decay.live import Live, magnitudes_of
from normwise.decay.rules import Rule
from normwise.sharding import like, local_tensor, placed_as
from normwise.units import Unit

__all__ = ["Coupling"]


class _Swap(NamedTuple):
    param: Tensor
    grad: Tensor
    changed: Tensor


class Coupling:
    """Adds the pull of a rule to gradients, and puts the gradients back."""

    def __init__(self) -> None:
        self._swaps: list[_Swap] = []

    @torch.no_grad()
    def add(
        self,
        optimizer: Optimizer,
        rule: Rule,
        units: list[tuple[Unit, ...]],
        live: list[Live],
        measure: str,
    ) -> None:
        """Replace the gradients by their sum with the pull, where that is not done already.

        ``units`` are all Units of the Decay, as :func:`normwise.units.local_units` returned them.

        It may be: a subclass whose step() calls super().step() is asked twice, and a step that raised has
        left its gradients replaced.

        Raises:
            ValueError: A gradient is sparse; then nothing has been changed.
        """
        for one in live:
            if one.owner.grad is not None and one.owner.grad.is_sparse:
                raise ValueError(
                    f'{name_of(optimizer, one.owner)} has a sparse gradient, to which mode="coupled" cannot '
                    'add a dense pull: use mode="flow"'
                )
        if self._swaps:
            return
        scale = getattr(optimizer, "grad_scale", None)
        masked = any(unit.mask is not None for parts in units for unit in parts)
        plain = rule.constant_rate is not None and scale is None and not masked  # no norm is needed
        seen = [torch.empty(0)] * len(live) if plain else magnitudes_of(live, units, measure)
        for one, magnitudes in zip(live, seen, strict=True):
            owner, grad = one.owner, one.owner.grad
            assert grad is not None  # or it would not be live
            sign = -1.0 if optimizer.param_groups[one.group].get("maximize") else 1.0
            local = local_tensor(placed_as(owner, grad))
            owner.grad = like(add_pull(local, one.param, one.unit, rule, magnitudes, sign, scale), owner)
            self._swaps.append(_Swap(owner, grad, owner.grad))

    def restore(self) -> None:
        """Put the gradients back as they were before the step."""
        for param, grad, changed in self._swaps:
            if param.grad is changed:
                param.grad = grad
        self._swaps = []
