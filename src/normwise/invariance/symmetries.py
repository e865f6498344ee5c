"""The null space of elasticities, and its basis of small, sparse integer exponents."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from normwise.invariance.elasticity import Array

__all__ = ["Integers", "integer_basis", "null_space", "numerical_rank"]

Integers = NDArray[np.int64]

_TRIALS = 24  # random choices of pivots
_DENOMINATORS = (1, 2, 3, 4, 6)
_ROUNDING = 1e-3


def _scaled(matrix: Array) -> tuple[Array, Array]:
    """Return ``matrix`` with unit rows and columns of equal RMS, and what columns were divided by."""
    columns = np.ones(matrix.shape[1])
    for _ in range(3):
        rows = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix = matrix / np.where(rows > 0, rows, 1.0)
        size = np.sqrt(np.mean(matrix**2, axis=0))
        size = np.where(size > 0, size, 1.0)
        matrix, columns = matrix / size, columns * size
    return matrix, columns


def numerical_rank(matrix: Array, threshold: float) -> int:
    """Return how many singular values of the unit-RMS columns are above ``threshold``·√rows.

    Example:
        >>> numerical_rank(np.array([[1.0, -1.0, 0.5], [2.0, -2.0, 3.0]]), 1e-6)
        2
    """
    if not matrix.size:
        return 0
    values = np.linalg.svd(_scaled(matrix)[0], compute_uv=False)
    return int(np.sum(values > threshold * math.sqrt(len(matrix))))


def null_space(matrix: Array, threshold: float) -> Array:
    """Return a basis (columns) of the vectors e with matrix·e = 0; columns × dimension.

    Args:
        matrix: Elasticities, rows × columns; no column is zero.
        threshold: See :func:`numerical_rank`.
    """
    scaled, columns = _scaled(matrix)
    # The full decomposition: a thin one drops null vectors where there are fewer rows than columns.
    _, _, vectors = np.linalg.svd(scaled, full_matrices=True)
    rank = numerical_rank(matrix, threshold)
    return np.asarray(vectors[rank:].T / columns[:, None])


def integer_basis(
    matrix: Array, null: Array, threshold: float, parts: NDArray[np.bool_] | None = None
) -> list[Integers]:
    """Return a sparse basis of the null space in small integers, each vector checked against the rows.

    Reduction with random pivots gives bases that are the identity on their pivots; the sparsest
    independent vectors of many such bases (a greedy choice, which for independence is the best one) are
    then shortened by adding and subtracting one another.

    Args:
        matrix: Elasticities, rows × columns.
        null: Basis vectors, columns × dimension.
        threshold: As for the rank: of a checked vector, ten times this.
        parts: Which columns are parts of a parameter: of vectors as short, those with fewer parts.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(9, 2))
        >>> e = rows @ np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -2.0]])
        >>> [v.tolist() for v in integer_basis(e, null_space(e, 1e-6), 1e-6)]
        [[1, 0, -1, 0], [0, 2, 0, 1]]
    """
    dimension = null.shape[1]
    if not dimension:
        return []
    parts = np.zeros(matrix.shape[1], dtype=bool) if parts is None else parts
    scaled, columns = _scaled(matrix)
    rng = np.random.default_rng(0)
    pool: dict[bytes, Integers] = {}
    for trial in range(_TRIALS):
        for vector in _reduced(null * columns[:, None], columns, rng, trial).T:
            found = _integers(vector)
            if (
                found is not None
                and found.tobytes() not in pool
                and _holds(scaled, columns, found, threshold)
            ):
                pool[found.tobytes()] = found
    chosen = _independent(sorted(pool.values(), key=lambda v: _weight(v, parts)), dimension)
    return [_oriented(v) for v in sorted(_shortened(chosen, parts), key=_order)]


def _reduced(scaled_null: Array, columns: Array, rng: np.random.Generator, trial: int) -> Array:
    """Return the basis that is the identity on pivots chosen at random among the larger entries."""
    work = scaled_null.copy()
    pivots: list[int] = []
    for column in range(work.shape[1]):
        size = np.abs(work[:, column:]).max(axis=1)
        size[pivots] = 0.0
        allowed = np.flatnonzero(size >= 0.1 * size.max())
        row = int(np.argmax(size)) if trial == 0 else int(rng.choice(allowed))
        pivots.append(row)
        best = column + int(np.argmax(np.abs(work[row, column:])))
        work[:, [column, best]] = work[:, [best, column]]
        work[:, column] /= work[row, column]
        rest = np.arange(work.shape[1]) != column
        work[:, rest] -= np.outer(work[:, column], work[row, rest])
    return np.asarray(work / columns[:, None] * columns[pivots][None, :])


def _integers(vector: Array) -> Integers | None:
    """Return the smallest integer multiple of ``vector``, or None if its entries are not small fractions."""
    for denominator in _DENOMINATORS:
        multiple = vector * denominator
        rounded = np.rint(multiple)
        if np.abs(multiple - rounded).max() <= _ROUNDING * denominator and rounded.any():
            integers = rounded.astype(np.int64)
            return np.asarray(integers // np.gcd.reduce(integers))
    return None


def _holds(scaled: Array, columns: Array, exponents: Integers, threshold: float) -> bool:
    """Return whether the rows vanish on ``exponents``, beside the terms that cancel."""
    terms = columns * exponents
    sums = scaled @ terms
    return bool(np.sqrt(np.mean(sums**2)) <= 10 * threshold * np.linalg.norm(terms))


def _independent(candidates: list[Integers], dimension: int) -> list[Integers]:
    """Return the first ``dimension`` vectors that are independent of those before them."""
    chosen: list[Integers] = []
    directions: list[Array] = []
    for candidate in candidates:
        rest = candidate / np.linalg.norm(candidate)
        for _ in range(2):  # twice is enough for orthogonality to machine precision
            for direction in directions:
                rest = rest - direction * (direction @ rest)
        if np.linalg.norm(rest) > 1e-6:
            chosen.append(candidate)
            directions.append(rest / np.linalg.norm(rest))
        if len(chosen) == dimension:
            break
    return chosen


def _weight(vector: Integers, parts: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return what makes a vector hard to read: large and many exponents, then mixed signs, then parts."""
    negative = min(int((vector < 0).sum()), int((vector > 0).sum()))
    places = np.flatnonzero(vector)
    return int((vector**2).sum()), negative, int(parts[places].sum()), int(places[-1] - places[0])


def _shortened(basis: list[Integers], parts: NDArray[np.bool_]) -> list[Integers]:
    """Return the basis after adding or subtracting vectors while that makes one of them shorter."""
    basis = list(basis)
    improved = True
    while improved:
        improved = False
        for i in range(len(basis)):
            for j in range(len(basis)):
                if i == j or not (basis[i].astype(bool) & basis[j].astype(bool)).any():
                    continue
                for other in (basis[i] + basis[j], basis[i] - basis[j]):
                    if _weight(other, parts) < _weight(basis[i], parts):
                        basis[i], improved = other // np.gcd.reduce(other), True
    return basis


def _oriented(vector: Integers) -> Integers:
    """Return ``vector`` or its negative: mostly positive, else positive first."""
    balance = int((vector > 0).sum()) - int((vector < 0).sum())
    first = vector[np.flatnonzero(vector)[0]]
    return -vector if balance < 0 or (balance == 0 and first < 0) else vector


def _order(vector: Integers) -> tuple[int, int]:
    places = np.flatnonzero(vector)
    return int(places[0]), len(places)
