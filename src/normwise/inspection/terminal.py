"""The plan in a terminal of 80 columns, readable for a model of 300 parameters."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from normwise.inspection.inspect import Inspection
from normwise.inspection.summary import MEANINGS, ParameterLine, amount, parameter_lines, symmetry_lines
from normwise.planning.treatment import Verdict

__all__ = ["show", "text"]

_STYLES = {
    Verdict.SHRINK: "blue",
    Verdict.BALANCE: "yellow",
    Verdict.PLAIN_L2: "green",
    Verdict.NONE: "bright_black",
}
StyledLines = Iterator[tuple[str, str]]


def text(inspection: Inspection, width: int = 80) -> str:
    """Return the plan as plain text, no line longer than ``width``."""
    return "\n".join(line for line, _ in _styled(inspection, width)) + "\n"


def show(inspection: Inspection) -> None:
    """Print the plan, in colours where the terminal has them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as capture:  # rich would end the process if the output were closed
        for line, style in _styled(inspection, max(60, min(console.width, 110))):
            console.print(Text(line, style=style))
    sys.stdout.write(capture.get())


def _styled(inspection: Inspection, width: int) -> StyledLines:
    plan = inspection.plan
    total = sum(t.numel for t in plan.treatments)
    facts = f"{len(plan.treatments)} parameters, {amount(total)} values, {inspection.seconds:.1f} s"
    yield from _wrapped(f"{inspection.title}: {facts}", width, "", "bold")
    if inspection.how:
        yield from _wrapped(inspection.how, width, "", "")
    all_lines = parameter_lines(plan)
    for verdict, style in _STYLES.items():
        lines = [line for line in all_lines if line.first.verdict == verdict]
        if not lines:
            continue
        count = sum(len(line.members) for line in lines)
        share = sum(line.numel for line in lines) / max(1, total)
        yield "", ""
        yield f"{verdict.upper()}  parameters: {count}, {share:.0%} of all values", f"bold {style}"
        yield from _wrapped(MEANINGS[verdict], width, "", "")
        yield from _by_reason(lines, width) if verdict == Verdict.NONE else _by_name(lines, width, style)
    yield from _symmetries(inspection, width)


def _by_name(lines: list[ParameterLine], width: int, style: str) -> StyledLines:
    shapes = max(len(line.shape) for line in lines)
    room = width - 4 - shapes - 20
    for line in lines:
        name = line.title
        rule = line.first.rule.removeprefix("rule, ")
        if len(name) > room:
            yield f"  {name if len(name) <= width - 2 else f'{name[: width - 3]}…'}", style
            name = ""
        yield f"  {name:<{room}}  {line.shape:>{shapes}}  {rule}"[:width].rstrip(), style
        yield from _wrapped(line.explain(effect=False), width, "      ", "")


def _by_reason(lines: list[ParameterLine], width: int) -> StyledLines:
    titles: dict[str, list[str]] = {}
    for line in lines:
        titles.setdefault(line.explain(names=False), []).append(line.title)
    for reason, names in titles.items():
        yield from _wrapped(reason, width, "  ", "")
        yield from _wrapped(", ".join(names), width, "      ", _STYLES[Verdict.NONE])


def _symmetries(inspection: Inspection, width: int) -> StyledLines:
    lines = symmetry_lines(inspection.plan)
    count = sum(line.count for line in lines)
    yield "", ""
    if not lines:
        yield "NO JOINT SYMMETRIES", "bold"
        return
    yield f"{count} JOINT {'SYMMETRY' if count == 1 else 'SYMMETRIES'}", "bold"
    yield from _wrapped("w → α^exponent · w, for all members at once, changes no output", width, "", "")
    for line in lines:
        name = "jointly scale-invariant" if line.group else "balanced"
        several = f", ×{line.count}" if line.count > 1 else ""
        yield f"  {name}{several}", _STYLES[Verdict.SHRINK if line.group else Verdict.BALANCE]
        yield from _wrapped(line.words, width, "      ", "")


def _wrapped(words: str, width: int, indent: str, style: str) -> StyledLines:
    options: Any = {"break_on_hyphens": False, "break_long_words": True}
    for line in textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent, **options):
        yield line, style
