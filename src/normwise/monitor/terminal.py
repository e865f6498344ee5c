"""A monitor's log as text: a terminal of 80 columns, or plain lines in a pipe."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from normwise.monitor.finding import Finding
from normwise.monitor.log import Log
from normwise.planning.tables import by_pattern, label, listed

__all__ = ["line", "lines", "sparkline", "summary"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_LINES = 24
Styled = tuple[str, str]


def lines(log: Log, width: int = 80) -> Iterator[Styled]:
    """Yield the lines of a log with their styles, none longer than ``width``: findings first, then layers.

    Args:
        log: The log.
        width: At least 60.
    """
    yield from ((text, "bold") for text in _wrap(_head(log), width))
    for note in log.notes():
        yield from ((text, "yellow") for text in _wrap(note, width))
    if not log.rows:
        yield "no row yet: the first observed step writes one", "dim"
        return
    loss = [value for value in log.series("loss") if math.isfinite(value)]
    if loss:
        yield f"loss {loss[-1]:<10.4g} {sparkline(loss, width - 16)}", ""
    yield "", ""
    yield from _findings(log, width)
    yield "", ""
    yield from _table(log, width)


def _head(log: Log) -> str:
    total = log.settings.get("total_steps")
    step = log.steps[-1] if log.steps else 0
    of = f" of {total}" if isinstance(total, int) else ""
    state = "ended" if log.ended else "running"
    return f"{log.path.parent}  step {step}{of}  {len(log.rows)} rows  {state}"


def _findings(log: Log, width: int) -> Iterator[Styled]:
    present = log.present()
    if not present:
        yield "no findings", "green"
        return
    for finding in present:
        yield from ((text, "bold red") for text in _wrap(_title(finding), width, "! ", "  "))
        yield from ((text, "") for text in _wrap(finding.evidence, width, "  ", "  "))
        yield from ((text, "cyan") for text in _wrap(finding.remedy, width, "  → ", "    "))


def _title(finding: Finding) -> str:
    where = f": {listed(finding.layers)}" if finding.layers else ""
    return f"{finding.kind}{where} (since step {finding.since})"


def _table(log: Log, width: int) -> Iterator[Styled]:
    """Yield the table of layers: norm, its course, the turn per step against its equilibrium."""
    groups = [[name] for name in log.layers]
    if len(groups) > _MOST_LINES:
        groups = by_pattern((name, None, name) for name in log.layers)
    names = [label(group) + (f" ×{len(group)}" if len(group) > 1 else "") for group in groups]
    cells = [_cells(log, group) for group in groups]
    ends = max((len(cell.rstrip()) for cell in cells), default=0)
    room = max(8, min(max(map(len, names), default=8), width - 2 - max(ends, 52)))
    wrong = {layer for finding in log.present() for layer in finding.layers}
    yield (
        f"{'layer':{room}}  {'norm':>8} {'':10} {'turn/step':>9}  {'0.1×  equilibrium 10×'}"[:width].rstrip(),
        "dim",
    )
    for name, group, content in zip(names, groups, cells, strict=True):
        style = "red" if any(layer in wrong for layer in group) else ""
        short = name if len(name) <= room else f"…{name[1 - room :]}"
        yield f"{short:{room}}  {content}"[:width].rstrip(), style


def _cells(log: Log, group: Sequence[str]) -> str:
    norm = _middle(log.last("norm", layer) for layer in group)
    turns = [log.last("rotation", layer) for layer in group]
    turn = _middle(turns)
    course = sparkline([value for value in log.series("norm", group[0]) if value > 0], 10, log_scale=True)
    ratios = [
        log.last("rotation", layer) / settled
        for layer in group
        if (settled := log.last("equilibrium_rotation", layer)) > 0
    ]
    lost = max((value for layer in group if (value := log.last("decay_lost", layer)) > 0.05), default=0.0)
    dead = sum(value for layer in group if (value := log.last("dead", layer)) > 0)
    end = f" lost {lost:.0%}" if lost else f" {dead:.0f} dead" if dead else ""
    return f"{_number(norm):>8} {course:10} {_number(turn):>9}  {_gauge(ratios)}{end}"


def _gauge(ratios: Sequence[float]) -> str:
    """Return a scale from a tenth to ten times equilibrium with a mark for each layer."""
    if not ratios:
        return " " * 21
    cells = list("──────────┼──────────")
    for ratio in ratios:
        place = 10 + round(10 * math.log10(ratio)) if ratio > 0 else 0
        cells[min(max(place, 0), 20)] = "◀" if place < 0 else "▶" if place > 20 else "●"
    return "".join(cells)


def sparkline(values: Sequence[float], width: int, *, log_scale: bool = False) -> str:
    """Return values as a line of blocks; several values share one where there are more than ``width``.

    Example:
        >>> sparkline([0.0, 1.0, 2.0, 7.0], width=4)
        '▁▂▃█'
    """
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [k * len(values) // width for k in range(width + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    if log_scale:
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    span = high - low
    if span <= 1e-3 * (1 if log_scale else max(abs(low), abs(high))):
        return _BLOCKS[3] * len(values)
    return "".join(_BLOCKS[min(7, int(8 * (value - low) / span))] for value in values)


def _middle(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _number(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.3g}"


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    options: Any = {"break_on_hyphens": False}
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, **options) or [first]


def line(log: Log, index: int) -> str:
    """Return a row as one plain line, for a pipe."""
    row = log.rows[index]
    turns = [value for name, value in row.items() if name.startswith("normwise/rotation/") and value > 0]
    parts = [f"step {log.steps[index]}"]
    for name in ("loss", "lr", "imbalance"):
        if f"normwise/{name}" in row:
            parts.append(f"{name} {row[f'normwise/{name}']:.4g}")
    if turns:
        parts.append(f"turn {min(turns):.2g} to {max(turns):.2g}")
    return "  ".join(parts)


def summary(log: Log) -> dict[str, Any]:
    """Return the log's present state as plain values, for ``--json``."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    last = log.rows[-1] if log.rows else {}
    layers: dict[str, dict[str, float | None]] = {name: {} for name in log.layers}
    network: dict[str, float | None] = {}
    for name, value in last.items():
        parts = name.split("/", 2)
        if len(parts) == 3 and parts[2] in layers:
            layers[parts[2]][parts[1]] = plain(value)
        elif parts[1:2] == ["balance"] or len(parts) == 2:
            network["/".join(parts[1:])] = plain(value)
    return {
        "folder": str(log.path.parent),
        "step": log.steps[-1] if log.steps else 0,
        "rows": len(log.rows),
        "ended": log.ended,
        "settings": log.settings,
        "findings": [finding.to_dict() for finding in log.present()],
        "network": network,
        "layers": layers,
        "notes": log.notes(),
    }
