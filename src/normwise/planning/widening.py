"""The plan of a narrow copy, carried over to the full-size model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import Tensor, nn

from normwise.invariance import dimension_of, parameter_of, widened_part
from normwise.planning.parameters import bare, role_of
from normwise.planning.treatment import Symmetry, Treatment

__all__ = ["widen"]

Shapes = Mapping[str, tuple[int, ...]]


def widen(
    treatments: Sequence[Treatment], symmetries: Sequence[Symmetry], model: nn.Module
) -> tuple[list[Treatment], list[Symmetry]]:
    """Return the treatments and symmetries of a narrow copy for the shapes of ``model``.

    Symmetries do not depend on widths. Units keep their dimension, and parts of packed parameters keep their
    share of it. Names and ties are left to :func:`normwise.planning.storage.bind`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: Something does not carry over: another number of dimensions, a dimension of size one that
            is larger in the model (or the other way round), another role, a part that would not end between
            two units, or parts whose shares differ in the model. The message names the first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named: dict[str, tuple[str, Tensor]] = {bare(name): (name, p) for name, p in model.named_parameters()}
    narrow = {t.name: t.shape for t in treatments}
    wide = {
        t.name: _checked_shape(t, *named[bare(t.name)], model) for t in treatments if bare(t.name) in named
    }
    known = [t for t in treatments if t.name in wide]  # bind names the others
    for t in known:
        _check_shares(t, symmetries, narrow, wide)
    widened = [_widened(t, narrow, wide) for t in known]
    rest = [t for t in treatments if t.name not in wide]
    return [*widened, *rest], [_widened_symmetry(s, narrow, wide) for s in symmetries]


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


def _ratios(name: str, narrow: Shapes, wide: Shapes) -> list[Fraction]:
    return [Fraction(b, a) for a, b in zip(narrow[name], wide[name], strict=True) if a]


def _check_shares(t: Treatment, symmetries: Sequence[Symmetry], narrow: Shapes, wide: Shapes) -> None:
    """Raise an error if the parts of ``t`` cannot have the same shares in the model.

    Where a part balances another parameter, some dimension of that parameter counts the same units (the
    columns of an output projection count the values), so it must grow by the same ratio.
    """
    shared = [s for s in symmetries if t.name in map(parameter_of, s)]
    partners = {name for s in shared for name in map(parameter_of, s) if name != t.name and name in wide}
    for s in shared:
        dims = {dimension_of(key) for key in s if parameter_of(key) == t.name} - {None}
        others = {name for name in map(parameter_of, s) if name != t.name and name in wide}
        if t.name in s and t.mask is not None:  # any symmetry may show the share of the masked units
            dims, others = {t.dim}, partners
        for dim in dims:
            assert dim is not None
            grown = Fraction(wide[t.name][dim], narrow[t.name][dim])
            if others and not any(grown in _ratios(name, narrow, wide) for name in others):
                raise _refused(
                    f"{t.name!r} is divided into parts, and grows from {narrow[t.name]} to {wide[t.name]}, "
                    f"unlike {min(others)!r}, so that the parts have other shares"
                )


def _widened(t: Treatment, narrow: Shapes, wide: Shapes) -> Treatment:
    shape = wide[t.name]
    return replace(
        t,
        shape=shape,
        mask=None if t.mask is None or t.dim is None else _widened_mask(t, shape[t.dim]),
        symmetry=_widened_symmetry(t.symmetry, narrow, wide),
        overridden=None if t.overridden is None else _widened(t.overridden, narrow, wide),
    )


def _widened_mask(t: Treatment, size: int) -> tuple[bool, ...]:
    """Return the mask with every run of equal values at its share of ``size``."""
    assert t.mask is not None
    mask = list(t.mask)
    changes = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    for place in changes:
        if place * size % len(mask):
            raise _refused(
                f"a part of {t.name!r} ends at unit {place} of {len(mask)}, which is no whole number of "
                f"{size} units"
            )
    return tuple(mask[i * len(mask) // size] for i in range(size))


def _widened_symmetry(symmetry: Symmetry, narrow: Shapes, wide: Shapes) -> Symmetry:
    widened = {}
    for key, exponent in symmetry.items():
        name = parameter_of(key)
        if name in wide and key != name:
            try:
                key = widened_part(key, narrow[name], wide[name])
            except ValueError as error:
                raise _refused(str(error)) from error
        widened[key] = exponent
    return widened


def _refused(difference: str) -> ValueError:
    return ValueError(
        f"the plan of the narrow copy does not carry over: {difference}; make a narrow copy that keeps this, "
        "or plan for the model itself"
    )
