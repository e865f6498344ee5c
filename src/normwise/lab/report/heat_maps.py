"""Heat maps as tables with coloured cells."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from normwise.lab.report.plot_style import number
from normwise.pages.colors import COLORS

__all__ = ["COLORS", "Scale", "heat_table", "scale_of", "text_color"]


class Scale(NamedTuple):
    """A colour scale from ``low`` to ``high``; values outside get the colour of the nearer end."""

    low: float
    high: float

    def color(self, value: float) -> str:
        """Return the colour of a value as #rrggbb."""
        share = (value - self.low) / (self.high - self.low)
        return COLORS[min(max(int(share * len(COLORS)), 0), len(COLORS) - 1)]


def scale_of(heat: dict[str, Any]) -> Scale:
    """Return the colour scale of a heat map (``dataclasses.asdict`` of a HeatMap)."""
    there = _numbers(heat) or [0.0]
    low = min(there) if heat["low"] is None else heat["low"]
    high = max(there) if heat["high"] is None else heat["high"]
    return Scale(low, high) if high > low else Scale(low - 0.5, low + 0.5)


def heat_table(heat: dict[str, Any]) -> dict[str, Any]:
    """Return a heat map for the template: rows of coloured cells, and the ends of the colour scale."""
    scale = scale_of(heat)
    there = _numbers(heat)
    below, above = any(v < scale.low for v in there), any(v > scale.high for v in there)
    rows = [
        {"label": label, "cells": [_cell(value, scale) for value in row]}
        for label, row in zip(heat["y"], heat["values"], strict=True)
    ]
    return {
        "rows": rows,
        "colors": COLORS,
        "low": ("≤ " if below else "") + number(scale.low),
        "high": ("≥ " if above else "") + number(scale.high),
        "gaps": any(cell["back"] is None for row in rows for cell in row["cells"]),
    }


def text_color(back: str) -> str:
    """Return black or white, whichever contrasts more with ``back`` (WCAG 2.2; at least 4.5)."""
    parts = [int(back[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _numbers(heat: dict[str, Any]) -> list[float]:
    return [v for row in heat["values"] for v in row if v is not None and math.isfinite(v)]


def _cell(value: float | None, scale: Scale) -> dict[str, str | None]:
    if value is None or not math.isfinite(value):
        return {"text": "–", "back": None, "ink": None}
    back = scale.color(value)
    return {"text": number(value), "back": back, "ink": text_color(back)}
