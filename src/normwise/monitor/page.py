"""A monitor's log as an HTML page that needs no network. Needs the extra 'lab' (jinja2)."""

from __future__ import annotations

import base64
import itertools
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from normwise.monitor.finding import Finding
from normwise.monitor.log import Log
from normwise.pages import data_block, environment, script_hash, vendored
from normwise.pages.colors import COLORS
from normwise.planning.tables import by_pattern, label

__all__ = ["write_page"]

_QUANTITIES = ("norm", "rotation", "effective_lr", "equilibrium_norm", "equilibrium_rotation")
_BYTES = 600_000  # of all curves; with the script of the plots the page stays below a megabyte
_STEPS = 65534  # of the logarithmic scale of a quantity; 0 stands for a missing value


def write_page(log: Log, path: Path) -> Path:
    """Write the page, and return its path.

    Args:
        log: What to show.
        path: The file; it is overwritten.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        path.write_text(_page(log), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--html {str(path)!r} cannot be written ({error.strerror}): give another file"
        ) from error
    return path


def _page(log: Log) -> str:
    templates = environment("normwise.monitor")
    library = vendored("uplot/uPlot.iife.min.js")
    script = Markup(templates.get_template("watch.js").render())  # safe: contains nothing of the log
    names = log.layers
    numbers = {name: k for k, name in enumerate(names)}
    kinds = log.settings.get("layers")
    kinds = kinds if isinstance(kinds, dict) else {}
    return templates.get_template("watch.html").render(
        title=str(log.path.parent),
        facts=_facts(log),
        notes=log.notes(),
        findings=[_finding(finding, numbers) for finding in log.present()],
        past=[finding for finding in log.past if finding.ended],
        groups=[
            {
                "name": label(group),
                "layers": [_layer(log, name, numbers[name], kinds) for name in group],
                "wrong": any(name in finding.layers for name in group for finding in log.present()),
            }
            for group in by_pattern((name, None, name) for name in names)
        ],
        count=len(names),
        has_loss=any(math.isfinite(value) for value in log.series("loss")),
        data=data_block(_data(log, names)),
        library=library,
        library_style=vendored("uplot/uPlot.min.css"),
        library_license=vendored("uplot/LICENSE"),
        script=script,
        script_sources=f"{script_hash(library)} {script_hash(script)}",
    )


def _facts(log: Log) -> str:
    total = log.settings.get("total_steps")
    of = f" of {total}" if isinstance(total, int) else ""
    facts = [f"step {log.steps[-1] if log.steps else 0}{of}", f"{len(log.rows)} rows"]
    if isinstance(log.settings.get("optimizers"), list):
        facts.append(", ".join(dict.fromkeys(map(str, log.settings["optimizers"]))))
    return "; ".join([*facts, f"{len(log.layers)} layers", "ended" if log.ended else "running"])


def _finding(finding: Finding, numbers: dict[str, int]) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "since": finding.since,
        "evidence": finding.evidence,
        "remedy": finding.remedy,
        "layers": [(name, numbers.get(name)) for name in finding.layers[:8]],
        "more": max(0, len(finding.layers) - 8),
    }


def _layer(log: Log, name: str, number: int, kinds: dict[str, Any]) -> dict[str, Any]:
    turn, settled = log.last("rotation", name), log.last("equilibrium_rotation", name)
    ratio = turn / settled if turn > 0 and settled > 0 else None
    return {
        "name": name,
        "number": number,
        "kind": str(kinds.get(name, "")),
        "norm": _number(log.last("norm", name)),
        "turn": _number(turn),
        "rate": _number(log.last("effective_lr", name)),
        "settled": _number(settled),
        "place": None if ratio is None else round(50 + 50 * min(1, max(-1, math.log10(ratio))), 1),
        "wrong": [finding.kind for finding in log.present() if name in finding.layers],
    }


def _number(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.3g}"


def _data(log: Log, names: Sequence[str]) -> dict[str, Any]:
    """Return what the script draws: steps, losses, and per quantity one string for all layers."""
    most = max(20, int(_BYTES / (len(_QUANTITIES) * max(1, len(names)) * 8 / 3)))
    count = min(len(log.rows), most, 4000)
    edges = [k * len(log.rows) // max(1, count) for k in range(count + 1)]
    spans = list(itertools.pairwise(edges))
    return {
        "steps": [log.steps[end - 1] for _, end in spans],
        "per_point": max(1, round(len(log.rows) / max(1, count))),
        "loss": [_mean(values) for values in _pieces(list(log.series("loss")), spans)],
        "names": list(names),
        "colors": COLORS,
        "quantities": {quantity: _encoded(log, names, quantity, spans) for quantity in _QUANTITIES},
    }


def _pieces(values: Sequence[float], spans: Sequence[tuple[int, int]]) -> list[Sequence[float]]:
    return [values[start:end] for start, end in spans]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _encoded(
    log: Log, names: Sequence[str], quantity: str, spans: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return a quantity of all layers: 16 bits for each number, on a logarithmic scale from low to high."""
    curves = []
    for name in names:
        logs = [math.log10(v) if 0 < v < math.inf else math.nan for v in log.series(quantity, name)]
        curves.append([_mean(values) for values in _pieces(logs, spans)])
    there = [value for curve in curves for value in curve if value is not None]
    low, high = (min(there), max(there)) if there else (0.0, 1.0)
    span = high - low or 1.0
    codes = [
        0 if value is None else 1 + round(_STEPS * (value - low) / span)
        for curve in curves
        for value in curve
    ]
    packed = base64.b64encode(struct.pack(f"<{len(codes)}H", *codes)).decode("ascii")
    return {"low": low, "span": span, "codes": packed if there else ""}
