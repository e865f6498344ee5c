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
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from normwise.invariance import Invariances, expand_parts, merge_parts, parameter_of
from normwise.invariance.symmetries import independent, jointly_invariant_groups
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

    costs = _Costs(inv.parts, place, is_weight)
    reduced = [_reduced(group, mixed, costs) for group in (*groups, *filter(is_group, joint))]
    ordered = sorted(reduced, key=costs.of) + sorted(mixed, key=costs.of) + sorted(joint, key=costs.of)
    keys = list(place)
    vectors = [np.array([s.get(key, 0) for key in keys]) for s in ordered]
    basis = ({keys[k]: int(v[k]) for k in np.flatnonzero(v)} for v in independent(vectors, len(joint)))
    return [_oriented(merge_parts(s, inv.parts), place) for s in basis]


class _Costs:
    """How hard a symmetry is to read: the sum of what each of its parameters adds.

    Args:
        parts: {parameter: keys of its parts}.
        place: {parameter or part: its place in the model}.
        is_weight: Whether the parameter of this name is a weight.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[str]],
        place: Mapping[str, int],
        is_weight: Callable[[str], bool],
    ) -> None:
        self._parts, self._place = parts, place
        self._weights = {key: is_weight(parameter_of(key)) for key in place}

    def keys(self, name: str) -> Sequence[str]:
        """Return the parts of a parameter, or its name."""
        return self._parts.get(name, [name])

    def of(self, symmetry: Symmetry, names: Collection[str] | None = None) -> Cost:
        """Return (−weights, members, parts, −places) of a symmetry, or of what it has of some parameters."""
        names = {*map(parameter_of, symmetry)} if names is None else names
        weights = members = in_part = places = 0
        for name in names:
            keys = [key for key in self.keys(name) if key in symmetry]
            exponents = {symmetry[key] for key in keys}
            if len(exponents) == 1 and len(keys) == len(self.keys(name)):
                keys = [name]  # all parts scale alike: written as a whole
            weights += len(keys) * self._weights[name]
            members += len(keys)
            in_part += sum(key != name for key in keys)
            places += sum(self._place[key] for key in keys)
        return -weights, members, in_part, -places


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


def _reduced(group: Symmetry, mixed: Sequence[Symmetry], costs: _Costs) -> Symmetry:
    """Return the cheapest group that is reached by adding or subtracting one symmetry at a time."""
    moves = [
        ({*map(parameter_of, s)}, {key: sign * e for key, e in s.items()}) for s in mixed for sign in (1, -1)
    ]
    while True:
        best, least = group, (0, 0, 0, 0)
        for names, move in moves:
            if any(group.get(key, 0) + e < 0 for key, e in move.items()):
                continue
            changed = {key: group[key] for name in names for key in costs.keys(name) if key in group}
            before = costs.of(changed, names)
            after = costs.of(_sum(changed, move), names)
            if (change := _difference(after, before)) < least:
                best, least = _sum(group, move), change
        if best is group:
            return group
        group = best


def _difference(a: Cost, b: Cost) -> Cost:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


def _sum(a: Symmetry, b: Symmetry, of_a: int = 1, of_b: int = 1) -> Symmetry:
    """Return the linear combination of two symmetries, in lowest terms."""
    total = {key: of_a * a.get(key, 0) + of_b * b.get(key, 0) for key in [*a, *b]}
    divisor = math.gcd(*total.values()) or 1
    return {key: exponent // divisor for key, exponent in total.items() if exponent}
