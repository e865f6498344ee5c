"""The plan in a terminal of 80 columns, for a model of 300 parameters too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from normwise.inspection.inspect import Inspection
from normwise.inspection.view import MEANINGS, Line, lines, symmetry_lines
from normwise.planning.treatment import NONE, VERDICTS

__all__ = ["amount", "show", "text"]

_STYLES = {"shrink": "blue", "balance": "yellow", "L2": "green", "none": "bright_black"}


def text(inspection: Inspection, width: int = 80) -> str:
    """Return the view as plain text, no line longer than ``width``."""
    return "\n".join(line for line, _ in _styled(inspection, width)) + "\n"


def show(inspection: Inspection) -> None:
    """Print it, in colours where the terminal has them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line, style in _styled(inspection, max(60, min(console.width, 110))):
        console.print(Text(line, style=style))


def _styled(inspection: Inspection, width: int) -> Iterator[tuple[str, str]]:
    plan = inspection.plan
    total = sum(t.numel for t in plan.treatments)
    facts = f"{len(plan.treatments)} parameters, {amount(total)} values, {inspection.seconds:.1f} s"
    yield from _filled(f"{inspection.title}: {facts}", width, "", "bold")
    every = lines(plan)
    for verdict in VERDICTS:
        mine = [line for line in every if line.first.verdict == verdict]
        if not mine:
            continue
        count, style = sum(len(line.members) for line in mine), _STYLES[verdict]
        share = sum(line.numel for line in mine) / max(1, total)
        yield "", ""
        yield f"{verdict.upper()}  parameters: {count}, {share:.0%} of all values", f"bold {style}"
        yield from _filled(MEANINGS[verdict], width, "", "")
        yield from (_by_reason(mine, width) if verdict == NONE else _by_name(mine, width, style))
    yield from _symmetries(inspection, width)


def _by_name(mine: list[Line], width: int, style: str) -> Iterator[tuple[str, str]]:
    shapes = max(len(line.shape) for line in mine)
    for line in mine:
        name = f"{line.label} {line.times}".rstrip()
        room = width - 4 - shapes - 20
        rule = line.first.rule.removeprefix("rule, ")
        if len(name) > room:
            yield f"  {_cut(name, width - 2)}", style
            name = ""
        yield f"  {name:<{room}}  {line.shape:>{shapes}}  {rule}"[:width].rstrip(), style
        reason = line.reason.split(": decay", 1)[0]
        yield from _filled(reason, width, "      ", "")


def _by_reason(mine: list[Line], width: int) -> Iterator[tuple[str, str]]:
    by: dict[str, list[str]] = {}
    for line in mine:
        role, jointly, _ = line.first.reason.partition(", scale-invariant jointly with")
        reason = f"{role}{jointly} others" if jointly else role
        by.setdefault(reason, []).append(f"{line.label} {line.times}".rstrip())
    for reason, names in by.items():
        yield from _filled(reason, width, "  ", "")
        yield from _filled(", ".join(names), width, "      ", _STYLES[NONE])


def _symmetries(inspection: Inspection, width: int) -> Iterator[tuple[str, str]]:
    found = symmetry_lines(inspection.plan)
    count = sum(line.count for line in found)
    yield "", ""
    if not found:
        yield "NO JOINT SYMMETRIES", "bold"
        return
    yield f"{count} JOINT {'SYMMETRY' if count == 1 else 'SYMMETRIES'}", "bold"
    yield from _filled("w → α^exponent · w, for all members at once, changes no output", width, "", "")
    for line in found:
        kind = "jointly scale-invariant" if line.group else "balanced"
        several = f", ×{line.count}" if line.count > 1 else ""
        yield f"  {kind}{several}", _STYLES["shrink" if line.group else "balance"]
        yield from _filled(line.words, width, "      ", "")


def _filled(words: str, width: int, indent: str, style: str) -> Iterator[tuple[str, str]]:
    options: Any = {"break_on_hyphens": False, "break_long_words": True}
    for line in textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent, **options):
        yield line, style


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


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
