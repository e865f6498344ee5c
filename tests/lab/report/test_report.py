from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
from markupsafe import escape
from tests.pages import made_up_results
from tests.pages.checker import Page
from tests.pages.made_up_results import NASTY

from normwise.lab.claims.exhibits import HeatMap, Plot, Series, dot_plot
from normwise.lab.claims.statistics import Estimate
from normwise.lab.report.dot_plots import dots_svg
from normwise.lab.report.heat_maps import COLORS, heat_table, scale_of, text_color
from normwise.lab.report.html_report import write_report
from normwise.lab.report.inline_svg import inline_svg
from normwise.lab.report.paper_figures import heat_figure, plot_figure
from normwise.lab.report.plot_style import PALETTE, extent, tick_label, ticks


def _plot(title: str = "accuracy", log_y: bool = False) -> dict[str, Any]:
    x = [1e-3, 1.0, 1e3]
    series = [
        Series("AWS", x, [0.1, 0.2, 0.3], [0.05, 0.1, None], [0.2, 0.3, None]),
        Series(NASTY, x, [0.1, None, 0.3], dashed=True),
    ]
    return asdict(Plot(title, "norm", "accuracy", series, log_x=True, log_y=log_y))


def _heat(
    values: list[list[float | None]], low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    x, y = [f"x{i}" for i in range(len(values[0]))], [f"y{j}" for j in range(len(values))]
    return asdict(HeatMap(NASTY, "rate", "coefficient", x, y, values, "%", low, high))


def _claim(text: str = "") -> dict[str, Any]:
    return made_up_results.claim(Random(0), 2, text=text)


def _html(claim: dict[str, Any], folder: Path, **more: Any) -> str:
    results = made_up_results.results({"made-up": claim}) | more
    with made_up_results.without_figures():
        return write_report(results, folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_allows_its_own_scripts_only(tmp_path: Path) -> None:
    html = _html(_claim(NASTY), tmp_path)
    page = Page(html)
    for target in page.targets():
        assert target.startswith(("#", "data:,", "figures/"))
        assert not target.startswith("figures/") or (tmp_path / target).exists()
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-(.+?)'", policy) == digests
    assert len(scripts) == 2
    assert "Permission is hereby granted" in html  # uPlot's licence comes with it


def test_text_is_escaped_and_references_lead_somewhere(tmp_path: Path) -> None:
    html = _html(_claim(NASTY), tmp_path)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;") >= 10
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert referenced <= set(Page(html).ids)


def test_the_data_of_the_curves_are_in_the_page(tmp_path: Path) -> None:
    claim = _claim()
    claim["plots"] = [_plot(NASTY)]
    html = _html(claim, tmp_path)
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    data = json.loads(blocks[0])
    assert data["title"] == NASTY
    assert data["seeds"] == list(made_up_results.SEEDS)
    assert data["series"][0]["high"] == [0.2, 0.3, None]
    assert data["series"][1]["y"] == [0.1, None, 0.3]


def test_an_inline_svg_follows_the_colours_of_the_page() -> None:
    svg = inline_svg(_plot(), "p")
    assert "currentColor" in svg
    assert "series-0" in svg
    assert not any(colour in svg for colour in PALETTE)
    assert re.match(r'<svg[^>]*viewBox="[^"]*"', svg)
    assert not re.match(r'<svg[^>]* (width|height)="', svg)
    assert len(svg) < 3000


def test_an_inline_svg_has_a_gap_where_there_is_no_number() -> None:
    values = [1.0, 2.0, None, 4.0, 5.0, None, 7.0]
    svg = inline_svg(asdict(Plot("t", "x", "y", [Series("s", range(7), values)])), "p")
    line = re.search(r'class="line" d="([^"]*)"', svg)
    assert line is not None
    assert line[1].count("M") == 3
    assert line[1].count("L") == 2
    assert line[1].endswith("h2")  # one point by itself
    mark = re.search(r'class="mark" d="([^"]*)"', svg)
    assert mark is not None
    assert mark[1].count("M") == 5


def test_an_inline_svg_puts_points_at_their_places() -> None:
    """On a log axis the point of the middle decade is in the middle, and larger values are higher up."""
    svg = inline_svg(
        asdict(Plot("t", "x", "y", [Series("s", [0.01, 1.0, 100.0], [1.0, 3.0, 2.0])], log_x=True)), "p"
    )
    line = re.search(r'class="line" d="M([^"]*)"', svg)
    assert line is not None
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split()] for point in line[1].split("L"))
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_dot_plot_has_a_named_row_for_each_point_and_its_interval() -> None:
    plot = dot_plot(
        "t", "points", {"L2": Estimate(1.0, 0.5, 2.0, 3), NASTY: Estimate(-1.0, math.nan, math.nan, 1)}
    )
    svg = dots_svg(asdict(plot))
    assert "<script" not in svg
    names = re.findall(r'<text x="[^"]*" y="([^"]*)">([^<]*)</text>', svg)
    rows = [float(y) for y, name in names if name in ("L2", str(escape(NASTY)))]
    assert len(rows) == 2
    assert rows[0] < rows[1]
    (low, high) = re.findall(r'class="bar" d="M([\d.]+) [\d.]+H([\d.]+)"', svg)[0]  # the other has none
    assert svg.count('class="bar"') == 1
    marks = [float(x) for x in re.findall(r'class="mark" d="M([\d.]+) ', svg)]
    assert marks[1] < float(low) < marks[0] < float(high)
    assert (marks[0] - float(low)) * 2 == pytest.approx(float(high) - marks[0], abs=0.3)
    zero = float(re.findall(r'class="zero" d="M([\d.]+) ', svg)[0])
    assert zero == pytest.approx((marks[0] + marks[1]) / 2, abs=0.1)
    assert plot_figure(asdict(plot)).pdf.startswith(b"%PDF")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.one_in(2)
