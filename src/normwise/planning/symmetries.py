"""A readable choice among the symmetries that were found.

The jointly scale-invariant groups of a network are not unique. In a transformer the residual stream scales
with its writers (the output projections), and as v against the output projection is a symmetry too, v could
stand in place of the projection. Decaying both would pull twice on one product. So each group is reduced to
the one with the most weights (a writer and not the gain of its layer scale), of these the one with the fewest
members (no further bias), of these one without parts of packed parameters, of these the latest in the model
(a writer and not what it reads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from normwise.invariance import Invariances, expand_parts, merge_parts, parameter_of

__all__ = ["Symmetry", "is_group", "readable_symmetries"]

Symmetry = dict[str, int]


def is_group(symmetry: Symmetry) -> bool:
    """Return whether all exponents are positive: its members are scale-invariant jointly."""
    return all(exponent > 0 for exponent in symmetry.values())


def readable_symmetries(inv: Invariances, is_weight: Callable[[str], bool]) -> list[Symmetry]:
    """Return a basis of the joint symmetries: groups first, as the module says, then the others.

    Args:
        inv: What was found.
        is_weight: Whether the parameter of this name is a weight (no gain, bias or other vector).
    """
    place: dict[str, int] = {}
    for name in inv.names:  # a parameter before its parts
        for key in [name, *inv.parts.get(name, ())]:
            place[key] = len(place)
    joint = [expand_parts(s, inv.parts) for s in inv.joint]
    mixed = [s for s in joint if not is_group(s)]

    def cost(symmetry: Symmetry) -> tuple[int, int, int, int]:
        written = merge_parts(symmetry, inv.parts)
        weights = sum(is_weight(parameter_of(key)) for key in written)
        in_part = sum(parameter_of(key) != key for key in written)
        return -weights, len(written), in_part, -sum(place[key] for key in written)

    candidates = [*(expand_parts(s, inv.parts) for s in inv.groups), *filter(is_group, joint)]
    groups = [_reduced(group, mixed, cost) for group in candidates]
    ordered = sorted(groups, key=cost) + sorted(mixed, key=cost) + sorted(joint, key=cost)
    return [_oriented(merge_parts(s, inv.parts), place) for s in _independent(ordered, place)]


def _oriented(symmetry: Symmetry, place: dict[str, int]) -> Symmetry:
    """Return it in the order of the model, its first member with a positive exponent."""
    members = sorted(symmetry, key=lambda key: place[key])
    sign = 1 if symmetry[members[0]] > 0 else -1
    return {key: sign * symmetry[key] for key in members}


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
