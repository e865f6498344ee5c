"""What the report can show of a claim, as data: plots, heat maps and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.lab.claims.statistics import Estimate, mean_with_interval

__all__ = ["LARGEST", "HeatMap", "Plot", "Series", "Table", "can_be_drawn", "dot_plot", "family"]

LARGEST = 1e150  # the ends of an axis, with their margin, must be finite


def can_be_drawn(value: float) -> bool:
    """Whether a number is 0, or finite and of a size that an axis, also a logarithmic one, can show."""
    return value == 0 or 1 / LARGEST <= abs(value) <= LARGEST


@dataclass(frozen=True)
class Series:
    """A curve with an optional interval at each point.

    Attributes:
        label: For the legend.
        x: Positions.
        y: Values, None where no run finished.
        low: Lower ends of the intervals.
        high: Upper ends of the intervals.
        dashed: Whether the line is dashed; 2: with short dashes.
        color: Index into the report's palette, shared by curves that belong together; None: the next colour.
        by_seed: The values of each seed, one sequence as long as ``x`` per seed.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool | int = False
    color: int | None = None
    by_seed: Sequence[Sequence[float | None]] | None = None

    def __post_init__(self) -> None:
        parts = {"y": self.y, "low": self.low, "high": self.high}
        parts |= {f"by_seed[{k}]": values for k, values in enumerate(self.by_seed or ())}
        for name, values in parts.items():
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{name} has {len(values)} values, x has {len(self.x)}")

    @classmethod
    def over_seeds(
        cls,
        label: str,
        values: Mapping[float, Sequence[float | None]],
        dashed: bool | int = False,
        color: int | None = None,
    ) -> Series:
        """Return means with 95 % intervals; ``values`` holds, for each x, one value per seed."""
        estimates = [mean_with_interval(at_x) for at_x in values.values()]
        return cls(
            label,
            list(values),
            [e.mean if e.n else None for e in estimates],
            [e.low if e.n > 1 else None for e in estimates],
            [e.high if e.n > 1 else None for e in estimates],
            dashed=dashed,
            color=color,
            by_seed=list(zip(*values.values(), strict=True)),
        )

    @classmethod
    def over_steps(
        cls,
        label: str,
        metrics: Sequence[Mapping[str, Any]],
        key: str,
        dashed: bool | int = False,
        color: int | None = None,
    ) -> Series:
        """Return a number that a run logged, over its steps; zeros are gaps, as on a log axis."""
        steps, values = [line["step"] for line in metrics], [line[key] or None for line in metrics]
        return cls(label, steps, values, dashed=dashed, color=color)


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis, or points with error bars beside names.

    Attributes:
        title: Above the plot.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        series: The curves.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        categories: Names; the x of each series are then their indices, and no line joins the points.
        reference: A number that the values are to be compared with, such as 0 for differences.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    categories: Sequence[str] = ()
    reference: float | None = None


def dot_plot(
    title: str, label: str, estimates: Mapping[str, Estimate], reference: float = 0.0, level: str = "95 %"
) -> Plot:
    """Return a plot with a point and its interval for each name."""
    found = list(estimates.values())
    known = [estimate.n > 1 for estimate in found]
    series = Series(
        f"mean and {level} interval",
        list(range(len(found))),
        [estimate.mean if estimate.n else None for estimate in found],
        [estimate.low if shown else None for estimate, shown in zip(found, known, strict=True)],
        [estimate.high if shown else None for estimate, shown in zip(found, known, strict=True)],
    )
    return Plot(title, "", label, [series], categories=list(estimates), reference=reference)


@dataclass(frozen=True)
class HeatMap:
    """A number for each pair of two settings, shown as a colour.

    Attributes:
        title: Above the map.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        x: Labels of the columns.
        y: Labels of the rows.
        values: ``values[j][i]`` belongs to ``x[i], y[j]``; None: there is no number.
        unit: Of the values.
        low: Lower end of the colour scale, by default the smallest value; maps to be compared share it.
        high: Upper end of the colour scale, by default the largest value.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        _check_rows("values", self.values, len(self.x))
        if len(self.values) != len(self.y):
            raise ValueError(f"values has {len(self.values)} rows, y has {len(self.y)} labels")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers. Numbers are printed in full: round them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]

    def __post_init__(self) -> None:
        _check_rows("rows", self.rows, len(self.columns))


def _check_rows(name: str, rows: Sequence[Sequence[object]], columns: int) -> None:
    for k, row in enumerate(rows):
        if len(row) != columns:
            raise ValueError(f"{name}[{k}] has {len(row)} entries, there are {columns} columns")


def family(member: str) -> str:
    """Return the name of a member of the weight-normalisation family in words."""
    return member.replace("_", " ")
