from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from normwise.lab.claims.claim import Plot, Series
from normwise.lab.report.figure import PALETTE, figure, inline
from normwise.lab.report.page import write_report

NASTY = "<script>alert('$x$')</script> & \"quotes\""


def _plot(title: str = "accuracy", log_y: bool = False) -> dict[str, Any]:
    x = [1e-3, 1.0, 1e3]
    series = [
        Series("AWS", x, [0.1, 0.2, 0.3], [0.05, 0.1, None], [0.2, 0.3, None]),
        Series(NASTY, x, [0.1, None, 0.3], dashed=True),
    ]
    return asdict(Plot(title, "norm", "accuracy", series, log_x=True, log_y=log_y))


def _results(text: str) -> dict[str, Any]:
    claim = {
        "title": text,
        "source": text,
        "question": text,
        "arms": text,
        "statistic": text,
        "rule": text,
        "order": 1,
        "verdict": "not reproduced",
        "answer": text,
        "statistics": {},
        "plots": [_plot(text), _plot(log_y=True)],
        "tables": [{"title": text, "columns": ["rule", text], "rows": [[text, None], ["b", 1.5]]}],
        "notes": [text],
        "runs": {"count": 3, "not_finished": 1, "identities": []},
        "protocol": {
            "data": "digits",
            "budget": "quick",
            "seeds": [0, 1],
            "environment": dict.fromkeys(("normwise", "torch", "python", "machine"), text),
        },
    }
    return {"format": 1, "claims": {"made-up": claim}, "finished": "2026-01-01", "seconds": 1.0}


class _Page(HTMLParser):
    """Collects tags, attributes and ids; complains about tags that are not closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    html = write_report(_results(NASTY), tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_text_is_escaped_and_ids_are_unique(tmp_path: Path) -> None:
    html = write_report(_results(NASTY), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 10
    ids = [attributes["id"] for _, attributes in _Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert referenced <= set(ids)


def test_plots_follow_the_colours_of_the_page() -> None:
    svg = inline(_plot(), "p")
    assert "currentColor" in svg
    assert "var(--series-0)" in svg
    assert not any(colour in svg for colour in PALETTE)
    assert re.match(r'<svg[^>]*viewBox="[^"]*"', svg)
    assert not re.match(r'<svg[^>]* (width|height)="', svg)


def test_log_axes_are_labelled_in_plain_text() -> None:
    plot = _plot(log_y=True)
    plot["series"][0]["y"] = [1e-14, 1e-7, 1.0]
    svg = inline(plot, "p")
    assert "mathdefault" not in svg
    assert "10⁻¹⁴" in svg
    assert "0.001" in svg


def test_figures_stand_alone_and_are_the_same_each_time(tmp_path: Path) -> None:
    write_report(_results("words"), tmp_path / "report.html")
    svg = (tmp_path / "figures" / "made-up-1.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "AWS" in svg  # the legend is in it
    assert svg == figure(_plot("words"))


@pytest.mark.parametrize("verdict", ["reproduced", "partly", "not reproduced"])
def test_the_verdict_is_said_in_the_summary_and_at_the_claim(verdict: str, tmp_path: Path) -> None:
    results = json.loads(json.dumps(_results("words")))
    results["claims"]["made-up"]["verdict"] = verdict
    html = write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count(f">{verdict}</span>") == 2
