"""From invariances to treatments: the verdict on each parameter, and its reason in words."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from normwise.invariance import Invariances, parameter_of
from normwise.planning.roles import role_of
from normwise.planning.symmetries import Symmetry, is_group, readable_symmetries
from normwise.planning.treatment import BALANCE, NONE, PLAIN_L2, SHRINK, VERDICTS, Treatment

__all__ = ["check_overrides", "decide", "parameter_aliases"]

_ONLY_RATE = "decay only sets its effective learning rate"
_UNITS = {0: "each row", 1: "each column", None: "the tensor as a whole"}
_OF_ROLE = {
    "bias": "bias: part of what the network computes",
    "gain": "gain of a normalisation: part of what the network computes",
    "vector": "a vector, not a weight: decay would pull its values to zero",
}


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {first name: other names} of every parameter of ``model``, in order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values()}


def decide(
    model: nn.Module, inv: Invariances, overrides: Mapping[str, str] | None
) -> tuple[list[Treatment], list[Symmetry]]:
    """Return a treatment for every parameter, and the joint symmetries in a readable basis.

    Args:
        model: The model that ``inv`` was found for.
        inv: Its invariances.
        overrides: {pattern: verdict}; the last pattern that matches a name decides.
    """
    aliases = parameter_aliases(model)
    parameters = dict(model.named_parameters())
    if list(parameters) != inv.names:
        stray = sorted(set(parameters) ^ set(inv.names))
        raise ValueError(
            "invariances are those of another model (different parameters: "
            f"{', '.join(stray[:3]) or 'the order'}): find them for this one"
        )
    roles = {name: role_of(model, name, parameter) for name, parameter in parameters.items()}
    symmetries = readable_symmetries(inv, lambda name: roles[name] == "weight")
    treatments = []
    for name, parameter in parameters.items():
        blank = Treatment(
            name, tuple(parameter.shape), NONE, "", role=roles[name], aliases=aliases.get(name, ())
        )
        if getattr(parameter, "_no_weight_decay", False):
            decided = _with(blank, NONE, "its own module marks it as not to be decayed (_no_weight_decay)")
        else:
            decided = _verdict(blank, inv, symmetries)
        treatments.append(decided)
    return _overridden(treatments, inv, overrides or {}), symmetries


def _verdict(blank: Treatment, inv: Invariances, symmetries: list[Symmetry]) -> Treatment:
    name, role = blank.name, blank.role
    if name in inv.no_effect:
        return _with(blank, NONE, "no effect: any values give the same outputs")
    if name in inv.undetermined:
        return _with(blank, NONE, f"undetermined, so left alone ({inv.undetermined[name]})")
    if role != "weight":
        return _with(blank, NONE, _reason_of_vector(blank, inv, symmetries))
    if name in inv.scale_invariant or name in inv.partial:
        return _shrunk_alone(blank, inv, symmetries)
    mine = [s for s in symmetries if _own(name, s)]
    groups = [s for s in mine if is_group(s)]
    whole = [s for s in groups if name in s]
    if whole:
        reason = f"scale-invariant jointly with {_few(_others(blank, whole[0]))}: {_ONLY_RATE}"
        return _with(blank, SHRINK, reason, together=_parameters(_others(blank, whole[0])))
    mixed = [s for s in mine if not is_group(s)]
    if mixed:
        return _balanced(blank, mixed)
    if groups:
        together = _few(_others(blank, groups[0]))
        reason = f"{_part_words(name, groups[0])} is scale-invariant jointly with {together}: {_ONLY_RATE}"
        return _with(blank, PLAIN_L2, f"{reason}; the rest, in no symmetry, is regularised by plain L2")
    return _with(blank, PLAIN_L2, "in no symmetry: plain L2 regularises it")


def _own(name: str, symmetry: Symmetry) -> list[str]:
    """Return the keys that are this parameter or parts of it."""
    return [key for key in symmetry if parameter_of(key) == name]


def _parameters(keys: Iterable[str], besides: str = "") -> tuple[str, ...]:
    """Return the parameters that keys are or are parts of, each once."""
    return tuple(name for name in dict.fromkeys(map(parameter_of, keys)) if name != besides)


def _part_words(name: str, symmetry: Symmetry) -> str:
    return f"its part {_own(name, symmetry)[0].removeprefix(name).removeprefix('.')}"


def _shrunk_alone(blank: Treatment, inv: Invariances, symmetries: list[Symmetry]) -> Treatment:
    name = blank.name
    if name in inv.scale_invariant:
        dim = inv.scale_invariant[name]
        return _with(blank, SHRINK, f"{_UNITS[dim]} only has a direction: {_ONLY_RATE}", dim=dim)
    dim, mask = inv.partial[name]
    some = f"{int(mask.sum())} of its {len(mask)}"
    slices = {0: "rows", 1: "columns"}[dim]
    mine = [s for s in symmetries if name in s]
    rest = f"; the other {slices}, {_pair_words(blank, mine)}, stay as they are" if mine else ""
    reason = f"{some} {slices} only have a direction: {_ONLY_RATE}{rest}"
    return _with(blank, SHRINK, reason, dim=dim, mask=tuple(mask.tolist()))


def _reason_of_vector(blank: Treatment, inv: Invariances, symmetries: list[Symmetry]) -> str:
    if blank.name in inv.scale_invariant:
        return f"{blank.role}: only the signs of its values matter, and decay would bring them near a change"
    groups = [s for s in symmetries if blank.name in s and is_group(s)]
    if groups:
        together = _few(_others(blank, groups[0]))
        return f"{blank.role}, scale-invariant jointly with {together}: decay would not regularise it"
    return _OF_ROLE[blank.role]


def _balanced(blank: Treatment, mine: list[Symmetry]) -> Treatment:
    chosen = _simplest(blank.name, mine)
    sides = "the two" if len(chosen) == 2 else "the two sides"
    reason = f"{_pair_words(blank, mine)}: decay balances {sides} and regularises their product"
    if blank.name in chosen and not all(blank.name in s for s in mine):
        reason += "; its parts are in pairs of their own"
    against = [key for s in mine for own in _own(blank.name, s) for key, e in s.items() if e * s[own] < 0]
    return _with(
        blank,
        BALANCE,
        reason,
        together=_parameters(_others(blank, chosen), besides=blank.name),
        against=_parameters(against, besides=blank.name),
    )


def _simplest(name: str, mine: list[Symmetry]) -> Symmetry:
    """Return the shortest of those that this parameter is in as a whole, or else in part."""
    return min(mine, key=lambda s: (name not in s, len(s)))


def _pair_words(blank: Treatment, mine: list[Symmetry]) -> str:
    """Say what balances what, seen from this parameter."""
    chosen = _simplest(blank.name, mine)
    first = _own(blank.name, chosen)[0]
    own = chosen[first]
    same = [key for key, e in chosen.items() if e * own > 0 and key != first]
    against = [key for key, e in chosen.items() if e * own < 0]
    exponents = {abs(e) for e in chosen.values()}
    kind = "+1/−1 pair" if exponents == {1} else f"+{max(chosen.values())}/−{-min(chosen.values())} pair"
    beside = f", together with {_few(same)}" if same else ""
    part = "" if first == blank.name else f"{_part_words(blank.name, chosen)} "
    return f"{part}in a {kind} with {_few(against)}{beside}"


def _others(blank: Treatment, symmetry: Symmetry) -> tuple[str, ...]:
    return tuple(key for key in symmetry if parameter_of(key) != blank.name)


def _few(names: tuple[str, ...] | list[str], most: int = 2) -> str:
    """List names, the first of many.

    Example:
        >>> _few(["a", "b", "c", "d"])
        'a, b and 2 others'
    """
    if len(names) <= most + 1:
        return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nothing"
    return f"{', '.join(names[:most])} and {len(names) - most} others"


def _with(blank: Treatment, verdict: str, reason: str, **rest: object) -> Treatment:
    return dataclasses.replace(blank, verdict=verdict, reason=reason, **rest)  # type: ignore[arg-type]


def check_overrides(overrides: Mapping[str, str] | None) -> None:
    """Raise an error that names the first override that is not a pattern with a verdict."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a mapping of name pattern to verdict, not {overrides!r}")
    for pattern, verdict in (overrides or {}).items():
        if verdict not in VERDICTS:
            allowed = ", ".join(map(repr, VERDICTS))
            raise ValueError(f"overrides[{pattern!r}]={verdict!r} is not a verdict: choose from {allowed}")


def _overridden(
    treatments: list[Treatment], inv: Invariances, overrides: Mapping[str, str]
) -> list[Treatment]:
    unused = [
        pattern
        for pattern in overrides
        if not any(fnmatch.fnmatchcase(n, pattern) for t in treatments for n in (t.name, *t.aliases))
    ]
    if unused:
        raise ValueError(
            f"overrides: {unused[0]!r} matches no parameter: the first are "
            f"{', '.join(t.name for t in treatments[:3])} (patterns as for file names: *, ?, [abc])"
        )
    return [_override(treatment, inv, overrides) for treatment in treatments]


def _override(found: Treatment, inv: Invariances, overrides: Mapping[str, str]) -> Treatment:
    verdict, by = found.verdict, ""
    for pattern, wanted in overrides.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in (found.name, *found.aliases)):
            verdict, by = wanted, pattern
    if verdict == found.verdict:
        return found
    dim = inv.scale_invariant.get(found.name) if verdict == SHRINK else None
    reason = f"overridden by {by!r}; found: {found.verdict}, {found.reason}"
    return dataclasses.replace(found, verdict=verdict, reason=reason, dim=dim, mask=None)
