"""A readable basis of a model's joint symmetries.

The jointly scale-invariant groups of a network are not unique. In a transformer the residual stream scales
with the layers that write to it (the output projections). The value projection against the output projection
is a symmetry too, so the former could replace the latter in the group. Decaying both would pull twice on one
product. So each group is reduced to the best of its equivalents: the one with the most weights (a layer that
writes, rather than the gain of its layer scale), then with the fewest members (no further bias), then without
parts of packed parameters, then the latest in the model (a layer that writes, rather than one that it reads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from normwise.invariance import Invariances, expand_parts, merge_parts, parameter_of
from normwise.planning.treatment import Symmetry, is_group

__all__ = ["readable_symmetries"]

Cost = tuple[int, int, int, int]


def readable_symmetries(inv: Invariances, is_weight: Callable[[str], bool]) -> list[Symmetry]:
    """Return a basis of the joint symmetries: groups first, reduced as the module says, then the others.

    Args:
        inv: The invariances.
        is_weight: Whether the parameter of this name is a weight (no gain, bias or other vector).
    """
    place: dict[str, int] = {}
    for name in inv.names:  # a parameter before its parts
        for key in [name, *inv.parts.get(name, ())]:
            place[key] = len(place)
    joint = [expand_parts(s, inv.parts) for s in inv.joint]
    mixed = [s for s in joint if not is_group(s)]

    def cost(symmetry: Symmetry) -> Cost:
        written = merge_parts(symmetry, inv.parts)
        weights = sum(is_weight(parameter_of(key)) for key in written)
        in_part = sum(parameter_of(key) != key for key in written)
        return -weights, len(written), in_part, -sum(place[key] for key in written)

    candidates = [*(expand_parts(s, inv.parts) for s in inv.groups), *filter(is_group, joint)]
    groups = [_reduced(group, mixed, cost) for group in candidates]
    ordered = sorted(groups, key=cost) + sorted(mixed, key=cost) + sorted(joint, key=cost)
    return [_oriented(merge_parts(s, inv.parts), place) for s in _independent(ordered, place)]


def _oriented(symmetry: Symmetry, place: dict[str, int]) -> Symmetry:
    """Return the symmetry in the order of the model, with a positive exponent for the first member."""
    members = sorted(symmetry, key=lambda key: place[key])
    sign = 1 if symmetry[members[0]] > 0 else -1
    return {key: sign * symmetry[key] for key in members}


def _reduced(group: Symmetry, mixed: Sequence[Symmetry], cost: Callable[[Symmetry], Cost]) -> Symmetry:
    """Return the cheapest group that is reached by adding or subtracting one symmetry at a time."""
    while True:
        sums = [_sum(group, s, sign) for s in mixed for sign in (1, -1)]
        best = min((s for s in sums if s and is_group(s)), key=cost, default=group)
        if cost(best) >= cost(group):
            return group
        group = best


def _sum(a: Symmetry, b: Symmetry, sign: int) -> Symmetry:
    total = {name: a.get(name, 0) + sign * b.get(name, 0) for name in [*a, *b]}
    return {name: exponent for name, exponent in total.items() if exponent}


def _independent(symmetries: list[Symmetry], place: dict[str, int]) -> list[Symmetry]:
    """Return the symmetries that are no linear combination of those before them."""
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
