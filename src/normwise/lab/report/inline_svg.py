"""Plots as small static SVG inside the page, for printing and for browsers without scripts.

The figures of :mod:`normwise.lab.report.paper_figures` are about ten times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from normwise.lab.report.plot_style import SHAPES, color_of, dash_of, extent, has_markers, tick_label, ticks

__all__ = ["inline_svg", "legend_key"]

_WIDTH, _HEIGHT, _TOP, _BOTTOM, _RIGHT = 640, 300, 8, 24, 12  # pixels
_LETTER = 6.6

Scale = Callable[[float | None], float | None]


def inline_svg(plot: dict[str, Any], prefix: str) -> Markup:
    """Return a plot as an ``<svg>`` element without title, legend and axis labels, which the page adds.

    Lines have the colours ``--series-0`` … of the page and text has the colour of its surroundings, so the
    plot follows the light and the dark theme.

    Args:
        plot: ``dataclasses.asdict`` of a Plot.
        prefix: Prefix of the ids in the element, which must be unique in the page.
    """
    x_low, x_high = extent((x for s in plot["series"] for x in s["x"]), plot["log_x"])
    drawn = [v for s in plot["series"] for name in ("y", "low", "high") for v in s[name] or ()]
    y_low, y_high = extent(drawn, plot["log_y"])
    x_ticks, y_ticks = ticks(x_low, x_high, plot["log_x"]), ticks(y_low, y_high, plot["log_y"])
    y_labels = [tick_label(value, plot["log_y"]) for value in y_ticks]
    left = 12 + _LETTER * max(map(len, y_labels), default=0)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = _scale(x_low, x_high, left, right, plot["log_x"])
    up = _scale(y_low, y_high, bottom, _TOP, plot["log_y"])
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" fill="currentColor">']
    grid = [f"M{_n(across(x))} {_TOP}V{bottom}" for x in x_ticks]
    grid += [f"M{_n(left)} {_n(up(y))}H{right}" for y in y_ticks]
    parts.append(f'<path class="grid" d="{"".join(grid)}"/>')
    parts.append('<g text-anchor="middle">')
    parts += [
        f'<text x="{_n(across(x))}" y="{_HEIGHT - 6}">{tick_label(x, plot["log_x"])}</text>' for x in x_ticks
    ]
    parts.append('</g><g text-anchor="end">')
    parts += [
        f'<text x="{_n(left - 6)}" y="{_n((up(y) or 0) + 4)}">{label}</text>'
        for y, label in zip(y_ticks, y_labels, strict=True)
    ]
    parts.append("</g>")
    parts.append(
        f'<clipPath id="{escape(prefix)}-clip">'
        f'<rect x="{_n(left)}" y="{_TOP - 4}" width="{_n(right - left + 4)}" '
        f'height="{bottom - _TOP + 8}"/></clipPath><g clip-path="url(#{escape(prefix)}-clip)">'
    )
    bands = [_band(s, k, across, up) for k, s in enumerate(plot["series"])]
    curves = [_curve(s, k, across, up) for k, s in enumerate(plot["series"])]
    return Markup("".join([*parts, *bands, *curves, "</g></svg>"]))


def legend_key(series: dict[str, Any], k: int) -> Markup:
    """Return the line and the marker of the k-th series of a plot, for the legend."""
    shape = f'<path class="mark" d="M15 7{_shape(k)}"/>' if has_markers(series) else ""
    dash = dash_of(series)
    return Markup(
        f'<svg class="key series-{color_of(series, k)}" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="line"{dash} d="M1 7H29"/>{shape}</svg>'
    )


def _shape(k: int) -> str:
    return SHAPES[k % len(SHAPES)]


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    """Return the function from values to pixels, which returns None for values that cannot be drawn."""
    turn: Callable[[float], float] = math.log10 if log else float
    begin, length = turn(low), turn(high) - turn(low)

    def place(value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or (log and value <= 0):
            return None
        return start + (turn(value) - begin) / length * (end - start)

    return place


def _curve(series: dict[str, Any], k: int, across: Scale, up: Scale) -> str:
    places = [(across(x), up(y)) for x, y in zip(series["x"], series["y"], strict=True)]
    dash = dash_of(series)
    lines = "".join(_line(run) if len(run) > 1 else _dot(run[0]) for run in _runs(places))
    text = f'<g class="series-{color_of(series, k)}"><path class="line"{dash} d="{lines}"/>'
    if has_markers(series):
        there = [(x, y) for x, y in places if x is not None and y is not None]
        text += f'<path class="mark" d="{"".join(f"M{_n(x)} {_n(y)}{_shape(k)}" for x, y in there)}"/>'
    return text + "</g>"


def _band(series: dict[str, Any], k: int, across: Scale, up: Scale) -> str:
    if series["low"] is None or series["high"] is None:
        return ""
    text = ""
    ends = zip(series["x"], series["low"], series["high"], strict=True)
    for run in _runs([(across(x), up(low), up(high)) for x, low, high in ends]):
        there = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        text += _line(there) + "Z"
    return f'<path class="band series-{color_of(series, k)}" d="{text}"/>'


def _runs(places: Sequence[tuple[float | None, ...]]) -> list[list[tuple[Any, ...]]]:
    """Split places at the gaps."""
    runs: list[list[tuple[Any, ...]]] = [[]]
    for place in places:
        if None in place:
            runs.append([])
        else:
            runs[-1].append(place)
    return [run for run in runs if run]


def _line(places: Sequence[tuple[Any, ...]]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in places)


def _dot(place: tuple[Any, ...]) -> str:
    return f"M{_n(place[0] - 1)} {_n(place[1])}h2"


def _n(pixels: float | None) -> str:
    """Return a position as text, to a tenth of a pixel; None becomes 0."""
    return f"{pixels or 0.0:.1f}".removesuffix(".0")
