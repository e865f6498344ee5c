"""What becomes of units that get no gradient any more, when decay goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.lab.runs.settings import Settings, rule_from
from normwise.norms import slice_norms

__all__ = ["DeadSettings", "decay_dead_units"]

EVERY = 20  # steps between two looks


@dataclass(frozen=True, kw_only=True)
class DeadSettings(Settings):
    """Decay units of norm 1 that receive a gradient of zero at each step.

    Attributes:
        rule: The rule's settings (``Rule.settings``).
        mode: Mode of ``normwise.Decay``.
        dtype: Name of the type of the weights.
        lr: Learning rate, constant.
        length: Number of steps.
        units: How many units.
        size: Elements of each.
    """

    kind: ClassVar[str] = "dead"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.dead_units:decay_dead_units"

    rule: dict[str, Any]
    mode: str = "flow"
    dtype: str = "float32"
    lr: float = 0.1
    length: int = 2500
    units: int = 4
    size: int = 36

    @property
    def cost(self) -> float:
        """Seconds, roughly."""
        return 0.1 + 2e-4 * self.length


def decay_dead_units(settings: DeadSettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Decay for many steps, and look every 20 steps at the norms and at what the formulas give.

    Args:
        settings: The run.
        log: Is called at each look with the step and the median norm.

    Returns:
        The summary: the smallest norm at the end; the first step found, or None, at which a norm was 0
        (``zero_at``), at which torch's own weight normalisation gave a number that is not finite
        (``torch_fails_at``, by ``torch._weight_norm``, value or gradient) and at which ours did
        (``ours_fails_at``). ``status`` is "refused" where the mode refused the coefficient.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    start = torch.randn(settings.units, settings.size, generator=generator)
    weight = nn.Parameter(nw.functional.weight_norm(start).to(getattr(torch, settings.dtype)))
    optimizer = torch.optim.SGD([weight], settings.lr)
    rule = rule_from(settings.rule)
    if rule is None:
        raise ValueError("rule=None: without decay a unit without a gradient stays as it is")
    nw.Decay(optimizer, rule, weight, mode=settings.mode)
    found: dict[str, int | None] = {"zero_at": None, "torch_fails_at": None, "ours_fails_at": None}
    for step in range(1, settings.length + 1):
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
        for what, is_there in seen.items():
            if is_there and found[what] is None:
                found[what] = step
    smallest = float(slice_norms(weight).min())
    if not math.isfinite(smallest):
        return {"status": "not finite", "step": settings.length, "reason": f"a norm was {smallest}"}
    return {"status": "finished", "step": settings.length, "smallest_norm": smallest, **found}


def _torch_weight_norm(weight: Tensor) -> Tensor:
    return torch._weight_norm(weight, weight.new_ones(len(weight), 1), 0)


def _finite(formula: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Whether the formula's values are finite, and the gradient of their sum too.

    A gradient that is too large for the type of a tiny weight is mathematics, not a fault: only NaN counts.
    """
    leaf = weight.detach().clone().requires_grad_()
    out = formula(leaf)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    return bool(out.isfinite().all()) and not bool(gradient.isnan().any())
