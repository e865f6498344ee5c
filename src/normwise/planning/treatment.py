"""What a plan does with one parameter and why: first as data, then in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from normwise.invariance import parameter_of

__all__ = ["Cause", "Symmetry", "Treatment", "Verdict", "is_group", "keys_of"]

Symmetry = Mapping[str, int]
_ONLY_RATE = "decay only sets its effective learning rate"


class _Word(str, Enum):
    """A string out of a fixed set: ``Verdict.SHRINK == "shrink"``."""

    def __str__(self) -> str:
        return str(self.value)


class Verdict(_Word):
    """What a plan does with a parameter."""

    SHRINK = "shrink"
    BALANCE = "balance"
    PLAIN_L2 = "L2"
    NONE = "none"


class Cause(_Word):
    """Why a plan does it."""

    FROZEN = "frozen"
    NOT_REAL = "not real numbers"
    NO_EFFECT = "no effect"
    UNDETERMINED = "undetermined"
    MARKED = "marked by its module"
    NOT_A_WEIGHT = "not a weight"
    SIGNS_ONLY = "only signs matter"
    ALONE = "scale-invariant alone"
    JOINT = "scale-invariant jointly"
    PAIR = "in a pair"
    NO_SYMMETRY = "in no symmetry"
    OVERRIDDEN = "overridden"


@dataclass(frozen=True)
class Treatment:
    """What a plan does with one parameter, and why.

    Attributes:
        name: The first of the parameter's names.
        shape: Its shape.
        verdict: "shrink" (scale-invariant: a rule decays it, which only sets the effective learning rate),
            "balance" (against other parameters), "L2" (plain weight decay, which regularises) or "none".
        cause: The reason for the verdict.
        role: "weight", "bias", "gain" or "vector".
        dim: With "shrink": a unit is a row (0), a column (1) or the whole tensor (None).
        mask: With "shrink": which rows or columns are units, if not all are.
        in_blocks: With "shrink": whether some units are invariant only together with their neighbours.
        smallest_rms: With "shrink": the root mean square of its values below which the eps of the norm layers
            is no longer negligible.
        symmetry: {parameter or part of one: exponent}: the joint symmetry that led to the verdict, if any.
        against: All parameters that scale down, in any symmetry, when this one scales up.
        parts_paired: Whether parts of the parameter are in further pairs.
        note: Why it is undetermined, or the name pattern of the override.
        overridden: The treatment before an override.
        aliases: The parameter's other names, if it is shared (tied).
    """

    name: str
    shape: tuple[int, ...]
    verdict: Verdict = Verdict.NONE
    cause: Cause = Cause.NO_SYMMETRY
    role: str = "weight"
    dim: int | None = None
    mask: tuple[bool, ...] | None = None
    in_blocks: bool = False
    smallest_rms: float = 0.0
    symmetry: Symmetry = field(default_factory=dict, hash=False)
    against: tuple[str, ...] = ()
    parts_paired: bool = False
    note: str = ""
    overridden: Treatment | None = None
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def together(self) -> tuple[str, ...]:
        """The other parameters of the symmetry that led to the verdict."""
        return tuple(n for n in dict.fromkeys(map(parameter_of, self.symmetry)) if n != self.name)

    @property
    def rule(self) -> str:
        """What acts on the parameter, in a few words.

        Example:
            >>> Treatment("fc.weight", (5, 8), Verdict.SHRINK, Cause.ALONE, dim=0).rule
            'rule, by row'
        """
        if self.verdict == Verdict.SHRINK:
            unit = {None: "whole tensor", 0: "by row", 1: "by column"}.get(self.dim, f"by dim {self.dim}")
            some = "" if self.mask is None else f", {sum(self.mask)} of {len(self.mask)}"
            return f"rule, {unit}{some}"
        return "–" if self.verdict == Verdict.NONE else "weight_decay"

    @property
    def reason(self) -> str:
        """The cause and what decay does, in a sentence.

        Example:
            >>> Treatment("fc.weight", (5, 8), Verdict.SHRINK, Cause.ALONE, dim=0).reason
            'each row only has a direction: decay only sets its effective learning rate'
        """
        return self.explain()

    def explain(self, *, names: bool = True, effect: bool = True) -> str:
        """Return the cause and what decay does, in a sentence.

        Args:
            names: Whether to name the other parameters of a symmetry.
            effect: Whether to say what decay does.
        """
        cause, of_decay = _WORDS[self.cause](self, names)
        return f"{cause}: {of_decay}" if effect and of_decay else cause


def is_group(symmetry: Symmetry) -> bool:
    """Return whether all exponents are positive, so that the members are jointly scale-invariant."""
    return all(exponent > 0 for exponent in symmetry.values())


def keys_of(name: str, symmetry: Symmetry) -> list[str]:
    """Return the members of a symmetry that are this parameter or parts of it."""
    return [key for key in symmetry if parameter_of(key) == name]


# The words for each cause: what is so, and what decay does.


def _not_a_weight(t: Treatment, names: bool) -> tuple[str, str]:
    if t.symmetry:
        return f"{t.role}, scale-invariant jointly with {_others(t, names)}", "decay would not regularise it"
    return {
        "bias": ("bias", "part of what the network computes"),
        "gain": ("gain of a normalisation", "part of what the network computes"),
    }.get(t.role, ("a vector, not a weight", "decay would pull its values to zero"))


def _alone(t: Treatment, names: bool) -> tuple[str, str]:
    if t.mask is None:
        units = {0: "each row", 1: "each column", None: "the tensor as a whole"}.get(t.dim, "each slice")
        return f"{units} only has a direction", _ONLY_RATE
    slices = "columns" if t.dim == 1 else "rows"
    rest = f"; the other {slices}, {_pair_words(t, names)}, stay as they are" if t.symmetry else ""
    some = f"{sum(t.mask)} of its {len(t.mask)} {slices}"
    return f"{some} only have a direction", f"{_ONLY_RATE}{rest}"


def _joint(t: Treatment, names: bool) -> tuple[str, str]:
    jointly = f"scale-invariant jointly with {_others(t, names)}"
    if t.name in t.symmetry:
        return jointly, _ONLY_RATE
    rest = "the rest, in no symmetry, is regularised by plain L2"
    return f"{_part_words(t)} is {jointly}", f"{_ONLY_RATE}; {rest}"


def _pair(t: Treatment, names: bool) -> tuple[str, str]:
    sides = "the two" if len(t.symmetry) == 2 else "the two sides"
    parts = "; its parts are in further pairs" if t.parts_paired else ""
    return _pair_words(t, names), f"decay balances {sides} and regularises their product{parts}"


def _overridden(t: Treatment, names: bool) -> tuple[str, str]:
    before = t.overridden
    if before is None:
        return f"overridden by {t.note!r}", ""
    cause, of_decay = _WORDS[before.cause](before, names)
    return f"overridden by {t.note!r}; found: {before.verdict}, {cause}", of_decay


_WORDS = {
    Cause.FROZEN: lambda t, names: ("frozen (requires_grad=False)", "no optimizer step changes it"),
    Cause.NOT_REAL: lambda t, names: ("not real floating-point numbers", "no rule applies to it"),
    Cause.NO_EFFECT: lambda t, names: ("no effect", "any values give the same outputs"),
    Cause.UNDETERMINED: lambda t, names: (f"undetermined, so left alone ({t.note})", ""),
    Cause.MARKED: lambda t, names: ("its module marks it as not to be decayed (_no_weight_decay)", ""),
    Cause.NOT_A_WEIGHT: _not_a_weight,
    Cause.SIGNS_ONLY: lambda t, names: (
        t.role,
        "only the signs of its values matter, and decay would bring them closer to a change of sign",
    ),
    Cause.ALONE: _alone,
    Cause.JOINT: _joint,
    Cause.PAIR: _pair,
    Cause.NO_SYMMETRY: lambda t, names: ("in no symmetry", "plain L2 regularises it"),
    Cause.OVERRIDDEN: _overridden,
}


def _others(t: Treatment, names: bool) -> str:
    return _few([key for key in t.symmetry if parameter_of(key) != t.name], names)


def _part_words(t: Treatment) -> str:
    return f"its part {keys_of(t.name, t.symmetry)[0].removeprefix(t.name).removeprefix('.')}"


def _pair_words(t: Treatment, names: bool) -> str:
    """Say what balances what, seen from this parameter."""
    first = keys_of(t.name, t.symmetry)[0]
    sign = t.symmetry[first]
    same = [key for key, e in t.symmetry.items() if e * sign > 0 and key != first]
    against = [key for key, e in t.symmetry.items() if e * sign < 0]
    exponents = t.symmetry.values()
    pair = "+1/−1" if {*map(abs, exponents)} == {1} else f"+{max(exponents)}/−{-min(exponents)}"
    beside = f", together with {_few(same, names)}" if same else ""
    part = "" if first == t.name else f"{_part_words(t)} "
    return f"{part}in a {pair} pair with {_few(against, names)}{beside}"


def _few(keys: Iterable[str], names: bool = True, most: int = 2) -> str:
    """List names, the first of many.

    Example:
        >>> _few(["a", "b", "c", "d"])
        'a, b and 2 others'
    """
    keys = list(keys)
    if not names:
        return "others"
    if len(keys) <= most + 1:
        return " and ".join(filter(None, [", ".join(keys[:-1]), *keys[-1:]])) or "nothing"
    return f"{', '.join(keys[:most])} and {len(keys) - most} others"
