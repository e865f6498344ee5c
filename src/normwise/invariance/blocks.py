"""Which ranges of units are invariant together: the groups of a norm, the heads of a packed projection."""

from __future__ import annotations

import numpy as np

from normwise.invariance.elasticity import Array

__all__ = ["invariant_blocks", "residual"]


def residual(sums: Array, squares: Array) -> Array:
    """Return |Σ|/√Σ(²) pooled over rows (axis 0): 0 by cancellation, about 1 without; NaN if all is zero.

    Example:
        >>> residual(np.array([[3.0, 0.0], [-4.0, 0.0]]), np.array([[12.5, 0.0], [12.5, 0.0]]))
        array([ 1., nan])
    """
    total = squares.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt((sums**2).sum(0) / np.where(total > 0, total, np.nan)))


def invariant_blocks(sums: Array, squares: Array, threshold: float, silent: float) -> list[tuple[int, int]]:
    """Return the shortest disjoint ranges [a, b) of units whose sums vanish together in every row.

    Cumulative sums C are equal at both ends of such a range, so equal ones are found by sorting.

    Args:
        sums: Σ wg of each unit, rows × units.
        squares: Σ (wg)² of each unit, rows × units.
        threshold: The residual up to which a range is invariant.
        silent: Units whose √Σ(wg)² is below this part of the largest carry no evidence.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=(8, 6))
        >>> a[:, 1] = -a[:, 0]
        >>> a[:, 3] = -a[:, 2]
        >>> invariant_blocks(a, a**2, 1e-6, 1e-9)
        [(0, 2), (2, 4)]
    """
    count = sums.shape[1]
    ends = np.concatenate([np.zeros((len(sums), 1)), np.cumsum(sums, axis=1)], axis=1)
    mass = np.concatenate([[0.0], np.cumsum(squares.sum(0))])
    if mass[-1] <= 0:
        return []
    loud = squares.sum(0) > silent**2 * squares.sum(0).max()
    direction = np.random.default_rng(0).normal(size=len(sums)) / np.sqrt(len(sums))
    line = direction @ ends
    order = np.argsort(line, kind="stable")
    near = 4 * threshold * np.sqrt(mass[-1])
    clusters = np.split(order, np.flatnonzero(np.diff(line[order]) > near) + 1)
    found: list[tuple[int, int]] = []
    for cluster in clusters:
        places = np.sort(cluster)
        if len(places) > 64 and len(places) < count / 2:  # the line is crowded: compare neighbours only
            places = places[np.concatenate([[True], np.diff(places) > 0])]
        for i, a in enumerate(places[:-1]):
            for b in places[i + 1 : i + 5]:
                own = mass[b] - mass[a]
                if own <= 0 or not loud[a:b].any():
                    continue
                if np.sum((ends[:, b] - ends[:, a]) ** 2) <= threshold**2 * own:
                    found.append((int(a), int(b)))
                    break
    taken = np.zeros(count, dtype=bool)
    kept = []
    for a, b in sorted(found, key=lambda ab: (ab[1] - ab[0], ab[0])):
        if not taken[a:b].any():
            taken[a:b] = True
            kept.append((a, b))
    return sorted(kept)
