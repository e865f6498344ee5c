"""The style of all plots, on the page and for papers: colours, markers, axes and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = [
    "PALETTE",
    "SHAPES",
    "color_of",
    "dash_of",
    "extent",
    "has_markers",
    "number",
    "tick_label",
    "ticks",
]

# Okabe & Ito's colours, which colour-blind readers can distinguish; each curve also has its own marker.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
# Markers as SVG paths around a point, in pixels: circle, square, triangle, diamond, triangle, plus, cross.
SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-4.6l4.4 8h-8.8z",
    "m0-5l4.4 5l-4.4 5l-4.4-5z",
    "m0 4.6l4.4-8h-8.8z",
    "m-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",
    "m-4.2-2.2l2-2l2.2 2.2l2.2-2.2l2 2l-2.2 2.2l2.2 2.2l-2 2l-2.2-2.2l-2.2 2.2l-2-2l2.2-2.2z",
)
_DENSE = 20  # a curve with more points has no markers
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def dash_of(series: dict[str, Any]) -> str:
    """Return the SVG attribute of the dashes of a series: none, long or short."""
    dashes = ("", "6 4", "2 4")[int(series["dashed"])]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def color_of(series: dict[str, Any], k: int) -> int:
    """Return the palette index of the k-th series of a plot."""
    chosen = series["color"]
    return int(k if chosen is None else chosen) % len(PALETTE)


def has_markers(series: dict[str, Any]) -> bool:
    """Whether the points of a series have markers."""
    return len(series["x"]) <= _DENSE


def number(value: float) -> str:
    """Return a number as text with four significant digits.

    Example:
        >>> number(97.2461), number(0.00012), number(1234567.0), number(5)
        ('97.25', '0.00012', '1.235e+06', '5')
    """
    return f"{value:.4g}"


def tick_label(value: float, log: bool) -> str:
    """Return the label of a tick; on a log axis, numbers outside 0.001 … 9000 as powers of ten.

    Example:
        >>> tick_label(1e-14, log=True), tick_label(0.001, log=True), tick_label(2e6, log=True)
        ('10⁻¹⁴', '0.001', '2·10⁶')
    """
    if not log or not value > 0 or (value * (1 + 1e-9) >= 1e-3 and value < 9e3):
        return f"{value:.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if digit == 1 else f"{digit}·{power}"


def extent(values: Iterable[float | None], log: bool) -> tuple[float, float]:
    """Return the ends of an axis that shows these values, with a margin.

    Values that are None or not finite are ignored, as are non-positive values on a log axis.
    """
    shown = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not shown:
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = min(shown), max(shown)
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.04 * (high - low) or (0.5 if log else 0.1 * abs(low) or 0.5)
    low, high = low - margin, high + margin
    return (10.0**low, 10.0**high) if log else (low, high)


def ticks(low: float, high: float, log: bool, most: int = 7) -> list[float]:
    """Return up to about ``most`` round numbers between two; on a log axis powers of ten if two lie there.

    Example:
        >>> ticks(0.0, 1.0, log=False)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> ticks(0.05, 200.0, log=True)
        [0.1, 1.0, 10.0, 100.0]
    """
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        found = [10.0**k for k in range(first, last + 1) if k % step == 0]
        if len(found) >= 2:
            return found
        found = [digit * 10.0**k for k in range(first - 1, last + 1) for digit in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 2:
            return found
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step_size = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first, last = math.ceil(low / step_size - 1e-9), math.floor(high / step_size + 1e-9)
    return [float(f"{k * step_size:.12g}") for k in range(first, last + 1)]
