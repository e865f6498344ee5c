"""Plots and heat maps as figures for papers: SVG and PDF with a legend on white."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from normwise.lab.report.heat_maps import COLORS, scale_of, text_color
from normwise.lab.report.plot_style import PALETTE, color_of, extent, has_markers, number, tick_label, ticks

__all__ = ["Figure", "heat_figure", "plot_figure"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # matplotlib's codes for plot_style.SHAPES
LINES = ("-", "--", ":")
_INK = "#222222"


class Figure(NamedTuple):
    """A figure in two formats; equal plots give equal bytes."""

    svg: str
    pdf: bytes


def plot_figure(plot: dict[str, Any]) -> Figure:
    """Return a plot (``dataclasses.asdict`` of a Plot) as a figure."""
    if plot.get("categories"):
        return _dots_figure(plot)
    with _style():
        from matplotlib.figure import Figure as Canvas

        fig = Canvas(figsize=(5.6, 3.4))
        axes = fig.add_subplot()
        axes.autoscale(False)
        drawn = [v for s in plot["series"] for name in ("y", "low", "high") for v in s[name] or ()]
        _axis(axes, "x", [x for s in plot["series"] for x in s["x"]], plot["log_x"])
        _axis(axes, "y", drawn, plot["log_y"])
        for k, series in enumerate(plot["series"]):
            _curve(axes, series, k)
        axes.set(xlabel=plot["x_label"], ylabel=plot["y_label"])
        axes.set_title(plot["title"], fontsize=10, wrap=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
        return _saved(fig)


def _dots_figure(plot: dict[str, Any]) -> Figure:
    """Return a plot with categories: a row for each name, values from left to right."""
    with _style():
        from matplotlib.figure import Figure as Canvas

        names, count = plot["categories"], len(plot["series"])
        fig = Canvas(figsize=(5.6, 0.9 + (0.12 + 0.17 * count) * len(names)))
        axes = fig.add_subplot()
        drawn = [v for s in plot["series"] for name in ("y", "low", "high") for v in s[name] or ()]
        _axis(axes, "x", [*drawn, plot["reference"]], False)
        for k, series in enumerate(plot["series"]):
            for place, x in enumerate(series["x"]):
                y = x + (k - (count - 1) / 2) * 0.7 / count
                low, high = (series[part][place] if series[part] else None for part in ("low", "high"))
                colour = PALETTE[color_of(series, k)]
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=colour, linewidth=1.4)
                if series["y"][place] is not None:
                    label = series["label"] if place == 0 and count > 1 else None
                    mark = MARKERS[k % len(MARKERS)]
                    axes.plot([series["y"][place]], [y], mark, color=colour, markersize=5, label=label)
        if plot["reference"] is not None:
            axes.axvline(plot["reference"], color=_INK, linewidth=0.8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=plot["y_label"])
        axes.set_title(plot["title"], fontsize=10, wrap=True)
        if count > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
        return _saved(fig)


def heat_figure(heat: dict[str, Any]) -> Figure:
    """Return a heat map (``dataclasses.asdict`` of a HeatMap) as a figure, first row at the top."""
    with _style():
        from matplotlib.colors import ListedColormap, Normalize
        from matplotlib.figure import Figure as Canvas

        columns, rows = len(heat["x"]), len(heat["y"])
        fig = Canvas(figsize=(1.6 + 0.62 * columns, 1.1 + 0.4 * rows))
        axes = fig.add_subplot()
        scale = scale_of(heat)
        nan = float("nan")
        values = [[nan if value is None else value for value in row] for row in heat["values"]]
        image = axes.imshow(
            values, cmap=ListedColormap(COLORS), norm=Normalize(scale.low, scale.high), aspect="auto"
        )
        for j, row in enumerate(heat["values"]):
            for i, value in enumerate(row):
                ink = _INK if value is None else text_color(scale.color(value))
                text = "–" if value is None else number(value)
                axes.text(i, j, text, ha="center", va="center", color=ink, fontsize=8)
        axes.set_xticks(range(columns), heat["x"])
        axes.set_yticks(range(rows), heat["y"])
        axes.set(xlabel=heat["x_label"], ylabel=heat["y_label"])
        axes.grid(False)
        axes.set_title(heat["title"], fontsize=10, wrap=True)
        fig.colorbar(image, label=heat["unit"])
        return _saved(fig)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "normwise",
        "pdf.fonttype": 42,  # TrueType, which journals require
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.2,
        **dict.fromkeys(inked, _INK),
    }
    with mpl.rc_context(style):
        yield


def _saved(fig: Any) -> Figure:
    svg, pdf = io.StringIO(), io.BytesIO()
    box = fig.get_tightbbox().padded(0.08)  # inches
    fig.savefig(
        svg, format="svg", bbox_inches=box, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    fig.savefig(
        pdf, format="pdf", bbox_inches=box, metadata=dict.fromkeys(("CreationDate", "Creator", "Producer"))
    )
    return Figure(svg.getvalue(), pdf.getvalue())


def _axis(axes: Any, which: str, values: list[float | None], log: bool) -> None:
    """Give an axis the same ends and ticks as on the page."""
    low, high = extent(values, log)
    axis = getattr(axes, f"{which}axis")
    if log:
        getattr(axes, f"set_{which}scale")("log")
        axis.set_minor_locator(_nowhere())
    getattr(axes, f"set_{which}lim")(low, high)
    places = ticks(low, high, log)
    axis.set_ticks(places, [tick_label(value, log) for value in places])


def _nowhere() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _curve(axes: Any, series: dict[str, Any], k: int) -> None:
    colour, marker = PALETTE[color_of(series, k)], MARKERS[k % len(MARKERS)]
    nan = float("nan")
    x = list(series["x"])
    y = [nan if value is None else value for value in series["y"]]
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker if has_markers(series) else None,
        markersize=5,
        linestyle=LINES[int(series["dashed"])],
        linewidth=1.6,
        label=series["label"],
    )
    if series["low"] is not None and series["high"] is not None:
        low, high = ([nan if v is None else v for v in series[key]] for key in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
