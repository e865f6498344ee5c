"""Jointly scale-invariant groups: symmetries whose exponents are all non-negative."""

from __future__ import annotations

import numpy as np

from normwise.invariance.elasticity import Array
from normwise.invariance.symmetries import Integers

__all__ = ["jointly_invariant_groups", "nonnegative_least_squares"]

_ZERO = 1e-9


def nonnegative_least_squares(a: Array, b: Array) -> tuple[Array, float]:
    """Return x ≥ 0 that minimises ‖a·x − b‖, and that norm.

    The active-set method of Lawson & Hanson, "Solving Least Squares Problems" (1974), chapter 23. The
    columns of the positive entries are independent, so few entries are positive.

    Example:
        >>> nonnegative_least_squares(np.array([[1.0, -1.0], [0.0, 1.0]]), np.array([1.0, -2.0]))
        (array([1., 0.]), 2.0)
    """
    x = np.zeros(a.shape[1])
    passive = np.zeros(a.shape[1], dtype=bool)
    barred = np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(a).max())) * max(1.0, float(np.abs(b).max()))
    for _ in range(10 * a.shape[1] + 10):
        slope = a.T @ (b - a @ x)
        slope[passive | barred] = -np.inf
        entering = int(np.argmax(slope))
        if slope[entering] <= tolerance:
            break
        passive[entering] = True
        while passive.any():
            solution = np.zeros_like(x)
            solution[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            blocked = passive & (solution <= _ZERO)
            if not blocked.any():
                x = solution
                barred[:] = False
                break
            if blocked[entering] and x[entering] == 0.0 and blocked.sum() == 1:
                passive[entering] = False  # rounding let it in: it would leave at once
                barred[entering] = True
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = np.where(blocked, x / (x - solution), np.inf)
            step = float(np.nanmin(steps))
            x = x + min(max(step, 0.0), 1.0) * (solution - x)
            passive &= x > _ZERO
            x[~passive] = 0.0
    return x, float(np.linalg.norm(a @ x - b))


def jointly_invariant_groups(basis: list[Integers]) -> list[Integers]:
    """Return symmetries with non-negative exponents: each is the only one on its members.

    Every parameter that is in any such symmetry is in at least one that is returned.

    Args:
        basis: Integer exponents of independent symmetries.

    Example:
        >>> basis = [np.array([1, -1, 0, 0]), np.array([0, 1, 1, 0]), np.array([0, 0, 0, 2])]
        >>> [g.tolist() for g in jointly_invariant_groups(basis)]
        [[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]
    """
    groups: list[Integers] = []
    for part in _components(basis):
        groups += _groups_of(part)
    return groups


def _components(basis: list[Integers]) -> list[list[Integers]]:
    """Return the basis in parts that share no parameter."""
    parts: list[tuple[set[int], list[Integers]]] = []
    for vector in basis:
        members, vectors = set(np.flatnonzero(vector).tolist()), [vector]
        kept = []
        for other_members, other_vectors in parts:
            if members & other_members:
                members |= other_members
                vectors = other_vectors + vectors
            else:
                kept.append((other_members, other_vectors))
        parts = [*kept, (members, vectors)]
    return sorted((vectors for _, vectors in parts), key=len)


def _groups_of(basis: list[Integers]) -> list[Integers]:
    members = np.flatnonzero(np.any(np.stack(basis), axis=0))
    span = np.stack([v[members] for v in basis]).astype(np.float64)
    _, _, vectors = np.linalg.svd(span, full_matrices=True)
    conditions = vectors[len(basis) :]  # e is a symmetry where these vanish
    uncovered = np.ones(len(members), dtype=bool)
    groups = []
    while uncovered.any():
        a = np.concatenate([conditions, uncovered[None].astype(np.float64)])
        b = np.concatenate([np.zeros(len(conditions)), [1.0]])
        solution, error = nonnegative_least_squares(a, b)
        if error > 1e-6:
            break  # no non-negative symmetry has an uncovered member
        exponents = _smallest_integers(solution)
        if np.abs(conditions @ exponents).max(initial=0.0) > 1e-6 * np.linalg.norm(exponents):
            break
        uncovered &= exponents == 0
        group = np.zeros_like(basis[0])
        group[members] = exponents
        groups.append(group)
    return groups


def _smallest_integers(solution: Array) -> Integers:
    positive = solution[solution > _ZERO]
    shares = np.where(solution > _ZERO, solution / positive.min(), 0.0)
    for denominator in range(1, 13):
        if np.abs(shares * denominator - np.rint(shares * denominator)).max() < 1e-4:
            break
    exponents = np.rint(shares * denominator).astype(np.int64)
    return np.asarray(exponents // np.gcd.reduce(exponents))
