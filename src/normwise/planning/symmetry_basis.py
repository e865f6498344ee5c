"""A readable basis of a model's joint symmetries.

The jointly scale-invariant groups of a network are not unique. In a transformer the residual stream scales
with the layers that write to it (the output projections). The value projection against the output projection
is a symmetry too, so the former could replace the latter in the group. Decaying both would pull twice on one
product. So each group is reduced to the best of its equivalents: the one with the most weights (a layer that
writes, rather than the gain of its layer scale), then with the fewest members (no further bias), then without
parts of packed parameters, then the latest in the model (a layer that writes, rather than one that it reads).

Decay changes no frozen parameter, so only symmetries without frozen parameters remain. In a low-rank adapter
W + BA, W and B are jointly scale-invariant. If W is frozen, decay of B changes the outputs; only A against
B remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from normwise.invariance import Invariances, expand_parts, merge_parts, parameter_of
from normwise.invariance.symmetries import jointly_invariant_groups
from normwise.planning.treatment import Symmetry, is_group

__all__ = ["readable_symmetries"]

Cost = tuple[int, int, int, int]


def readable_symmetries(
    inv: Invariances, is_weight: Callable[[str], bool], frozen: Collection[str] = ()
) -> list[Symmetry]:
    """Return a basis of the joint symmetries: groups first, reduced as the module says, then the others.

    Args:
        inv: The invariances.
        is_weight: Whether the parameter of this name is a weight (no gain, bias or other vector).
        frozen: The parameters that do not change.
    """
    place: dict[str, int] = {}
    for name in inv.names:  # a parameter before its parts
        for key in [name, *inv.parts.get(name, ())]:
            place[key] = len(place)
    joint: list[Symmetry] = [expand_parts(s, inv.parts) for s in inv.joint]
    groups: list[Symmetry] = [expand_parts(s, inv.parts) for s in inv.groups]
    fixed = [key for key in place if parameter_of(key) in frozen]
    if any(key in s for s in joint for key in fixed):
        joint = _without(joint, fixed)
        groups = _groups(joint, place)
    mixed = [s for s in joint if not is_group(s)]

    def cost(symmetry: Symmetry) -> Cost:
        written = merge_parts(symmetry, inv.parts)
        weights = sum(is_weight(parameter_of(key)) for key in written)
        in_part = sum(parameter_of(key) != key for key in written)
        return -weights, len(written), in_part, -sum(place[key] for key in written)

    reduced = [_reduced(group, mixed, cost) for group in (*groups, *filter(is_group, joint))]
    ordered = sorted(reduced, key=cost) + sorted(mixed, key=cost) + sorted(joint, key=cost)
    return [_oriented(merge_parts(s, inv.parts), place) for s in _independent(ordered, place)]


def _without(basis: list[Symmetry], fixed: Sequence[str]) -> list[Symmetry]:
    """Return a basis of the combinations of symmetries in which each of these keys has exponent 0."""
    for key in fixed:
        with_key = sorted((s for s in basis if key in s), key=lambda s: (abs(s[key]), len(s)))
        basis = [s for s in basis if key not in s]
        for s in with_key[1:]:
            pivot = with_key[0]
            basis.append(_sum(s, pivot, pivot[key], -s[key]))
    return basis


def _groups(basis: Sequence[Symmetry], place: dict[str, int]) -> list[Symmetry]:
    """Return jointly scale-invariant groups that contain every parameter of any such group."""
    keys = list(place)
    vectors = [np.array([s.get(key, 0) for key in keys]) for s in basis]
    groups = jointly_invariant_groups(vectors)
    return [{keys[k]: int(group[k]) for k in np.flatnonzero(group)} for group in groups]


def _oriented(symmetry: Symmetry, place: dict[str, int]) -> Symmetry:
    """Return the symmetry in the order of the model, with a positive exponent for the first member."""
    members = sorted(symmetry, key=lambda key: place[key])
    sign = 1 if symmetry[members[0]] > 0 else -1
    return {key: sign * symmetry[key] for key in members}


def _reduced(group: Symmetry, mixed: Sequence[Symmetry], cost: Callable[[Symmetry], Cost]) -> Symmetry:
    """Return the cheapest group that is reached by adding or subtracting one symmetry at a time."""
    while True:
        sums = [_sum(group, s, 1, sign) for s in mixed for sign in (1, -1)]
        best = min((s for s in sums if s and is_group(s)), key=cost, default=group)
        if cost(best) >= cost(group):
            return group
        group = best


def _sum(a: Symmetry, b: Symmetry, of_a: int = 1, of_b: int = 1) -> Symmetry:
    """Return the linear combination of two symmetries, in lowest terms."""
    total = {key: of_a * a.get(key, 0) + of_b * b.get(key, 0) for key in [*a, *b]}
    divisor = math.gcd(*total.values()) or 1
    return {key: exponent // divisor for key, exponent in total.items() if exponent}


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
