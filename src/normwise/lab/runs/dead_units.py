"""What decay does to units whose gradient is zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.lab.engine.run import Log, Metrics, Run
from normwise.lab.runs.base import rule_from
from normwise.norms import slice_norms

__all__ = ["DeadUnitsRun"]

EVERY = 20  # steps between two checks


@dataclass(frozen=True, kw_only=True)
class DeadUnitsRun(Run):
    """Decay units of initial norm 1 that receive a zero gradient at every step.

    Attributes:
        rule: Settings of the rule (``Rule.settings``).
        mode: Mode of ``normwise.Decay``.
        dtype: Name of the type of the weights.
        lr: Learning rate, constant.
        length: Number of steps.
        units: Number of units.
        size: Elements per unit.
    """

    rule: dict[str, Any]
    mode: str = "flow"
    dtype: str = "float32"
    lr: float = 0.1
    length: int = 2500
    units: int = 4
    size: int = 36

    @property
    def cost(self) -> float:
        """Rough number of seconds."""
        return 0.1 + 2e-4 * self.length

    def run(self, log: Log) -> Metrics:
        """Decay for many steps; every 20 steps, check the norms and the weight-normalisation formulas.

        Args:
            log: Called at each check with the step and the median norm.

        Returns:
            The summary: the smallest norm at the end, and the first checked step, or None, at which a norm
                was 0
            (``zero_at``), at which torch's weight normalisation (``torch._weight_norm``) gave a value or
            gradient that is not finite (``torch_fails_at``), and at which ours did (``ours_fails_at``).
            ``status`` is "refused" if the mode refused the coefficient.
        """
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(self.units, self.size, generator=generator)
        weight = nn.Parameter(nw.functional.weight_norm(start).to(getattr(torch, self.dtype)))
        optimizer = torch.optim.SGD([weight], self.lr)
        rule = rule_from(self.rule)
        if rule is None:
            raise ValueError("rule=None: without decay, a unit without a gradient never changes: give a rule")
        nw.Decay(optimizer, rule, weight, mode=self.mode)
        first: dict[str, int | None] = {"zero_at": None, "torch_fails_at": None, "ours_fails_at": None}
        for step in range(1, self.length + 1):
            weight.grad = torch.zeros_like(weight)
            try:
                optimizer.step()
            except ValueError as error:
                return {"status": "refused", "step": step, "reason": str(error)}
            if step % EVERY:
                continue
            norms = slice_norms(weight)
            log({"step": step, "norm": float(norms.median())})
            seen = {
                "zero_at": bool((norms == 0).any()),
                "torch_fails_at": not _finite(_torch_weight_norm, weight),
                "ours_fails_at": not _finite(nw.functional.weight_norm, weight),
            }
            for event, happened in seen.items():
                if happened and first[event] is None:
                    first[event] = step
        smallest = float(slice_norms(weight).min())
        if not math.isfinite(smallest):
            return {"status": "not finite", "step": self.length, "reason": f"a norm was {smallest}"}
        return {"status": "finished", "step": self.length, "smallest_norm": smallest, **first}


def _torch_weight_norm(weight: Tensor) -> Tensor:
    return torch._weight_norm(weight, weight.new_ones(len(weight), 1), 0)


def _finite(formula: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Return whether the formula's values are finite and the gradient of their sum is not NaN.

    An infinite gradient is correct where the exact one exceeds the range of the type, so only NaN counts.
    """
    leaf = weight.detach().clone().requires_grad_()
    out = formula(leaf)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    return bool(out.isfinite().all()) and not bool(gradient.isnan().any())
