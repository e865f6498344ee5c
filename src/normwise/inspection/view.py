"""What both views show: the layers with their parameters, and the symmetries between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from normwise.invariance import parameter_of
from normwise.planning.patterns import label, pattern, starred, together
from normwise.planning.plan import Plan
from normwise.planning.symmetries import Symmetry, is_group
from normwise.planning.treatment import BALANCE, NONE, PLAIN_L2, SHRINK, Treatment

__all__ = ["MEANINGS", "Layer", "Line", "Link", "SymmetryLine", "layers", "lines", "links", "symmetry_lines"]

MEANINGS = {
    SHRINK: "scale-invariant, alone or jointly: decay only sets the effective learning rate",
    BALANCE: "in a +1/−1 pair: decay balances the two sides and regularises their product",
    PLAIN_L2: "in no symmetry: plain L2 regularises",
    NONE: "left alone",
}


@dataclass(frozen=True)
class Line:
    """Parameters of one pattern that are treated alike.

    Attributes:
        label: Their names in one.
        members: They.
    """

    label: str
    members: tuple[Treatment, ...]

    @property
    def first(self) -> Treatment:
        """The first of them."""
        return self.members[0]

    @property
    def times(self) -> str:
        """How many there are, if several, as "×12"."""
        return f"×{len(self.members)}" if len(self.members) > 1 else ""

    @property
    def reason(self) -> str:
        """Why, with stars for the numbers in names if there are several."""
        return self.first.reason if len(self.members) == 1 else starred(self.first.reason)

    @property
    def shape(self) -> str:
        """Their shape, or how many shapes there are."""
        shapes = {t.shape for t in self.members}
        return "×".join(map(str, self.first.shape)) or "1" if len(shapes) == 1 else f"{len(shapes)} shapes"

    @property
    def numel(self) -> int:
        """How many values they have."""
        return sum(t.numel for t in self.members)


def lines(plan: Plan) -> list[Line]:
    """Return the parameters, layers of one pattern together where they are treated alike."""
    found = []
    for members in plan.grouped():
        names = " = ".join((members[0].name, *members[0].aliases))
        found.append(Line(names if len(members) == 1 else label([t.name for t in members]), tuple(members)))
    return found


@dataclass(frozen=True)
class Layer:
    """A layer of the drawing: lines that belong to one module (or to several of one pattern).

    Attributes:
        label: The name of the module, or of the parameter if the model itself holds it.
        lines: Its parameters.
    """

    label: str
    lines: tuple[Line, ...]

    @property
    def times(self) -> str:
        """How many modules, if several."""
        return self.lines[0].times


def layers(plan: Plan) -> list[Layer]:
    """Return the lines by module, in the order of the model."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines(plan):
        module = line.label.split(" = ")[0].rpartition(".")[0].replace(".parametrizations.weight", "")
        found.setdefault((module or line.label, line.times), []).append(line)
    return [Layer(module, tuple(members)) for (module, _), members in found.items()]


@dataclass(frozen=True)
class SymmetryLine:
    """Symmetries that are the same but for the numbers in names.

    Attributes:
        words: Members with exponents, as "h.*.ln.weight +1, h.*.fc.weight −1".
        count: How many there are.
        group: Whether their members are scale-invariant jointly.
        members: All members of all of them (parameters or parts of them), with their exponents.
    """

    words: str
    count: int
    group: bool
    members: tuple[tuple[str, int], ...]


def symmetry_lines(plan: Plan) -> list[SymmetryLine]:
    """Return the joint symmetries, those of one pattern together, groups first."""
    alike = together(("", _pattern(s), s) for s in plan.symmetries)
    found = []
    for group in alike:
        members = tuple((key, e) for s in group for key, e in s.items())
        words = _words(group[0], starred=len(group) > 1)
        found.append(SymmetryLine(words, len(group), is_group(group[0]), members))
    return sorted(found, key=lambda line: not line.group)


def _pattern(symmetry: Symmetry) -> tuple[tuple[str, int, int], ...]:
    counts = Counter((pattern(key), e) for key, e in symmetry.items())
    return tuple(sorted((key, e, count) for (key, e), count in counts.items()))


def _words(symmetry: Symmetry, *, starred: bool) -> str:
    parts = []
    for keys in together((key, e, key) for key, e in symmetry.items()):
        name = pattern(keys[0]) if starred else label(keys)
        several = f" (each of {len(keys)})" if len(keys) > 1 else ""
        e = symmetry[keys[0]]
        parts.append(f"{name}{several} {'+' if e > 0 else '−'}{abs(e)}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Link:
    """A symmetry in the drawing: a vertical line with dots at its layers.

    Attributes:
        line: The symmetry.
        lane: The number of the column it is drawn in.
        dots: {number of a layer: sign of the exponent}.
    """

    line: SymmetryLine
    lane: int
    dots: dict[int, int]


def links(plan: Plan, most: int = 24) -> list[Link]:
    """Return the symmetries as links between layers, in as few lanes as they fit; at most ``most`` lanes."""
    where = {t.name: k for k, layer in enumerate(layers(plan)) for line in layer.lines for t in line.members}
    wanted = []
    for line in symmetry_lines(plan):
        dots: dict[int, int] = {}
        for name, exponent in line.members:
            dots[where[parameter_of(name)]] = 1 if exponent > 0 else -1
        wanted.append((line, dots))
    ends: list[int] = []
    found = []
    for line, dots in sorted(wanted, key=lambda item: (not item[0].group, min(item[1]), max(item[1]))):
        low, high = min(dots), max(dots)
        lane = next((k for k, end in enumerate(ends) if end < low), len(ends))
        if lane >= most:
            continue
        ends[lane:] = [high, *ends[lane + 1 :]]
        found.append(Link(line, lane, dots))
    return found
