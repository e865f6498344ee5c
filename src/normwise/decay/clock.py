"""How much time passes in a step, and how much has passed since the rule was last applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.norms import wide_dtype

__all__ = ["CLOCKS", "Clock", "ElapsedTime", "check_rate"]

CLOCKS = ("lr", "lr^2/max_lr", "step")
Place = tuple[int, int]  # of a parameter: the index of its Unit, and its index in the Unit


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
        """Record the rates of this step. Called once a step, before ``time``.

        The rates of a step that a GradScaler makes a fused optimizer skip are not recorded. To know that,
        ``"lr^2/max_lr"`` under a GradScaler makes CUDA wait.
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
        check_rate(optimizer, group, self.kind)
        lr: float | Tensor = settings["lr"]
        if self.kind == "lr":
            return lr
        peak = self.max_lr[group]
        if isinstance(peak, Tensor):
            return torch.where(peak > 0, lr * lr / peak, torch.zeros_like(peak))
        return lr * lr / peak if peak > 0 else 0.0


def check_rate(optimizer: Optimizer, group: int, clock: str) -> None:
    """Raise a ValueError if the group with this index has no learning rate."""
    if optimizer.param_groups[group].get("lr") is None:
        found = "lr=None" if "lr" in optimizer.param_groups[group] else 'no "lr"'
        raise ValueError(
            f"clock={clock!r} needs a learning rate, and param_groups[{group}] of "
            f'{type(optimizer).__name__} has {found}: give the optimizer a rate, or use clock="step"'
        )


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


class ElapsedTime:
    """The time that has passed for each parameter since its rule was last applied.

    Parameters with the same history share one number, so a step costs a sum per group and not per parameter.

    Example:
        >>> elapsed = ElapsedTime()
        >>> elapsed.add([((0, 0), 0.5), ((1, 0), 0.5)], None)
        >>> elapsed.add([((0, 0), 0.25)], None)
        >>> elapsed[0, 0], elapsed[1, 0], (2, 0) in elapsed
        (0.75, 0.5, False)
    """

    def __init__(self) -> None:
        self._times: dict[Place, float | Tensor] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._times

    def __getitem__(self, place: Place) -> float | Tensor:
        return self._times[place]

    def add(self, times: Iterable[tuple[Place, float | Tensor]], found_inf: Tensor | None) -> None:
        """Add the time of a step.

        Args:
            times: (place, time) for each parameter that the step concerns.
            found_inf: 1 where a GradScaler skips the step, which then adds nothing; or None.
        """
        sums: dict[object, tuple[object, object, float | Tensor]] = {}
        for place, time in times:
            before = self._times.get(place)
            key = id(before), id(time)
            if key not in sums:  # holding both keeps their ids from being used again
                added = time if found_inf is None else _unless(found_inf, time)
                sums[key] = before, time, added + (0.0 if before is None else before)
            self._times[place] = sums[key][2]

    def clear(self, found_inf: Tensor | None) -> None:
        """Forget the times, as the rule was applied, except where ``found_inf`` says that it was not."""
        if found_inf is None:
            self._times = {}
            return
        kept = {id(time): _unless(found_inf == 0, time) for time in self._times.values()}
        self._times = {place: kept[id(time)] for place, time in self._times.items()}

    def state(self, counts: Iterable[int]) -> list[list[float | None]]:
        """Return the times as numbers, or None, given how many parameters each Unit has."""
        times = {place: float(time) for place, time in self._times.items()}
        return [[times.get((which, place)) for place in range(n)] for which, n in enumerate(counts)]

    def load(self, state: list[list[float | None]]) -> None:
        """Restore what :meth:`state` returned."""
        self._times = {
            (which, place): float(time)
            for which, times in enumerate(state)
            for place, time in enumerate(times)
            if time is not None
        }


def _unless(condition: Tensor, time: float | Tensor) -> Tensor:
    """Return the time as a tensor beside a condition, and 0 where the condition is not 0; nothing waits."""
    if not isinstance(time, Tensor) or time.device.type == "cpu":
        device = condition.device
        time = torch.full((), float(time), dtype=wide_dtype(device), device=device)
    return time.masked_fill(condition.to(time.device).reshape(()) > 0, 0.0)
