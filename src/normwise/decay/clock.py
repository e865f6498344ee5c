"""How much time passes in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["CLOCKS", "Clock"]

CLOCKS = ("lr", "lr^2/max_lr", "step")


class Clock:
    """The time of the step that is being taken, for each group of an optimizer.

    Args:
        kind: ``"lr"``, the learning rate of the group; ``"lr^2/max_lr"``, the same times its ratio to the
            largest rate of the group so far (Defazio, arXiv 2506.02285); ``"step"``, 1.

    Attributes:
        max_lr: The largest rate of each group so far; kept for ``"lr^2/max_lr"`` only.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> clock = Clock("lr^2/max_lr")
        >>> clock.advance(optimizer)
        >>> optimizer.param_groups[0]["lr"] = 0.25
        >>> clock.advance(optimizer)
        >>> clock.time(optimizer, 0)
        0.125
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.max_lr: list[float | Tensor] = []

    def advance(self, optimizer: Optimizer) -> None:
        """Take note of the rates of this step; called once a step, before ``time``.

        Not of the rates of a step that a GradScaler makes a fused optimizer skip (which for
        ``"lr^2/max_lr"`` under a GradScaler makes CUDA wait).
        """
        if self.kind == "lr^2/max_lr":
            taken = not getattr(optimizer, "found_inf", None)
            rates = [group.get("lr", 0.0) if taken else 0.0 for group in optimizer.param_groups]
            before = self.max_lr + [0.0] * (len(rates) - len(self.max_lr))
            self.max_lr = [_larger(a, b) for a, b in zip(before, rates, strict=True)]

    def time(self, optimizer: Optimizer, group: int) -> float | Tensor:
        """Return the time that passes for the group with this index; a Tensor where its rate is one.

        Raises:
            ValueError: The group has no learning rate.
        """
        if self.kind == "step":
            return 1.0
        settings: dict[str, Any] = optimizer.param_groups[group]
        if "lr" not in settings:
            raise ValueError(
                f"clock={self.kind!r} needs a learning rate, and param_groups[{group}] of "
                f'{type(optimizer).__name__} has no "lr": use clock="step"'
            )
        lr: float | Tensor = settings["lr"]
        if self.kind == "lr":
            return lr
        peak = self.max_lr[group]
        if isinstance(peak, Tensor):
            return torch.where(peak > 0, lr * lr / peak, torch.zeros_like(peak))
        return lr * lr / peak if peak > 0 else 0.0


def _larger(peak: float | Tensor, rate: float | Tensor) -> float | Tensor:
    """Return the larger of the two, in the memory of the peak if it has one: a CUDA graph reads it there."""
    if not isinstance(peak, Tensor) and not isinstance(rate, Tensor):
        return max(peak, rate)
    if not isinstance(peak, Tensor):
        assert isinstance(rate, Tensor)
        peak = torch.full_like(rate, peak)
    if not isinstance(rate, Tensor):  # not as_tensor(rate).to(device), which would wait for the device
        rate = torch.full_like(peak, rate)
    peak = peak.to(rate)  # a peak from a checkpoint may lie elsewhere
    return torch.maximum(peak, rate, out=peak)