def test_inline_svgs_and_figures_of_nothing_and_of_one_point(log: bool) -> None:
    for x, y in (
        ([], []),
        ([1.0], [None]),
        ([0.0], [-1.0]),
        ([2.0], [3.0]),
        ([1.0, 2.0], [float("nan"), 3.0]),
    ):
        plot = asdict(Plot("t", "x", "y", [Series("s", x, y)], log_x=log, log_y=log))
        assert "nan" not in inline_svg(plot, "p")
        assert plot_figure(plot).pdf.startswith(b"%PDF")


def test_axes_have_round_numbers_within_their_ends() -> None:
    for low, high, log in (
        (0.0, 1.0, False),
        (-3e-9, 2e-9, False),
        (0.9, 1.1, True),
        (3.0, 40.0, True),
        (1e-30, 1e30, True),
    ):
        found = ticks(low, high, log)
        assert 2 <= len(found) <= 9
        assert all(low <= tick <= high for tick in found)
    assert extent([None, 2.0, -1.0, float("inf")], log=True) == pytest.approx((2 / 10**0.5, 2 * 10**0.5))
    assert tick_label(1e-14, log=True) == "10⁻¹⁴"
    assert tick_label(0.001, log=True) == "0.001"


def test_figures_stand_alone_and_are_the_same_each_time(tmp_path: Path) -> None:
    claim = _claim()
    claim["plots"], claim["maps"] = [_plot("words", log_y=True)], [_heat([[1.0, None]])]
    write_report(made_up_results.results({"made-up": claim}), tmp_path / "report.html")
    folder = tmp_path / "figures"
    names = {f"made-up-{which}.{kind}" for which in ("1", "map-1") for kind in ("svg", "pdf")}
    assert {path.name for path in folder.iterdir()} == names
    svg = (folder / "made-up-1.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "AWS" in svg  # the legend is in it
    assert svg == plot_figure(claim["plots"][0]).svg
    assert (folder / "made-up-1.pdf").read_bytes() == plot_figure(claim["plots"][0]).pdf
    assert (folder / "made-up-map-1.pdf").read_bytes() == heat_figure(claim["maps"][0]).pdf


def test_cells_of_heat_maps_are_coloured_by_value_and_readable() -> None:
    table = heat_table(_heat([[0.0, 5.0], [10.0, None]]))
    (first, second), (third, gap) = (row["cells"] for row in table["rows"])
    assert (first["back"], third["back"]) == (COLORS[0], COLORS[-1])
    assert second["back"] == COLORS[len(COLORS) // 2]
    assert gap["back"] is None
    assert gap["text"] == "–"
    assert table["gaps"]
    clipped = heat_table(_heat([[-1.0, 11.0]], low=0.0, high=10.0))
    assert (clipped["low"], clipped["high"]) == ("≤ 0", "≥ 10")
    assert scale_of(_heat([[3.0, 3.0]])).low < 3.0
    assert heat_table(_heat([[None]]))["low"] == "-0.5"


@pytest.mark.parametrize("back", COLORS)
def test_text_in_cells_has_contrast(back: str) -> None:
    def luminance(color: str) -> float:
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        weighted = zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        return float(sum(w * ((p + 0.055) / 1.055) ** 2.4 for w, p in weighted))

    light, dark = sorted((luminance(back), luminance(text_color(back))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_colours_grow_lighter_evenly() -> None:
    assert len(set(COLORS)) == len(COLORS) == 22
    sums = [sum(int(c[k : k + 2], 16) * w for k, w in ((1, 0.3), (3, 0.59), (5, 0.11))) for c in COLORS]
    assert sums == sorted(sums)


@pytest.mark.parametrize("verdict", ["reproduced", "partly", "not reproduced"])
def test_the_verdict_is_said_in_the_summary_and_at_the_claim(verdict: str, tmp_path: Path) -> None:
    html = _html(_claim() | {"verdict": verdict}, tmp_path)
    assert html.count(f"<span>{verdict}</span>") == 2
    tally = re.search(r"<strong>1</strong> . ([a-z ]+)</li>", html)
    assert tally is not None
    assert tally[1] == verdict


def test_failures_are_shown(tmp_path: Path) -> None:
    claim = _claim()
    html = _html(claim, tmp_path)
    assert "2 of 20 runs did not finish" in html
    assert "2 of them did not finish" in html
    for identity in claim["runs"]["failed"]:
        assert f"<code>runs/{identity}</code>: diverged at step 31" in html
    claim["runs"] |= {"not_finished": 0, "failed": {}}
    assert "did not finish" not in _html(claim | {"notes": []}, tmp_path)


def test_it_says_how_to_repeat_a_claim_and_gives_every_number(tmp_path: Path) -> None:
    html = _html(_claim(), tmp_path)
    assert ">normwise reproduce made-up --data digits --budget quick --seeds 0-2</pre>" in html
    assert '<th scope="row">difference</th><td>0.1235 [-0.1, 0.3], n = 3</td>' in html
    assert '<th scope="row">cells · 2 · holds</th><td>–</td>' in html


def test_a_comparison_is_shown_where_there_is_one(tmp_path: Path) -> None:
    assert "Compared with the reference" not in _html(_claim(), tmp_path)
    far, near = ({"mean": m, "low": m - 0.1, "high": m + 0.1, "n": 3} for m in (2.0, 0.5))
    rows = [
        {"statistic": NASTY, "here": far, "reference": near, "inside": False, "agrees": False},
        {"statistic": "b", "here": near, "reference": near, "inside": True, "agrees": True},
    ]
    verdicts = {"here": "partly", "reference": "reproduced"}
    found = {"verdict": verdicts, "compared": 40, "outside": 1, "rows": rows}
    html = _html(_claim(), tmp_path, comparison={"claims": {"made-up": found}})
    assert "Compared with the reference" in html
    assert "Of 40 statistics that both have, 1 are outside" in html
    assert html.count("<td>0.5 [0.4, 0.6]</td><td>yes</td>") == 1
    assert "<td>2 [1.9, 2.1]</td>" in html


def test_results_of_earlier_versions_can_be_shown(tmp_path: Path) -> None:
    claim = _claim()
    for part in ("maps", "traces"):
        del claim[part]
    del claim["runs"]["failed"]
    for series in claim["plots"][0]["series"]:
        del series["by_seed"]
    assert "made-up-1" in _html(claim, tmp_path)
