"""All joint rescaling symmetries: gather rows until the rank stands still, solve, confirm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from normwise.invariance.confirm import Judge
from normwise.invariance.elasticity import Array, Row, gather
from normwise.invariance.groups import jointly_invariant_groups
from normwise.invariance.probe import Probe
from normwise.invariance.progress import Progress
from normwise.invariance.result import Invariances
from normwise.invariance.symmetries import Integers, integer_basis, null_space, numerical_rank
from normwise.invariance.thresholds import Thresholds

__all__ = ["find_joint"]

_STILL = 8  # rows without a new rank
_AT_ONCE = 8  # cotangents that share a forward pass
_FIRST_SEED = 16  # the verdicts use lower ones


def find_joint(
    probe: Probe, rows: list[Row], result: Invariances, at: Thresholds, judge: Judge, bar: Progress
) -> None:
    """Enter the joint symmetries of the parameters that have an effect and are not invariant alone.

    Args:
        probe: The probe.
        rows: The rows of the verdicts.
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
    # The gradients of the others are not needed: for convolutions that is half of the backward pass.
    others = [p for k, p in enumerate(probe.parameters) if k not in set(taken)]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        matrix = _gather_until_still(probe, [row.elasticity[taken] for row in rows], taken, at, bar)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
    result.rows, result.rank = len(matrix), numerical_rank(matrix, at.null)
    basis = integer_basis(matrix, null_space(matrix, at.null), at.null)
    confirmed, rejected = _confirmed(probe, basis, taken, judge, at)
    result.joint = [_named(e, taken, probe) for e in confirmed]
    result.unconfirmed_joint = [_named(e, taken, probe) for e in rejected]
    result.groups = [_named(e, taken, probe) for e in jointly_invariant_groups(confirmed)]


def _gather_until_still(
    probe: Probe, vectors: list[Array], taken: list[int], at: Thresholds, bar: Progress
) -> Array:
    """Return rows × columns, with rows added until the rank has not grown for eight of them."""
    matrix = np.stack(vectors)
    seed = _FIRST_SEED
    while True:
        earlier = matrix[:-_STILL] if len(matrix) > _STILL else matrix[:0]
        rank = numerical_rank(matrix, at.null)
        if len(earlier) and numerical_rank(earlier, at.null) == rank:
            return matrix
        fresh = [row.elasticity[taken] for row in gather(probe, seed, _AT_ONCE, moved=taken)]
        matrix = np.concatenate([matrix, np.stack(fresh)])
        bar.update("joint symmetries", len(matrix), len(taken) + _STILL)
        seed += 1


def _named(exponents: Integers, taken: Sequence[int], probe: Probe) -> dict[str, int]:
    return {probe.names[k]: int(e) for k, e in zip(taken, exponents, strict=True) if e}


def _confirmed(
    probe: Probe, basis: list[Integers], taken: list[int], judge: Judge, at: Thresholds
) -> tuple[list[Integers], list[Integers]]:
    """Return the symmetries that rescaling confirms, and the others."""

    def rescale(exponents: Integers, generator: torch.Generator, sign: float) -> None:
        # Far enough, both ways, to leave the part of a ReLU6 or a clamp that happens to be linear here;
        # by powers of two, which are exact in any precision.
        largest = int(np.abs(exponents).max())
        size = sign * (int(torch.randint(1, 4, (), generator=generator)) if largest == 1 else 1)
        for k, e in zip(taken, exponents, strict=True):
            if e:
                probe.parameters[k].mul_(2.0 ** (size * int(e)))

    def touched(exponents: Integers) -> list[int]:
        return [k for k, e in zip(taken, exponents, strict=True) if e]

    up = judge.offenders(basis, functools.partial(rescale, sign=1.0), touched, at.unchanged)
    failed = up | judge.offenders(basis, functools.partial(rescale, sign=-1.0), touched, at.unchanged)
    return [e for i, e in enumerate(basis) if i not in failed], [
        e for i, e in enumerate(basis) if i in failed
    ]
