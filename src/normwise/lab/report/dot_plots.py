"""Dot plots: a point with its interval beside each name, as SVG inside the page."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from normwise.lab.report.plot_style import SHAPES, color_of, extent, tick_label, ticks

__all__ = ["dots_svg"]

_WIDTH, _TOP, _BOTTOM, _RIGHT = 700, 8, 24, 16  # pixels
_ROW, _LETTER, _LONGEST = 16, 6.4, 300


def dots_svg(plot: dict[str, Any]) -> Markup:
    """Return a plot with categories as an ``<svg>``: a row for each name, values from left to right.

    Colours are those of :func:`normwise.lab.report.inline_svg.inline_svg`.

    Args:
        plot: ``dataclasses.asdict`` of a Plot with categories.
    """
    names, series = plot["categories"], plot["series"]
    left = 12 + min(_LONGEST, _LETTER * max(map(len, names)))
    row = _ROW * len(series) + 8
    bottom = _TOP + row * len(names)
    drawn = [v for s in series for part in ("y", "low", "high") for v in s[part] or ()]
    low, high = extent([*drawn, plot.get("reference")], False)

    def across(value: float) -> float:
        return float(left + (value - low) / (high - low) * (_WIDTH - _RIGHT - left))

    marks = ticks(low, high, False)
    grid = "".join(f"M{across(value):.1f} {_TOP}V{bottom}" for value in marks)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" font-size="12" fill="currentColor">']
    parts.append(f'<path class="grid" d="{grid}"/>')
    if plot.get("reference") is not None:
        parts.append(f'<path class="zero" d="M{across(plot["reference"]):.1f} {_TOP}V{bottom}"/>')
    below, middle = bottom + 16, _TOP + row / 2 + 4
    parts.append('<g text-anchor="middle">')
    parts += [f'<text x="{across(v):.1f}" y="{below}">{tick_label(v, False)}</text>' for v in marks]
    parts.append('</g><g text-anchor="end">')
    parts += [
        f'<text x="{left - 8:.1f}" y="{middle + row * k:.1f}">{escape(name)}</text>'
        for k, name in enumerate(names)
    ]
    parts.append("</g>")
    for k, one in enumerate(series):
        parts.append(f'<g class="series-{color_of(one, k)}">')
        for place, x in enumerate(one["x"]):
            value = one["y"][place]
            if value is None:
                continue
            y = _TOP + row * int(x) + 4 + _ROW * (k + 0.5)
            low_end, high_end = (one[part][place] if one[part] else None for part in ("low", "high"))
            if low_end is not None and high_end is not None:
                bar = f"M{across(low_end):.1f} {y:.1f}H{across(high_end):.1f}"
                parts.append(f'<path class="bar" d="{bar}"/>')
            parts.append(f'<path class="mark" d="M{across(value):.1f} {y:.1f}{SHAPES[k % len(SHAPES)]}"/>')
        parts.append("</g>")
    return Markup("".join([*parts, "</svg>"]))
