"""The final check: rescale, shift or replace values, and see whether the outputs change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from normwise.invariance.probe import NonFiniteOutputsError, Probe, ProbeMode
from normwise.invariance.stand_ins import CHUNK

__all__ = [
    "RescaleCheck",
    "exponents_of_two",
    "replace_values",
    "scale_units",
    "shift_units",
]

Item = TypeVar("Item")
Change = Callable[[Item, torch.Generator], None]


def directions(count: int) -> list[list[bool]]:
    """Return for each of several trials whether to use the inverse of each item's factor.

    What two items change may cancel: the pre-activation of a clamp keeps its size if one item makes it larger
    and the other smaller. So two items are inverted in all four ways: neither, both, and each alone. Their
    positions differ in some binary digit, so one trial for each digit, and one for its complement, do the
    latter.

    Example:
        >>> directions(2)
        [[False, False], [True, True], [False, True], [True, False]]
    """
    digits = range((count - 1).bit_length())
    by_digit = [[bool(i >> digit & 1) for i in range(count)] for digit in digits]
    return [[False] * count, [True] * count, *by_digit, *([not bit for bit in bits] for bits in by_digit)]


class RescaleCheck:
    """Compares outputs before and after a change of values, at several generic points with shrunk eps.

    Args:
        probe: The probe.
        seeds: The numbers of the points; each has a batch, values and random draws.

    Attributes:
        modes: {seed: how the probe runs at this point}.
        passes: The number of forward passes so far.
    """

    def __init__(self, probe: Probe, seeds: Sequence[int]) -> None:
        self._probe = probe
        self.modes = dict.fromkeys(seeds, ProbeMode())
        self._unchanged: dict[tuple[int, bool, float], list[Tensor]] = {}
        self.passes = 0

    def remember(self, seed: int, outputs: list[Tensor]) -> None:
        """Take the outputs at a point's unchanged values from a pass that has run there in the same mode."""
        self._unchanged[seed, False, self._probe.eps_factor] = outputs

    def forget(self) -> None:
        """Forget the outputs at unchanged values, after the way in which these are stored has changed."""
        self._unchanged.clear()

    def output_change(
        self,
        items: Sequence[Item],
        apply: Change[Item],
        touched: Callable[[Item], Sequence[int]],
        *,
        real_constants: bool = False,
        trial: int = 0,
        seeds: Sequence[int] = (),
    ) -> float:
        """Return the largest relative change of an output when all ``items`` change together.

        Args:
            items: What to change.
            apply: Changes the stand-ins for one item, with random numbers from a generator.
            touched: Returns the parameters that ``apply`` changes.
            real_constants: Whether small constants that are added keep their values.
            trial: The random numbers are others in another trial.
            seeds: The points. Default: all.
        """
        largest = 0.0
        indices = sorted({k for item in items for k in touched(item)})
        # Moving takes time: begin where the probe is.
        seeds = sorted(seeds or self.modes, key=lambda seed: seed != self._probe.seed)
        try:
            for seed in seeds:
                before = self.unchanged(seed, real_constants=real_constants)
                generator = torch.Generator().manual_seed(5_000_011 + seed + 1_009 * trial)
                with torch.no_grad():
                    for item in items:
                        apply(item, generator)
                try:
                    largest = max(largest, _relative_change(before, self._run()))
                except NonFiniteOutputsError:  # the factors of several items are too large together
                    largest = float("inf")
        finally:
            for k in indices:
                self._probe.reset(k)
            self._probe.mode = ProbeMode()
        return largest

    def unchanged(self, seed: int, *, real_constants: bool = False) -> list[Tensor]:
        """Move to a point, and return the outputs there. The probe stays in the mode of this point."""
        self._probe.mode = self.modes[seed]._replace(real_constants=real_constants)
        self._probe.move_to(seed)
        key = seed, real_constants, self._probe.eps_factor
        if key not in self._unchanged:
            self._unchanged[key] = self._run()
        return self._unchanged[key]

    def failures(
        self,
        items: Sequence[Item],
        apply: Change[Item],
        touched: Callable[[Item], Sequence[int]],
        tolerance: float,
        *,
        real_constants: bool = False,
        trial: int = 0,
        seeds: Sequence[int] = (),
    ) -> dict[int, float]:
        """Return {position in ``items``: change} for the items that change the outputs, by bisection.

        If all of them together change nothing, none fails, although what two of them change may cancel.
        """
        failed: dict[int, float] = {}
        waiting = [list(range(len(items)))] if items else []
        while waiting:
            positions = waiting.pop()
            change = self.output_change(
                [items[i] for i in positions],
                apply,
                touched,
                real_constants=real_constants,
                trial=trial,
                seeds=seeds,
            )
            if change <= tolerance:
                continue
            if len(positions) == 1:
                failed[positions[0]] = change
            else:
                middle = len(positions) // 2
                waiting += [positions[:middle], positions[middle:]]
        return failed

    def refuted(
        self,
        items: Sequence[Item],
        apply: Callable[[Item, torch.Generator, bool], None],
        touched: Callable[[Item], Sequence[int]],
        tolerance: float,
        *,
        real_constants: bool = False,
    ) -> dict[int, float]:
        """Return {position in ``items``: change} for the items that fail in any trial of :func:`directions`.

        ``apply`` also receives whether to use the inverse of the item's factor.
        """
        failed: dict[int, float] = {}
        points = list(self.modes)
        trials = directions(len(items))

        def touched_at(place: int) -> Sequence[int]:
            return touched(items[place])

        for trial, inverses in enumerate(trials):
            # Two trials run at all points; the others run at one point each, with few moves.
            seeds = points if trial < 2 else [points[trial * len(points) // len(trials)]]

            def apply_at(place: int, generator: torch.Generator, inverses: list[bool] = inverses) -> None:
                apply(items[place], generator, inverses[place])

            places = [place for place in range(len(items)) if place not in failed]
            found = self.failures(
                places,
                apply_at,
                touched_at,
                tolerance,
                real_constants=real_constants,
                trial=trial,
                seeds=seeds,
            )
            found = {places[position]: change for position, change in found.items()}
            if real_constants:
                failed |= found
                continue
            failed |= self._failing_without_eps(found, apply_at, touched_at, tolerance, trial, seeds)
        return failed

    def _failing_without_eps(
        self,
        found: dict[int, float],
        apply: Change[int],
        touched: Callable[[int], Sequence[int]],
        tolerance: float,
        trial: int,
        seeds: Sequence[int],
    ) -> dict[int, float]:
        """Return what fails too where every eps is far smaller still.

        A small factor makes the shrunk eps matter again, the more so where a norm reads a product of values
        that all become smaller.
        """
        eps_factor = self._probe.eps_factor
        self._probe.eps_factor = eps_factor**2
        failed: dict[int, float] = {}
        try:
            for place, change in found.items():
                try:
                    without_eps = self.output_change([place], apply, touched, trial=trial, seeds=seeds)
                except NonFiniteOutputsError:  # the eps kept a value finite
                    without_eps = change
                if without_eps > tolerance:
                    failed[place] = change
        finally:
            self._probe.eps_factor = eps_factor
        return failed

    def _run(self) -> list[Tensor]:
        self.passes += 1
        with torch.no_grad():
            outputs = self._probe.outputs(gradients=False)
        self._probe.release()
        return outputs


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
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


def exponents_of_two(count: int, generator: torch.Generator, doublings: float) -> Tensor:
    """Return random exponents of powers of two, whole numbers up to ``doublings`` and never 0.

    Such factors are exact. Below 1, ``doublings`` itself is the exponent of all.
    """
    if doublings < 1:
        return torch.full((count,), doublings, dtype=torch.float64)
    most = int(doublings)
    return torch.randint(max(1, most - 3), most + 1, (count,), generator=generator).double()


def scale_units(
    weight: Tensor,
    dim: int | None,
    generator: torch.Generator,
    where: Tensor | None = None,
    *,
    doublings: float,
    inverse: bool | None = None,
) -> None:
    """Multiply each unit of ``weight`` (or those in ``where``) by a random factor, in place.

    See :func:`exponents_of_two`; half of the factors are inverses of these. Where there is one unit,
    ``inverse`` says whether its factor is.
    """
    count = 1 if dim is None else weight.shape[dim]
    exponents = exponents_of_two(count, generator, doublings)
    inverted = torch.rand(count, generator=generator) < 0.5
    if inverse is not None and count == 1:
        inverted = torch.tensor([inverse])
    factors = torch.exp2(torch.where(inverted, -exponents, exponents))
    if where is not None:
        factors = torch.where(where, factors, torch.ones_like(factors))
    _broadcast(weight, dim, factors, weight.mul_)


def shift_units(weight: Tensor, dim: int | None, generator: torch.Generator) -> None:
    """Add a random constant, as large as a typical weight, to each unit of ``weight``, in place."""
    count = 1 if dim is None else weight.shape[dim]
    constants = (
        torch.randn(count, generator=generator, dtype=_draw_type(weight)).to(weight)
        * torch.linalg.vector_norm(weight, 1)
        / weight.numel()
    )
    _broadcast(weight, dim, constants, weight.add_)


def replace_values(
    weight: Tensor, generator: torch.Generator, *, signs: bool = False, decades: float = 1.0
) -> None:
    """Multiply each value by a random factor, up to so many ``decades`` from 1, in place.

    With ``signs``, multiply it by a random sign (a complex value by a random phase) as well.
    """
    for chunk in weight.split(max(1, CHUNK // max(1, weight[:1].numel()))) if weight.ndim else (weight,):
        factors = 10 ** (decades * (torch.rand(chunk.shape, generator=generator) * 2 - 1))
        if signs:
            draws = torch.randn(chunk.shape, generator=generator, dtype=_draw_type(chunk))
            factors = factors * draws.sgn()
        chunk.mul_(factors.to(chunk))


def _draw_type(weight: Tensor) -> torch.dtype:
    return torch.complex64 if weight.is_complex() else torch.float32


def _broadcast(
    weight: Tensor, dim: int | None, numbers: Tensor, operation: Callable[[Tensor], Tensor]
) -> None:
    shape = [1] * weight.ndim
    if dim is not None:
        shape[dim] = weight.shape[dim]
    operation(numbers.to(weight).reshape(shape))
