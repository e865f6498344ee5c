"""Tables in plain text, in which layers of one pattern share a line: 300 parameters read as twenty lines."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

__all__ = ["by_pattern", "label", "listed", "pattern", "starred", "table"]

T = TypeVar("T")
_GAP = 2


def pattern(name: str) -> str:
    """Return ``name`` with its numbers as stars.

    Example:
        >>> pattern("h.11.attn.c_attn.weight")
        'h.*.attn.c_attn.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def starred(sentence: str) -> str:
    """Return a sentence in which the numbers inside names are stars.

    Example:
        >>> starred("in a pair with h.0.wv, h.0.wo and 2 others: decay balances 1.0 of it.")
        'in a pair with h.*.wv, h.*.wo and 2 others: decay balances 1.0 of it.'
    """
    return re.sub(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)+", _starred, sentence)


def _starred(match: re.Match[str]) -> str:
    name = match[0]
    return name if re.fullmatch(r"[0-9.]+", name) else pattern(name)


def label(names: Sequence[str]) -> str:
    """Return one name for names of one pattern.

    Example:
        >>> label(["h.0.fc.weight", "h.1.fc.weight", "h.2.fc.weight", "h.5.fc.weight"])
        'h.{0-2,5}.fc.weight'
        >>> label(["fc.weight"])
        'fc.weight'
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_spelled(list(dict.fromkeys(column))) for column in columns)


def _spelled(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(int(part) for part in parts)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return "{" + ",".join("-".join(map(str, r)) for r in ranges) + "}"


def by_pattern(items: Iterable[tuple[str, Hashable, T]]) -> list[list[T]]:
    """Return the items in groups of equal name pattern and equal key, in the order of the first members.

    Args:
        items: (name, key, item).

    Example:
        >>> by_pattern([("h.0.w", 1, "a"), ("h.0.b", 0, "b"), ("h.1.w", 1, "c"), ("h.2.w", 2, "d")])
        [['a', 'c'], ['b'], ['d']]
    """
    groups: dict[Hashable, list[T]] = {}
    for name, key, item in items:
        groups.setdefault((pattern(name), key), []).append(item)
    return list(groups.values())


def listed(names: Sequence[str], most: int = 4) -> str:
    """List names, layers of one pattern together.

    Example:
        >>> listed(["h.0.ln.weight", "h.1.ln.weight", "ln.weight"])
        'h.{0-1}.ln.weight (2), ln.weight'
    """
    groups = by_pattern((name, None, name) for name in names)
    parts = [label(group) + (f" ({len(group)})" if len(group) > 1 else "") for group in groups[:most]]
    left = len(names) - sum(map(len, groups[:most]))
    return ", ".join(parts) + (f" and {left} more" if left else "")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int = 100,
    narrow: Mapping[int, int] | None = None,
) -> str:
    """Return a table whose last column is wrapped so that no line is longer than ``width``.

    Args:
        header: The names of the columns.
        rows: The cells.
        width: The longest line, in characters.
        narrow: {number of a column: the most characters}; a name breaks after a dot.

    Example:
        >>> print(table(["name", "why"], [["a", "it is the first one"], ["bb", "two"]], width=22))
        name  why
        ----  ----------------
        a     it is the first
              one
        bb    two
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    for k, most in (narrow or {}).items():
        widths[k] = min(widths[k], most)
    used = sum(widths[:-1]) + _GAP * (len(widths) - 1)
    widths[-1] = min(widths[-1], max(16, width - used))
    lines: list[str] = []
    for number, row in enumerate(cells):
        wrapped = [_wrapped(cell, widths[k]) for k, cell in enumerate(row)]
        for line in range(max(map(len, wrapped))):
            parts = [w[line] if line < len(w) else "" for w in wrapped]
            lines.append((" " * _GAP).join(p.ljust(n) for p, n in zip(parts, widths, strict=True)).rstrip())
        if number == 0:
            lines.append((" " * _GAP).join("-" * n for n in widths))
    return "\n".join(lines)


def _wrapped(cell: str, width: int) -> list[str]:
    """Break at spaces, and within a long word (a name) after its dots."""
    lines = [""]
    for word in cell.split(" "):
        gap = " " if lines[-1] else ""
        if len(lines[-1]) + len(gap) + len(word) <= width:
            lines[-1] += gap + word
            continue
        if len(word) <= width:
            lines.append(word)
            continue
        if lines[-1]:
            lines.append("")
        for part in re.split(r"(?<=\.)", word):
            if lines[-1].strip() and len(lines[-1]) + len(part) > width:
                lines.append("  ")
            lines[-1] += part
    return [
        piece for line in lines for piece in ([line[i : i + width] for i in range(0, len(line), width)])
    ] or [""]
