"""Linear algebra of the symmetries: null space, readable integer basis, jointly scale-invariant groups."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from normwise.invariance.scale_gradients import Array

__all__ = [
    "Integers",
    "independent",
    "integer_basis",
    "jointly_invariant_groups",
    "null_space",
    "numerical_rank",
    "unexplained_combinations",
]

Integers = NDArray[np.int64]

_TRIALS, _FEW_TRIALS = 24, 8  # random choices of pivots
_MANY = 128  # symmetries for which few trials do: they are alike, layer by layer
_DENOMINATORS = (1, 2, 3, 4, 6)
_ROUNDING = 1e-3  # how far an exponent may be from an integer
_MOST_ROUNDING = 0.2  # the same for faint parameters
_LARGEST = 64  # larger exponents than this are a coincidence
_ZERO = 1e-9


def _scaled(matrix: Array) -> tuple[Array, Array]:
    """Return ``matrix`` with unit rows and columns of equal RMS, and the divisors of the columns."""
    scaled, _, columns = _scaled_both(matrix)
    return scaled, columns


def _scaled_both(matrix: Array) -> tuple[Array, Array, Array]:
    """Return ``matrix`` with unit rows and columns of equal RMS, and the divisors of rows and columns."""
    columns, divisors = np.ones(matrix.shape[1]), np.ones(len(matrix))
    for _ in range(3):
        rows = np.linalg.norm(matrix, axis=1, keepdims=True)
        rows = np.where(rows > 0, rows, 1.0)
        matrix, divisors = matrix / rows, divisors * rows[:, 0]
        size = np.sqrt(np.mean(matrix**2, axis=0))
        size = np.where(size > 0, size, 1.0)
        matrix, columns = matrix / size, columns * size
    return matrix, divisors, columns


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
    """Return a basis of the vectors e with matrix·e = 0, as the columns of columns × dimension.

    Args:
        matrix: Scale gradients, passes × columns; no column is zero.
        threshold: See :func:`numerical_rank`.
    """
    scaled, columns = _scaled(matrix)
    # A thin decomposition would drop null vectors if there are fewer rows than columns.
    _, _, vectors = np.linalg.svd(scaled, full_matrices=True)
    rank = numerical_rank(matrix, threshold)
    return np.asarray(vectors[rank:].T / columns[:, None])


def unexplained_combinations(matrix: Array, threshold: float) -> tuple[Array, Array]:
    """Return orthonormal combinations of passes to which no column contributes, and divisors of the passes.

    Args:
        matrix: Scale gradients, passes × columns, with more passes than its rank.
        threshold: See :func:`numerical_rank`.

    Returns:
        The combinations, passes × number, of passes that were divided by the divisors first.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(5, 2))
        >>> combinations, divisors = unexplained_combinations(rows, 1e-6)
        >>> combinations.shape, bool(np.abs(combinations.T @ (rows / divisors[:, None])).max() < 1e-12)
        ((5, 3), True)
    """
    scaled, divisors, _ = _scaled_both(matrix)
    vectors, _, _ = np.linalg.svd(scaled, full_matrices=True)
    return np.asarray(vectors[:, numerical_rank(matrix, threshold) :]), divisors


def integer_basis(
    matrix: Array, null: Array, threshold: float, is_part: NDArray[np.bool_] | None = None
) -> list[Integers]:
    """Return a sparse basis of the null space in small integers, each vector checked against the matrix.

    Row reduction with random pivots gives bases that are the identity on their pivots. The simplest
    independent vectors of many such bases (a greedy choice is optimal here) are then simplified by adding and
    subtracting each other. Many choices of pivots also keep symmetries with irrational exponents from hiding
    those with integer exponents, which one reduction followed by LLL does not.

    Args:
        matrix: Scale gradients, passes × columns.
        null: Basis vectors, columns × dimension.
        threshold: The threshold of the rank; the check of a vector allows ten times as much.
        is_part: Which columns are parts of a parameter: among equally short vectors, few parts are simpler.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(9, 2))
        >>> e = rows @ np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -2.0]])
        >>> [v.tolist() for v in integer_basis(e, null_space(e, 1e-6), 1e-6)]
        [[1, 0, -1, 0], [0, 2, 0, 1]]
    """
    dimension = null.shape[1]
    if not dimension:
        return []
    is_part = np.zeros(matrix.shape[1], dtype=bool) if is_part is None else is_part
    scaled, columns = _scaled(matrix)
    rng = np.random.default_rng(0)
    pool: dict[bytes, Integers] = {}
    for trial in range(_TRIALS if dimension <= _MANY else _FEW_TRIALS):
        vectors, pivots = _reduced(null * columns[:, None], columns, rng, trial)
        for vector, pivot in zip(vectors.T, pivots, strict=True):
            # An error that the check would not see: columns of faint parameters tell no exponents exactly.
            unseen = threshold * columns[pivot] / columns
            exponents = _integers(vector, unseen.clip(_ROUNDING, _MOST_ROUNDING))
            if exponents is None or exponents.tobytes() in pool:
                continue
            if _holds(scaled, columns, exponents, threshold):
                pool[exponents.tobytes()] = exponents
    chosen = independent(sorted(pool.values(), key=lambda v: _complexity(v, is_part)), dimension)
    return [_oriented(v) for v in sorted(_simplified(chosen, is_part), key=_order)]


def _reduced(
    scaled_null: Array, columns: Array, rng: np.random.Generator, trial: int
) -> tuple[Array, list[int]]:
    """Return the basis that is the identity on its pivots, and the pivots: random ones of the larger rows."""
    work = np.ascontiguousarray(scaled_null.T)  # one vector per row; those above ``place`` are done with
    pivots: list[int] = []
    for place in range(len(work)):
        rest = work[place:]
        size = np.maximum(rest.max(axis=0), -rest.min(axis=0))
        size[pivots] = 0.0
        allowed = np.flatnonzero(size >= 0.1 * size.max())
        pivot = int(np.argmax(size)) if trial == 0 else int(rng.choice(allowed))
        pivots.append(pivot)
        best = int(np.argmax(np.abs(rest[:, pivot])))
        rest[[0, best]] = rest[[best, 0]]
        rest[1:] -= np.outer(rest[1:, pivot], rest[0] / rest[0, pivot])
    reduced = np.linalg.solve(scaled_null[pivots].T, scaled_null.T).T
    return np.asarray(reduced / columns[:, None] * columns[pivots][None, :]), pivots


def _integers(vector: Array, rounding: Array) -> Integers | None:
    """Return the smallest integer multiple of ``vector``, or None if its entries are not small fractions.

    Args:
        vector: The entries.
        rounding: The largest error of each.
    """
    for denominator in _DENOMINATORS:
        multiple = vector * denominator
        rounded = np.rint(multiple)
        errors = rounding.clip(None, _MOST_ROUNDING / denominator) * denominator
        if (np.abs(multiple - rounded) <= errors).all() and rounded.any():
            integers = rounded.astype(np.int64)
            integers //= np.gcd.reduce(integers)
            return integers if np.abs(integers).max() <= _LARGEST else None
    return None


def _holds(scaled: Array, columns: Array, exponents: Integers, threshold: float) -> bool:
    """Return whether the matrix maps ``exponents`` to zero, compared with the terms that cancel."""
    terms = columns * exponents
    sums = scaled @ terms
    return bool(np.sqrt(np.mean(sums**2)) <= 10 * threshold * np.linalg.norm(terms))


def independent(candidates: list[Integers], dimension: int) -> list[Integers]:
    """Return the first ``dimension`` vectors that are independent of the vectors before them.

    Example:
        >>> vectors = [np.array([1, 1, 0]), np.array([2, 2, 0]), np.array([0, 1, -1])]
        >>> [v.tolist() for v in independent(vectors, 2)]
        [[1, 1, 0], [0, 1, -1]]
    """
    chosen: list[Integers] = []
    directions = np.zeros((dimension, len(candidates[0]) if candidates else 0))
    for candidate in candidates:
        rest = candidate / np.linalg.norm(candidate)
        for _ in range(2):  # twice gives orthogonality to machine precision
            rest = rest - (directions[: len(chosen)] @ rest) @ directions[: len(chosen)]
        if np.linalg.norm(rest) > 1e-6:
            directions[len(chosen)] = rest / np.linalg.norm(rest)
            chosen.append(candidate)
        if len(chosen) == dimension:
            break
    return chosen


def _complexity(vector: Integers, is_part: NDArray[np.bool_]) -> tuple[int, int, int, int, tuple[int, ...]]:
    """Return how hard a vector is to read: by size and number of exponents, mixed signs, parts, distance.

    Among equals the first members decide, so that like layers get like symmetries.
    """
    negative = min(int((vector < 0).sum()), int((vector > 0).sum()))
    places = np.flatnonzero(vector)
    size, parts, distance = int((vector**2).sum()), int(is_part[places].sum()), int(places[-1] - places[0])
    return size, negative, parts, distance, tuple(places.tolist())


def _simplified(basis: list[Integers], is_part: NDArray[np.bool_]) -> list[Integers]:
    """Return the basis after adding or subtracting vectors for as long as that makes one of them simpler."""
    basis = list(basis)
    members = np.array([vector != 0 for vector in basis], dtype=np.float32).reshape(len(basis), len(is_part))
    improved = True
    while improved:
        improved = False
        for i in range(len(basis)):
            simplest = _complexity(basis[i], is_part)
            for j in np.flatnonzero(members @ members[i]).tolist():
                if i == j:
                    continue
                for other in (basis[i] + basis[j], basis[i] - basis[j]):
                    if (int((other**2).sum()),) > simplest[:1]:
                        continue
                    if _complexity(other, is_part) < simplest:
                        basis[i], improved = other // np.gcd.reduce(other), True
                        members[i], simplest = basis[i] != 0, _complexity(basis[i], is_part)
    return basis


def _oriented(vector: Integers) -> Integers:
    """Return ``vector`` or its negative, whichever has more positive exponents, or a positive first one."""
    balance = int((vector > 0).sum()) - int((vector < 0).sum())
    first = vector[np.flatnonzero(vector)[0]]
    return -vector if balance < 0 or (balance == 0 and first < 0) else vector


def _order(vector: Integers) -> tuple[int, int]:
    places = np.flatnonzero(vector)
    return int(places[0]), len(places)


def jointly_invariant_groups(basis: list[Integers]) -> list[Integers]:
    """Return symmetries with non-negative exponents, each of them the only one on its members.

    Every parameter of any such symmetry is in at least one of the returned symmetries.

    Args:
        basis: Integer exponents of independent symmetries.

    Example:
        >>> basis = [np.array([1, -1, 0, 0]), np.array([0, 1, 1, 0]), np.array([0, 0, 0, 2])]
        >>> [g.tolist() for g in jointly_invariant_groups(basis)]
        [[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]
    """
    groups: list[Integers] = []
    for component in _components(basis):
        groups += _groups_of(component)
    return groups


def _components(basis: list[Integers]) -> list[list[Integers]]:
    """Return the basis divided into components that share no parameter."""
    components: list[tuple[set[int], list[Integers]]] = []
    for vector in basis:
        members, vectors = set(np.flatnonzero(vector).tolist()), [vector]
        kept = []
        for other_members, other_vectors in components:
            if members & other_members:
                members |= other_members
                vectors = other_vectors + vectors
            else:
                kept.append((other_members, other_vectors))
        components = [*kept, (members, vectors)]
    return sorted((vectors for _, vectors in components), key=len)


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


def nonnegative_least_squares(a: Array, b: Array) -> tuple[Array, float]:
    """Return x ≥ 0 that minimises ‖a·x − b‖, and the minimum.

    This is the active-set method of Lawson & Hanson, "Solving Least Squares Problems" (1974), chapter 23.
    The columns of the positive entries are independent, so few entries are positive.

    Example:
        >>> nonnegative_least_squares(np.array([[1.0, -1.0], [0.0, 1.0]]), np.array([1.0, -2.0]))
        (array([1., 0.]), 2.0)
    """
    gram = a.T @ a
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
            solution[passive] = _least_squares(a[:, passive], b, gram[np.ix_(passive, passive)])
            blocked = passive & (solution <= _ZERO)
            if not blocked.any():
                x = solution
                barred[:] = False
                break
            if blocked[entering] and x[entering] == 0.0 and blocked.sum() == 1:
                passive[entering] = False  # it entered by a rounding error, and would leave at once
                barred[entering] = True
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = np.where(blocked, x / (x - solution), np.inf)
            step = float(np.nanmin(steps))
            x = x + min(max(step, 0.0), 1.0) * (solution - x)
            passive &= x > _ZERO
            x[~passive] = 0.0
    return x, float(np.linalg.norm(a @ x - b))


def _least_squares(a: Array, b: Array, gram: Array) -> Array:
    """Return the x that minimises ‖a·x − b‖, by the normal equations and a step of iterative refinement."""
    try:
        x = np.linalg.solve(gram, a.T @ b)
        return np.asarray(x + np.linalg.solve(gram, a.T @ (b - a @ x)))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(a, b, rcond=None)[0])
