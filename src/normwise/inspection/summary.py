"""The contents of both views: lines for parameters, layers and symmetries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from normwise.invariance import parameter_of
from normwise.planning.plan import Plan
from normwise.planning.tables import by_pattern, label, pattern, starred
from normwise.planning.treatment import Symmetry, Treatment, Verdict, is_group

__all__ = [
    "MEANINGS",
    "Layer",
    "Link",
    "ParameterLine",
    "SymmetryLine",
    "amount",
    "layers",
    "links",
    "parameter_lines",
    "symmetry_lines",
]

MEANINGS = {
    Verdict.SHRINK: "scale-invariant, alone or jointly: decay only sets the effective learning rate",
    Verdict.BALANCE: "in a +1/−1 pair: decay balances the two sides and regularises their product",
    Verdict.PLAIN_L2: "in no symmetry: plain L2 regularises",
    Verdict.NONE: "left alone",
}


@dataclass(frozen=True)
class ParameterLine:
    """Parameters of one pattern that are treated alike.

    Attributes:
        label: One name for all of them.
        members: Their treatments.
    """

    label: str
    members: tuple[Treatment, ...]

    @property
    def first(self) -> Treatment:
        """The treatment of the first parameter."""
        return self.members[0]

    @property
    def times(self) -> str:
        """The number of parameters, if there are several, as "×12"."""
        return f"×{len(self.members)}" if len(self.members) > 1 else ""

    @property
    def title(self) -> str:
        """The label and the number of parameters."""
        return f"{self.label} {self.times}".rstrip()

    def explain(self, *, names: bool = True, effect: bool = True) -> str:
        """Return the reason, with stars for the numbers in names if there are several parameters."""
        reason = self.first.explain(names=names, effect=effect)
        return reason if len(self.members) == 1 else starred(reason)

    @property
    def shape(self) -> str:
        """The shape of the parameters, or how many shapes there are."""
        shapes = {t.shape for t in self.members}
        return "×".join(map(str, self.first.shape)) or "1" if len(shapes) == 1 else f"{len(shapes)} shapes"

    @property
    def numel(self) -> int:
        """The number of values."""
        return sum(t.numel for t in self.members)


def parameter_lines(plan: Plan) -> list[ParameterLine]:
    """Return the parameters, layers of one pattern together where they are treated alike."""
    lines = []
    for members in plan.grouped():
        names = " = ".join((members[0].name, *members[0].aliases))
        name = names if len(members) == 1 else label([t.name for t in members])
        lines.append(ParameterLine(name, tuple(members)))
    return lines


@dataclass(frozen=True)
class Layer:
    """A layer of the drawing: the parameters of one module (or of several of one pattern).

    Attributes:
        label: The name of the module, or of the parameter if the model itself holds it.
        lines: The parameters.
    """

    label: str
    lines: tuple[ParameterLine, ...]

    @property
    def title(self) -> str:
        """The label and the number of modules."""
        return f"{self.label} {self.lines[0].times}".rstrip()


def layers(plan: Plan) -> list[Layer]:
    """Return the parameters by module, in the order of the model."""
    modules: dict[tuple[str, str], list[ParameterLine]] = {}
    for line in parameter_lines(plan):
        module = line.label.split(" = ")[0].rpartition(".")[0].replace(".parametrizations.weight", "")
        modules.setdefault((module or line.label, line.times), []).append(line)
    return [Layer(module, tuple(lines)) for (module, _), lines in modules.items()]


@dataclass(frozen=True)
class SymmetryLine:
    """Symmetries that differ only in the numbers inside names.

    Attributes:
        words: Members with exponents, as "h.*.ln.weight +1, h.*.fc.weight −1".
        count: The number of symmetries.
        group: Whether the members are jointly scale-invariant.
        members: The members of all symmetries (parameters or parts of them), with their exponents.
    """

    words: str
    count: int
    group: bool
    members: tuple[tuple[str, int], ...]


def symmetry_lines(plan: Plan) -> list[SymmetryLine]:
    """Return the joint symmetries, one line for all of one pattern, jointly scale-invariant groups first."""
    lines = []
    for alike in by_pattern(("", _pattern(s), s) for s in plan.symmetries):
        members = tuple((key, e) for s in alike for key, e in s.items())
        words = _words(alike[0], stars=len(alike) > 1)
        lines.append(SymmetryLine(words, len(alike), is_group(alike[0]), members))
    return sorted(lines, key=lambda line: not line.group)


def _pattern(symmetry: Symmetry) -> tuple[tuple[str, int, int], ...]:
    counts = Counter((pattern(key), e) for key, e in symmetry.items())
    return tuple(sorted((key, e, count) for (key, e), count in counts.items()))


def _words(symmetry: Symmetry, *, stars: bool) -> str:
    parts = []
    for keys in by_pattern((key, e, key) for key, e in symmetry.items()):
        name = pattern(keys[0]) if stars else label(keys)
        several = f" (each of {len(keys)})" if len(keys) > 1 else ""
        e = symmetry[keys[0]]
        parts.append(f"{name}{several} {'+' if e > 0 else '−'}{abs(e)}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Link:
    """A symmetry in the drawing: a vertical line with dots at its layers.

    Attributes:
        line: The symmetry.
        lane: The number of the column to draw it in.
        dots: {number of a layer: sign of the exponent}.
    """

    line: SymmetryLine
    lane: int
    dots: dict[int, int]


def links(plan: Plan, most: int = 24) -> list[Link]:
    """Return the symmetries as links between layers, in as few lanes as possible and at most ``most``."""
    where = {t.name: k for k, layer in enumerate(layers(plan)) for line in layer.lines for t in line.members}
    spans = []
    for line in symmetry_lines(plan):
        dots = {where[parameter_of(name)]: 1 if exponent > 0 else -1 for name, exponent in line.members}
        spans.append((line, dots))
    ends: list[int] = []
    drawn = []
    for line, dots in sorted(spans, key=lambda span: (not span[0].group, min(span[1]), max(span[1]))):
        lane = next((k for k, end in enumerate(ends) if end < min(dots)), len(ends))
        if lane < most:
            ends[lane:] = [max(dots), *ends[lane + 1 :]]
            drawn.append(Link(line, lane, dots))
    return drawn


def amount(values: int) -> str:
    """Write a number of values in short.

    Example:
        >>> amount(950), amount(12_345_678)
        ('950', '12.3 M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if values >= size:
            return f"{values / size:.3g} {unit}"
    return str(values)
