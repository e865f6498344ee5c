"""The plan of a narrow copy, carried over to the full-size model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import Tensor, nn

from normwise.invariance import dimension_of, parameter_of, periods_of, widened_part
from normwise.planning.parameters import bare, role_of
from normwise.planning.periods import HeadCounts, counts_of, head_counts, is_of_heads, period_of_mask
from normwise.planning.treatment import Symmetry, Treatment

__all__ = ["widen"]

# {parameter of a symmetry: (dimension, number of periods) of its parts}
_Places = Mapping[str, Set[tuple[int, int]]]


def widen(
    treatments: Sequence[Treatment], symmetries: Sequence[Symmetry], heads: HeadCounts, model: nn.Module
) -> tuple[list[Treatment], list[Symmetry]]:
    """Return the treatments and symmetries of a narrow copy for the shapes of ``model``.

    Symmetries do not depend on widths. Units keep their dimension. Parts of packed parameters keep their
    share of it, or of each period where they recur in each head. Names and ties are left to
    :func:`normwise.planning.storage.bind`.

    Args:
        treatments: Those of the narrow copy.
        symmetries: Those of the narrow copy.
        heads: The numbers of heads of the narrow copy.
        model: The full-size model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: Something does not carry over: another number of dimensions, a dimension of size one that
            is larger in the model (or the other way round), another role, a part that would not end between
            two units, parts whose shares differ in the model, or parts that recur an unknown number of
            times. The message names the first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named: dict[str, tuple[str, Tensor]] = {bare(name): (name, p) for name, p in model.named_parameters()}
    known = [t for t in treatments if bare(t.name) in named]  # bind names the others
    narrow = {t.name: t.shape for t in treatments}
    wide = {t.name: _checked_shape(t, *named[bare(t.name)], model) for t in known}
    growth = _Growth(narrow, wide, heads, head_counts(model))
    places = [_places_in(s, growth) for s in symmetries]
    for t in known:
        _check_shares(t, places, growth)
    widened = [_widened(t, growth) for t in known]
    rest = [t for t in treatments if t.name not in wide]
    return [*widened, *rest], [_widened_symmetry(s, growth) for s in symmetries]


@dataclass(frozen=True)
class _Growth:
    """How much wider the model is.

    Attributes:
        narrow: {parameter: shape in the narrow copy}.
        wide: {parameter: shape in the model}, of those that it has.
        narrow_heads: The numbers of heads of the narrow copy.
        wide_heads: Those of the model.
    """

    narrow: dict[str, tuple[int, ...]]
    wide: dict[str, tuple[int, ...]]
    narrow_heads: HeadCounts
    wide_heads: HeadCounts

    def ratios(self, name: str) -> list[Fraction]:
        """Return by how much each dimension grows."""
        return [Fraction(b, a) for a, b in zip(self.narrow[name], self.wide[name], strict=True)]

    def ratio(self, name: str, dim: int) -> Fraction:
        """Return by how much one dimension grows."""
        return Fraction(self.wide[name][dim], self.narrow[name][dim])

    def periods(self, name: str, count: int) -> int:
        """Return the number of periods in the model of a parameter that has ``count`` in the narrow copy.

        Raises:
            ValueError: The numbers of heads do not tell, or grow by different factors.
        """
        numbers = counts_of(name, self.narrow_heads, self.wide_heads)
        heads = {key: pair for key, pair in numbers.items() if is_of_heads(key)}
        if len({Fraction(b, a) for key, (a, b) in heads.items() if "head" in key.rpartition(".")[2]}) > 1:
            counts = ", ".join(f"{key} {a} → {b}" for key, (a, b) in heads.items() if "head" in key)
            raise _refused(
                f"{name!r} is divided into parts, and the numbers of heads have other ratios ({counts})",
                "a narrow copy that keeps these ratios",
            )
        if heads and all(a == b for a, b in heads.values()):
            return count
        found = {b for a, b in heads.values() if a == count}
        if count == 1 and found <= {1}:
            return 1
        if count == 1:
            raise _refused(
                f"{name!r} is divided into parts in a narrow copy with a single head, which does not tell "
                f"whether they recur in each of {max(found)} heads",
                "a narrow copy with two heads or more",
            )
        if found:
            found |= {b for a, b in numbers.values() if a == count}  # what else it may count
        if len(found) == 1:
            return found.pop()
        if found:
            counts = " or ".join(map(str, sorted(found)))
            raise _refused(
                f"the parts of {name!r} recur in each of {count} heads or groups, and the model may have "
                f"{counts} of them",
                "a narrow copy with as many heads as the model, or other numbers of heads and groups",
            )
        raise _refused(
            f"the parts of {name!r} recur {count} times, and no attribute of a module or configuration whose "
            f"name contains 'head' or 'group' is {count}",
            "a narrow copy with as many heads as the model, held as an attribute such as num_heads",
        )

    def of_period(self, name: str, dim: int, count: int) -> Fraction:
        """Return by how much each of ``count`` periods grows."""
        return self.ratio(name, dim) * count / self.periods(name, count)


def _checked_shape(t: Treatment, name: str, parameter: Tensor, model: nn.Module) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    if len(shape) != len(t.shape):
        raise _refused(f"{t.name!r} has {len(t.shape)} dimensions in the plan and {len(shape)} in the model")
    for narrow, wide in zip(t.shape, shape, strict=True):
        if wide < narrow or (narrow == 1) != (wide == 1):
            raise _refused(
                f"{t.name!r} has shape {t.shape} in the plan and {shape} in the model, and only dimensions "
                "of two and more may grow"
            )
    if (role := role_of(model, name, parameter)) != t.role:
        raise _refused(f"{t.name!r} is a {t.role} in the plan and a {role} in the model")
    return shape


