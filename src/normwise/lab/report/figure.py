"""Plots as SVG: inside the page, in its colours, and as files of their own."""

from __future__ import annotations

import io
import math
import re
from typing import Any

__all__ = ["PALETTE", "color_of", "figure", "inline"]

# Okabe & Ito's colours, which colour-blind readers can tell apart, each with a shape of its own.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK = "#010203"  # stands for the colour of the text until the page says which it is


def figure(plot: dict[str, Any]) -> str:
    """Return a plot (``dataclasses.asdict`` of a Plot) as an SVG document with its legend, on white."""
    return _draw(plot, ink="#222222", legend=True)


def inline(plot: dict[str, Any], prefix: str) -> str:
    """Return a plot as an ``<svg>`` element for a page.

    Lines take the page's colours ``--series-0`` … and text that of its surroundings, so it follows light
    and dark. The legend is left to the page.

    Args:
        plot: ``dataclasses.asdict`` of a Plot.
        prefix: Goes before every id in the element, so that two of them can stand in one page.
    """
    svg = _draw(plot, ink=_INK, legend=False)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for k, colour in enumerate(PALETTE):
        svg = svg.replace(colour, f"var(--series-{k})")
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # the size comes from the page; the viewBox keeps the shape
    head, body = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body


def _draw(plot: dict[str, Any], ink: str, legend: bool) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "normwise",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.2,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
        ),
        "grid.color": ink,
    }
    with mpl.rc_context(style):
        fig = Figure(figsize=(5.6, 3.6 + (0.2 * len(plot["series"]) if legend else 0)), layout="constrained")
        axes = fig.add_subplot()
        for k, series in enumerate(plot["series"]):
            _curve(axes, series, k)
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot["y_label"])
        for log, axis, scale in (
            (plot["log_x"], axes.xaxis, axes.set_xscale),
            (plot["log_y"], axes.yaxis, axes.set_yscale),
        ):
            if log:
                scale("log")
                axis.set_major_formatter(lambda value, _: _power_of_ten(value))
        if legend:
            axes.set_title(plot["title"], fontsize=10)
            fig.legend(loc="outside lower center", ncols=2, frameon=False)
        text = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(text, format="svg", transparent=not legend, metadata=metadata)
    return text.getvalue()


def color_of(series: dict[str, Any], k: int) -> int:
    """Return the index into the palette of the k-th series of a plot."""
    chosen = series["color"]
    return int(k if chosen is None else chosen) % len(PALETTE)


def _power_of_ten(value: float) -> str:
    """Write 0.001 … 1000 out, and other powers of ten with a superscript: matplotlib's own is mathtext."""
    if not value > 0:
        return ""
    exponent = round(math.log10(value))
    if abs(exponent) <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _curve(axes: Any, series: dict[str, Any], k: int) -> None:
    colour, marker = PALETTE[color_of(series, k)], MARKERS[k % len(MARKERS)]
    nan = float("nan")
    x = list(series["x"])
    y = [nan if value is None else value for value in series["y"]]
    dense = len(x) > 20
    axes.plot(
        x,
        y,
        color=colour,
        marker=None if dense else marker,
        markersize=5,
        linestyle="--" if series["dashed"] else "-",
        linewidth=1.6,
        label=series["label"],
    )
    if series["low"] is not None and series["high"] is not None:
        low, high = ([nan if v is None else v for v in series[key]] for key in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
