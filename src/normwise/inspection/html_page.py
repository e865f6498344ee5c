"""The plan as an HTML page that needs no script and no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normwise.inspection.inspect import Inspection
from normwise.inspection.summary import (
    MEANINGS,
    Layer,
    amount,
    layers,
    links,
    parameter_lines,
    symmetry_lines,
)
from normwise.planning.plan import Plan
from normwise.planning.treatment import Verdict

__all__ = ["write_page"]

_LETTER, _ROW, _LANE, _LONGEST = 7.3, 30, 16, 30  # pixels, and letters of a label


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page, and return its path.

    Args:
        inspection: The plan to show.
        path: The file; it is overwritten.

    Raises:
        ValueError: jinja2 is not installed, or the file cannot be written.
    """
    try:
        from normwise.pages import environment
    except ImportError as error:
        raise ValueError("--html needs the extra 'lab': pip install normwise[lab]") from error
    plan = inspection.plan
    total = sum(t.numel for t in plan.treatments)
    page = (
        environment("normwise.inspection")
        .get_template("inspect.html")
        .render(
            title=inspection.title,
            facts=f"{len(plan.treatments)} parameters with {amount(total)} values",
            seconds=inspection.seconds,
            how=inspection.how,
            tiles=list(_tiles(plan, total)),
            drawing=_drawing(plan),
            lines=parameter_lines(plan),
            symmetries=symmetry_lines(plan),
        )
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--html {str(path)!r} cannot be written ({error.strerror}): give another file"
        ) from error
    return path


def _tiles(plan: Plan, total: int) -> Iterator[dict[str, Any]]:
    for verdict in Verdict:
        treatments = [t for t in plan.treatments if t.verdict == verdict]
        if treatments:
            share = f"{sum(t.numel for t in treatments) / max(1, total):.0%}"
            meaning = MEANINGS[verdict]
            yield {"verdict": verdict, "count": len(treatments), "share": share, "meaning": meaning}


def _drawing(plan: Plan) -> dict[str, Any]:
    """Return where everything is drawn: layers downwards, then a lane for each symmetry to the right."""
    stack, drawn = layers(plan), links(plan)
    labels = [_label(layer) for layer in stack]
    start = 18 + _LETTER * max(map(len, labels), default=0)
    rows: list[dict[str, Any]] = [
        {"y": _y(k), "label": label, "full": layer.title, "chips": _chips(layer, start)}
        for k, (layer, label) in enumerate(zip(stack, labels, strict=True))
    ]
    card = 8 + max((chip["x"] + chip["width"] for row in rows for chip in row["chips"]), default=0.0)
    lanes = [
        {
            "x": card + 14 + _LANE * link.lane,
            "top": _y(min(link.dots)),
            "bottom": _y(max(link.dots)),
            "group": link.line.group,
            "title": f"{link.line.words}{f' (×{link.line.count})' if link.line.count > 1 else ''}",
            "dots": [{"y": _y(k), "sign": sign} for k, sign in sorted(link.dots.items())],
        }
        for link in drawn
    ]
    return {
        "rows": rows,
        "lanes": lanes,
        "card": round(card, 1),
        "width": round(card + 20 + _LANE * max((link.lane + 1 for link in drawn), default=0)),
        "height": _y(len(stack)) - 6,
        "left_out": len(symmetry_lines(plan)) - len(drawn),
    }


def _chips(layer: Layer, x: float) -> list[dict[str, Any]]:
    """Return a layer's parameters as labels side by side, from ``x`` on."""
    chips = []
    for line in layer.lines:
        leaf = line.label.split(" = ")[0].rpartition(".")[2]
        width = 16 + _LETTER * len(leaf)
        title = f"{line.label} {line.times} ({line.shape}): {line.first.verdict}, {line.explain()}"
        chips.append({"x": x, "width": width, "text": leaf, "title": title, "verdict": line.first.verdict})
        x += width + 5
    return chips


def _y(row: int) -> int:
    return 18 + _ROW * row


def _label(layer: Layer) -> str:
    title = layer.title
    return title if len(title) <= _LONGEST else f"…{title[1 - _LONGEST :]}"
