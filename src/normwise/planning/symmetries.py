"""A readable choice among the symmetries that were found.

The jointly scale-invariant groups of a network are not unique. In a transformer the residual stream scales
with its writers (the output projections), and as v against the output projection is a symmetry too, v could
stand in place of the projection. Decaying both would pull twice on one product. So each group is reduced to
the one with the fewest members, of these the fewest gains and biases, of these the latest in the model: the
writers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from normwise.invariance.result import Invariances

__all__ = ["Symmetry", "is_group", "owner", "readable_symmetries", "spell"]

Symmetry = dict[str, int]


def owner(key: str) -> str:
    """Return the parameter that a key of ``Invariances.joint_parts`` is a part of.

    Example:
        >>> owner("h.0.attn.c_attn.weight[:, 0:768]")
        'h.0.attn.c_attn.weight'
    """
    return re.sub(r"\[[^\]]*\]$", "", key)


def is_group(symmetry: Symmetry) -> bool:
    """Return whether all exponents are positive: its members are scale-invariant jointly."""
    return all(exponent > 0 for exponent in symmetry.values())


def readable_symmetries(inv: Invariances, is_weight: Callable[[str], bool]) -> list[Symmetry]:
    """Return a basis of the joint symmetries: groups first, each as small as it gets, then the others.

    Args:
        inv: What was found.
        is_weight: Whether the parameter of this name is a weight (no gain, bias or other vector).
    """
    place = {name: k for k, name in enumerate(inv.names)}
    mixed = [s for s in inv.joint if not is_group(s)]

    def cost(symmetry: Symmetry) -> tuple[int, int, int]:
        vectors = sum(not is_weight(name) for name in symmetry)
        return len(symmetry), vectors, -sum(place[name] for name in symmetry)

    groups = [_reduced(group, mixed, cost) for group in [*inv.groups, *filter(is_group, inv.joint)]]
    ordered = sorted(groups, key=cost) + sorted(mixed, key=cost) + sorted(inv.joint, key=cost)
    return [*_independent(ordered, place), *inv.joint_parts]


def _reduced(group: Symmetry, mixed: Sequence[Symmetry], cost: Callable[[Symmetry], object]) -> Symmetry:
    """Return the cheapest group that adding and subtracting symmetries, one at a time, leads to."""
    best: tuple[object, Symmetry] | None = (cost(group), group)
    while best is not None:
        price, group = best
        options = [_sum(group, s, sign) for s in mixed for sign in (1, -1)]
        better = [(cost(s), s) for s in options if s and is_group(s) and cost(s) < price]  # type: ignore[operator]
        best = min(better, key=lambda option: option[0], default=None)  # type: ignore[arg-type,return-value]
    return group


def _sum(a: Symmetry, b: Symmetry, sign: int) -> Symmetry:
    total = {name: a.get(name, 0) + sign * b.get(name, 0) for name in [*a, *b]}
    return {name: exponent for name, exponent in total.items() if exponent}


def _independent(symmetries: list[Symmetry], place: dict[str, int]) -> list[Symmetry]:
    """Return those that are not a combination of the ones before them, in their order."""
    chosen: list[Symmetry] = []
    rows = np.zeros((0, len(place)))
    for symmetry in symmetries:
        row = np.zeros((1, len(place)))
        for name, exponent in symmetry.items():
            row[0, place[name]] = exponent
        extended = np.concatenate([rows, row])
        if np.linalg.matrix_rank(extended) == len(extended):
            chosen.append(symmetry)
            rows = extended
    return chosen


def spell(symmetry: Symmetry) -> str:
    """Write a symmetry with its exponents.

    Example:
        >>> spell({"v": 1, "o": -1}), spell({"a": 1, "b": 2})
        ('v +1, o −1', 'a +1, b +2')
    """
    return ", ".join(f"{name} {'+' if e > 0 else '−'}{abs(e)}" for name, e in symmetry.items())
