"""The page: results.json in plain words, plots and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from normwise.lab.report.figure import PALETTE, color_of, figure, inline
from normwise.lab.store import write_atomically
from normwise.pages import environment

__all__ = ["write_report"]


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the page, and beside it ``figures/`` with each plot as an SVG file; return the page's path.

    Args:
        results: What is in ``results.json``.
        path: Of the page; it is written over.
    """
    claims = sorted(results["claims"].items(), key=lambda item: item[1]["order"])
    figures = path.parent / "figures"
    figures.mkdir(exist_ok=True)
    plots: dict[str, list[Markup]] = {}
    for name, claim in claims:
        plots[name] = []
        for k, plot in enumerate(claim["plots"]):
            write_atomically(figures / f"{name}-{k + 1}.svg", figure(plot))
            # drawn by matplotlib, which escapes the text in it
            plots[name].append(Markup(inline(plot, f"{name}-{k + 1}")))
    page = (
        environment("normwise.lab.report")
        .get_template("report.html")
        .render(claims=claims, plots=plots, results=results, colors=len(PALETTE), color_of=color_of)
    )
    write_atomically(path, page)
    return path