def _check_shares(t: Treatment, symmetries: Sequence[_Places], growth: _Growth) -> None:
    """Raise an error if the parts of ``t`` cannot have the same shares in the model.

    Where a part balances another parameter, some dimension of that parameter counts the same units (the
    columns of an output projection count the values), so it must grow by the same ratio. Where the part
    recurs in each head, this parameter may count the units of all heads or of one (a key that all heads
    share).
    """
    shared = [places for places in symmetries if t.name in places]
    if t.mask is None and not any(places[t.name] for places in shared):
        return
    partners = [_partners(t.name, places, growth) for places in shared]
    for places, others in zip(shared, partners, strict=True):
        divided = places[t.name]
        if not divided and t.mask is not None and t.dim is not None:
            divided = {(t.dim, len(t.mask) // period_of_mask(t.mask))}
            others = set().union(*partners)  # any symmetry may show the share of the units
        for dim, count in divided:
            grown = {growth.ratio(t.name, dim), growth.of_period(t.name, dim, count)}
            if others and not any(grown & _ratios(name, shared, growth) for name in others):
                raise _refused(
                    f"{t.name!r} is divided into parts, and grows from {growth.narrow[t.name]} to "
                    f"{growth.wide[t.name]}, unlike {min(others)!r}, so that the parts have other shares"
                )


def _partners(name: str, places: _Places, growth: _Growth) -> set[str]:
    """Return the other parameters of a symmetry, without the bias that is divided in the same way."""
    module = name.rpartition(".")[0]
    sizes = {growth.narrow[name][dim] for dim, _ in places[name]}
    return {
        other
        for other, divided in places.items()
        if other != name
        and (
            other.rpartition(".")[0] != module
            or not sizes & {growth.narrow[other][dim] for dim, _ in divided}
        )
    }


def _places_in(symmetry: Symmetry, growth: _Growth) -> _Places:
    """Return the places of the parts of each parameter of a symmetry, out of those that the model has."""
    places: dict[str, set[tuple[int, int]]] = {}
    for key in symmetry:
        if (name := parameter_of(key)) in growth.wide:
            place = _place(key, growth)
            places.setdefault(name, set()).update([] if place is None else [place])
    return places


def _place(key: str, growth: _Growth) -> tuple[int, int] | None:
    """Return the dimension that a part divides, and the number of its periods; None for a whole parameter."""
    dim, count = dimension_of(key), periods_of(key, growth.narrow[parameter_of(key)])
    return None if dim is None or count is None else (dim, count)


def _ratios(name: str, symmetries: Sequence[_Places], growth: _Growth) -> set[Fraction]:
    """Return by how much the dimensions of a parameter, and the periods of its parts, grow."""
    divided = {place for places in symmetries for place in places.get(name, ())}
    return {*growth.ratios(name), *(growth.of_period(name, *place) for place in divided)}


def _widened(t: Treatment, growth: _Growth) -> Treatment:
    return replace(
        t,
        shape=growth.wide[t.name],
        mask=_widened_mask(t, growth),
        symmetry=_widened_symmetry(t.symmetry, growth),
        overridden=None if t.overridden is None else _widened(t.overridden, growth),
    )


def _widened_mask(t: Treatment, growth: _Growth) -> tuple[bool, ...] | None:
    """Return the mask with every run of equal values at its share of each period."""
    if t.mask is None or t.dim is None:
        return None
    size, period = growth.wide[t.name][t.dim], period_of_mask(t.mask)
    count = growth.periods(t.name, len(t.mask) // period)
    mask = list(t.mask[:period])
    changes = [i for i in range(1, period) if mask[i] != mask[i - 1]]
    for place in changes:
        if size % count or place * (size // count) % period:
            raise _refused(
                f"a part of {t.name!r} ends at unit {place} of {period}, which is no whole number of "
                f"{Fraction(size, count)} units"
            )
    if count == 1:
        _check_runs(t, [0, *changes, period], growth)
    length = size // count
    return tuple(mask[i * period // length] for i in range(length)) * count


def _check_runs(t: Treatment, ends: Sequence[int], growth: _Growth) -> None:
    """Raise an error if the units of a mask cannot have the same share in the model.

    The gain of the norm behind them has their number, so something of this size beside ``t`` grows like them.
    """
    assert t.mask is not None
    assert t.dim is not None
    around = t.name.rpartition(".")[0].rpartition(".")[0]
    beside = [name for name in growth.wide if name != t.name and name.startswith(around)]
    for start, stop in itertools.pairwise(ends):
        ratios = {
            ratio
            for name in beside
            for size, ratio in zip(growth.narrow[name], growth.ratios(name), strict=True)
            if size == stop - start and t.mask[start]
        }
        if ratios and growth.ratio(t.name, t.dim) not in ratios:
            raise _refused(
                f"{stop - start} units of {t.name!r} are invariant, and it grows from {t.shape} to "
                f"{growth.wide[t.name]} unlike what has their number beside it, so that their share differs"
            )


def _widened_symmetry(symmetry: Symmetry, growth: _Growth) -> Symmetry:
    widened = {}
    for key, exponent in symmetry.items():
        name = parameter_of(key)
        place = _place(key, growth) if name in growth.wide else None
        if place is not None:
            count = growth.periods(name, place[1])
            try:
                key = widened_part(key, growth.narrow[name], growth.wide[name], count)
            except ValueError as error:
                raise _refused(str(error)) from error
        widened[key] = exponent
    return widened


def _refused(difference: str, remedy: str = "a narrow copy that keeps this") -> ValueError:
    return ValueError(
        f"the plan of the narrow copy does not carry over: {difference}; make {remedy}, or plan for the "
        "model itself"
    )
