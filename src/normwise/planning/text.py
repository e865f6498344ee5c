"""Tables in plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["table"]

_GAP = 2


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
