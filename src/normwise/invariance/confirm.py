"""The judge: rescale, shift and replace values, and see whether the outputs change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from normwise.invariance.narrow import CHUNK
from normwise.invariance.probe import Probe

__all__ = ["Judge"]

Item = TypeVar("Item")
Change = Callable[[Item, torch.Generator], None]


class Judge:
    """Compares outputs before and after values were changed, at two generic points, every eps shrunk.

    Args:
        probe: The probe.
        seeds: The points: each a batch, values and random draws.
    """

    def __init__(self, probe: Probe, seeds: Sequence[int]) -> None:
        self._probe, self._seeds = probe, seeds
        self._base: dict[int, list[Tensor]] = {}
        self.passes = 0

    def change(
        self, items: Sequence[Item], apply: Change[Item], touched: Callable[[Item], Sequence[int]]
    ) -> float:
        """Return the largest relative change of an output when ``apply`` is done to all ``items``.

        Args:
            items: What to change together.
            apply: Changes the stand-ins for one item, with random numbers from a generator.
            touched: The parameters that ``apply`` changes.
        """
        largest = 0.0
        for seed in self._seeds:
            if self._probe.seed != seed:
                self._probe.move_to(seed)
            if seed not in self._base:
                self._base[seed] = self._run()
            generator = torch.Generator().manual_seed(5_000_011 + seed)
            indices = sorted({k for item in items for k in touched(item)})
            try:
                with torch.no_grad():
                    for item in items:
                        apply(item, generator)
                largest = max(largest, _difference(self._base[seed], self._run()))
            finally:
                for k in indices:
                    self._probe.reset(k)
        return largest

    def offenders(
        self,
        items: Sequence[Item],
        apply: Change[Item],
        touched: Callable[[Item], Sequence[int]],
        tolerance: float,
    ) -> dict[int, float]:
        """Return {position in ``items``: change} of those that change the outputs, by bisection."""
        found: dict[int, float] = {}
        waiting = [list(range(len(items)))] if items else []
        while waiting:
            part = waiting.pop()
            change = self.change([items[i] for i in part], apply, touched)
            if change <= tolerance:
                continue
            if len(part) == 1:
                found[part[0]] = change
            else:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found

    def _run(self) -> list[Tensor]:
        self.passes += 1
        with torch.no_grad():
            found = self._probe.outputs(gradients=False)
        self._probe.release()
        return found


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest relative change of an output in Frobenius norm; infinity if its shape changed."""
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return float("inf")
        finite = old.isfinite()
        if not bool((finite == new.isfinite()).all()):
            return float("inf")
        zero = torch.zeros_like(old)
        old, new = torch.where(finite, old, zero), torch.where(finite, new, zero)
        size = torch.linalg.vector_norm(old)
        change = torch.linalg.vector_norm(new - old)
        if float(change) > 0:
            largest = max(largest, float(change / size) if float(size) > 0 else float("inf"))
    return largest


def scale_units(
    weight: Tensor, dim: int | None, generator: torch.Generator, where: Tensor | None = None
) -> None:
    """Multiply each unit of ``weight`` (or those in ``where``) by its own random factor from 1/8 to 8.

    The factors are powers of two, and not 1: the products are exact in any precision.
    """
    count = 1 if dim is None else weight.shape[dim]
    exponents = torch.randint(1, 4, (count,), generator=generator).double()
    factors = torch.exp2(torch.where(torch.rand(count, generator=generator) < 0.5, -exponents, exponents))
    if where is not None:
        factors = torch.where(where, factors, torch.ones_like(factors))
    _broadcast(weight, dim, factors, weight.mul_)


def shift_units(weight: Tensor, dim: int | None, generator: torch.Generator) -> None:
    """Add to each unit of ``weight`` its own random constant, of the size of the weights, in place."""
    count = 1 if dim is None else weight.shape[dim]
    constants = (
        torch.randn(count, generator=generator).to(weight)
        * torch.linalg.vector_norm(weight, 1)
        / weight.numel()
    )
    _broadcast(weight, dim, constants, weight.add_)


def replace_values(weight: Tensor, generator: torch.Generator, *, signs: bool) -> None:
    """Multiply each value by a random factor from 1/10 to 10, and with ``signs`` by a random sign."""
    for part in weight.split(max(1, CHUNK // max(1, weight[:1].numel()))) if weight.ndim else (weight,):
        factors = 10 ** (torch.rand(part.shape, generator=generator) * 2 - 1)
        if signs:
            factors *= torch.where(torch.rand(part.shape, generator=generator) < 0.5, -1.0, 1.0)
        part.mul_(factors.to(part))


def _broadcast(
    weight: Tensor, dim: int | None, numbers: Tensor, operation: Callable[[Tensor], Tensor]
) -> None:
    shape = [1] * weight.ndim
    if dim is not None:
        shape[dim] = weight.shape[dim]
    operation(numbers.to(weight).reshape(shape))
