"""Mode "coupled": the optimizer sees ∇ + c(n)·w for ∇, for the length of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.arithmetic import add_pull
from normwise.decay.checks import name_of
from normwise.decay.live import Live, magnitudes
from normwise.decay.rules import Rule

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
    def add(self, optimizer: Optimizer, rule: Rule, live: list[Live], measure: str) -> None:
        """Replace the gradients by their sum with the pull, where that is not done already.

        It may be: a subclass whose step() calls super().step() is asked twice, and a step that raised has
        left its gradients replaced.

        Raises:
            ValueError: A gradient is sparse; then nothing has been changed.
        """
        for one in live:
            if one.param.grad is not None and one.param.grad.is_sparse:
                raise ValueError(
                    f'{name_of(optimizer, one.param)} has a sparse gradient, to which mode="coupled" cannot '
                    'add a dense pull: use mode="flow"'
                )
        if self._swaps:
            return
        scale = getattr(optimizer, "grad_scale", None)
        for one in live:
            grad, param = one.param.grad, one.param
            assert grad is not None  # or it would not be live
            sign = -1.0 if optimizer.param_groups[one.group].get("maximize") else 1.0
            seen = magnitudes(one.unit.norms(), one.unit, measure)
            param.grad = add_pull(grad, param, one.unit, rule, seen, sign, scale)
            self._swaps.append(_Swap(param, grad, param.grad))

    def restore(self) -> None:
        """Put the gradients back as they were before the step."""
        for param, grad, changed in self._swaps:
            if param.grad is changed:
                param.grad = grad
        self._swaps = []
