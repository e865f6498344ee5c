"""All joint rescaling symmetries: gather rows until the rank stands still, solve, confirm."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from normwise.invariance.confirm import Judge
from normwise.invariance.elasticity import Array, Row, gather
from normwise.invariance.groups import jointly_invariant_groups
from normwise.invariance.parts import Part, merge_parts
from normwise.invariance.probe import Probe
from normwise.invariance.progress import Progress
from normwise.invariance.result import Invariances
from normwise.invariance.symmetries import Integers, integer_basis, null_space, numerical_rank
from normwise.invariance.thresholds import Thresholds

__all__ = ["find_joint"]

_STILL = 8  # rows without a new rank
_AT_ONCE = 8  # cotangents that share a forward pass
_FIRST_SEED = 16  # the verdicts use lower ones


@dataclass(frozen=True)
class _Column:
    """What is rescaled with one exponent: a parameter, or a part of it."""

    index: int
    part: Part | None = None

    def of(self, row: Row) -> float:
        """Return its elasticity."""
        if self.part is None:
            return float(row.elasticity[self.index])
        sums = row.units.get((self.index, self.part.dim))
        return 0.0 if sums is None else float(self._folded(sums.scale).sum())

    def speaks(self, rows: Sequence[Row], at: Thresholds) -> bool:
        """Return whether a part has an effect and is not invariant alone."""
        assert self.part is not None
        units = [sums for row in rows if (sums := row.units.get((self.index, self.part.dim))) is not None]
        total = sum(float(sums.scale_squares.sum()) for sums in units)
        own = sum(float(self._folded(sums.scale_squares).sum()) for sums in units)
        return own > at.silent**2 * total and sum(self.of(row) ** 2 for row in rows) > at.invariant**2 * own

    def tensor(self, probe: Probe) -> Tensor:
        """Return the stand-in, or the view of its part."""
        whole = probe.parameters[self.index]
        return whole if self.part is None else self.part.of(whole.detach())

    def _folded(self, sums: Array) -> Array:
        assert self.part is not None
        return sums.reshape(-1, self.part.period)[:, self.part.start : self.part.stop]


def find_joint(
    probe: Probe,
    rows: list[Row],
    splits: list[list[Part]],
    result: Invariances,
    at: Thresholds,
    judge: Judge,
    bar: Progress,
) -> None:
    """Enter the joint symmetries of the parameters that have an effect and are not invariant alone.

    Args:
        probe: The probe.
        rows: The rows of the verdicts, with the sums over units of the parameters in ``splits``.
        splits: Parameters that may divide into parts.
        result: Has the verdicts; receives the symmetries.
        at: The thresholds.
        judge: Confirms by rescaling.
        bar: Shows the progress.
    """
    taken = [
        k for k, name in enumerate(probe.names) if name in result.not_invariant or name in result.partial
    ]
    if not taken:
        return
    columns = _columns(taken, splits, rows, at)
    # The gradients of the others are not needed: for convolutions that is half of the backward pass.
    others = [p for k, p in enumerate(probe.parameters) if k not in set(taken)]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        matrix = _gather_until_still(probe, rows, columns, taken, at, bar)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
    result.stats.rows, result.stats.rank = len(matrix), numerical_rank(matrix, at.null)
    parts = np.array([column.part is not None for column in columns])
    null = null_space(matrix, at.null)
    basis = integer_basis(matrix, null, at.null, parts)
    result.unnamed_joint = null.shape[1] - len(basis)
    if result.unnamed_joint:
        warnings.warn(
            f"{result.unnamed_joint} of {null.shape[1]} joint symmetries have no small integers for "
            "exponents, and are left out: either they have others, or the output tells too little about some "
            "weights, as in the first layers of a deep network whose gradients vanish",
            stacklevel=4,
        )
    confirmed, rejected = _confirmed(probe, basis, columns, judge, at)
    result.parts = _parts(confirmed, columns, probe)
    for kind, found in (
        (result.joint, confirmed),
        (result.unconfirmed_joint, rejected),
        (result.groups, jointly_invariant_groups(confirmed)),
    ):
        kind += [_named(exponents, columns, result.parts, probe) for exponents in found]


def _columns(
    taken: Sequence[int], splits: list[list[Part]], rows: Sequence[Row], at: Thresholds
) -> list[_Column]:
    """Return a column for each parameter or part; none for parts without effect or invariant alone."""
    parts = {own[0].index: own for own in splits}
    columns = []
    for k in taken:
        speaking = [c for part in parts.get(k, ()) if (c := _Column(k, part)).speaks(rows, at)]
        columns += speaking if len(speaking) > 1 else [_Column(k)]
    return columns


def _gather_until_still(
    probe: Probe,
    rows: Sequence[Row],
    columns: Sequence[_Column],
    taken: Sequence[int],
    at: Thresholds,
    bar: Progress,
) -> Array:
    """Return rows × columns, with rows added until the rank has not grown for eight of them."""
    matrix = np.array([[column.of(row) for column in columns] for row in rows])
    detailed = {column.index for column in columns if column.part is not None}
    seed = _FIRST_SEED
    while True:
        earlier = matrix[:-_STILL] if len(matrix) > _STILL else matrix[:0]
        rank = numerical_rank(matrix, at.null)
        if len(earlier) and numerical_rank(earlier, at.null) == rank:
            return matrix
        found = gather(probe, seed, _AT_ONCE, detailed, moved=taken)
        fresh = np.array([[column.of(row) for column in columns] for row in found])
        matrix = np.concatenate([matrix, fresh])
        bar.update("joint symmetries", len(matrix), len(columns) + _STILL)
        seed += 1


def _key(column: _Column, probe: Probe) -> str:
    name = probe.names[column.index]
    return name if column.part is None else column.part.key(name)


def _parts(basis: list[Integers], columns: Sequence[_Column], probe: Probe) -> dict[str, list[str]]:
    """Return {parameter: its parts} of those whose parts have different exponents in some symmetry."""
    found: dict[str, list[str]] = {}
    for k in {column.index for column in columns if column.part is not None}:
        places = [i for i, column in enumerate(columns) if column.index == k]
        if any(len({int(e[i]) for i in places}) > 1 for e in basis):
            found[probe.names[k]] = [_key(columns[i], probe) for i in places]
    return {name: found[name] for name in probe.names if name in found}


def _named(
    exponents: Integers, columns: Sequence[_Column], parts: dict[str, list[str]], probe: Probe
) -> dict[str, int]:
    named: dict[str, int] = {}
    for column, e in zip(columns, exponents, strict=True):
        if e:
            name = probe.names[column.index]
            named[_key(column, probe) if name in parts else name] = int(e)
    return merge_parts(named, parts)


def _confirmed(
    probe: Probe, basis: list[Integers], columns: Sequence[_Column], judge: Judge, at: Thresholds
) -> tuple[list[Integers], list[Integers]]:
    """Return the symmetries that rescaling confirms, and the others."""

    def rescale(exponents: Integers, generator: torch.Generator, sign: float) -> None:
        # Far enough, both ways, to leave the part of a ReLU6 or a clamp that happens to be linear here;
        # by powers of two, which are exact in any precision.
        largest = int(np.abs(exponents).max())
        size = sign * (int(torch.randint(1, 4, (), generator=generator)) if largest == 1 else 1)
        for column, e in zip(columns, exponents, strict=True):
            if e:
                column.tensor(probe).mul_(2.0 ** (size * int(e)))

    def touched(exponents: Integers) -> list[int]:
        return [column.index for column, e in zip(columns, exponents, strict=True) if e]

    up = judge.offenders(basis, functools.partial(rescale, sign=1.0), touched, at.unchanged)
    failed = up | judge.offenders(basis, functools.partial(rescale, sign=-1.0), touched, at.unchanged)
    return [e for i, e in enumerate(basis) if i not in failed], [
        e for i, e in enumerate(basis) if i in failed
    ]
