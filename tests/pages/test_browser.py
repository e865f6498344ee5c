"""The report in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.pages import made_up_results

from normwise.lab.report.html_report import write_report

# The number of pixels of a figure's canvas that have, to within rounding, the colour of a series.
PIXELS = """(figure, k) => {
  const canvas = figure.querySelector("canvas");
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width + 1, canvas.height];
  const pixels = copy.getContext("2d", { willReadFrequently: true });
  pixels.drawImage(canvas, 0, 0);
  pixels.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--series-${k}`).trim();
  pixels.fillRect(canvas.width, 0, 1, 1);
  const want = pixels.getImageData(canvas.width, 0, 1, 1).data;
  const { data } = pixels.getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] > 250 && [0, 1, 2].every((c) => Math.abs(data[i + c] - want[c]) < 4)) count += 1;
  }
  return count;
}"""


@contextmanager
def _opened(browser: Any, path: Path, **settings: Any) -> Iterator[Any]:
    """Open a page; afterwards nothing may have gone wrong in it, and nothing been asked for outside."""
    context = browser.new_context(**settings)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url[:200]))
    page.goto(path.as_uri())
    if settings.get("java_script_enabled", True):
        page.evaluate("() => document.querySelectorAll('details.claim').forEach((d) => (d.open = true))")
        page.wait_for_selector("#plain-1.live canvas, #made-up-1-1.live canvas", state="attached")
    yield page
    assert complaints == []
    assert requests == [path.as_uri()]
    context.close()


def _colored(page: Any, figure: str, k: int) -> int:
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return int(page.locator(f"#{figure}").evaluate(PIXELS, k))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.one_in(2)
def test_plots_are_drawn_in_the_colours_of_the_page(browser: Any, report: Path, scheme: str) -> None:
    with _opened(browser, report, color_scheme=scheme) as page:
        for k in range(4):
            assert _colored(page, "plain-1", k) > 100
        page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
        for k in range(4):
            assert _colored(page, "plain-1", k) > 100
        assert page.locator(".static").first.is_hidden()


def test_the_legend_hides_and_shows_a_curve(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        button = page.locator("#plain-1 .legend button").nth(1)
        before = _colored(page, "plain-1", 1)
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "false"
        assert _colored(page, "plain-1", 1) == 0
        assert _colored(page, "plain-1", 0) > 100
        assert _colored(page, "plain-2", 1) > 100
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert _colored(page, "plain-1", 1) == pytest.approx(before, rel=0.05)


@pytest.mark.thorough
def test_zooming_by_mouse_by_buttons_and_by_keys(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        figure = page.locator("#plain-1")
        reset = figure.get_by_role("button", name="reset zoom")
        assert reset.is_disabled()
        figure.scroll_into_view_if_needed()
        everything = _colored(page, "plain-1", 0)
        box = figure.locator(".u-over").bounding_box()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + 0.95 * box["height"], steps=3)
        page.mouse.up()
        assert figure.get_attribute("data-zoomed") == "true"
        assert _colored(page, "plain-1", 0) < 0.2 * everything  # the best curve is above that corner
        reset.click()
        assert figure.get_attribute("data-zoomed") == "false"
        figure.get_by_role("button", name="zoom in").click()
        assert figure.get_attribute("data-zoomed") == "true"
        figure.locator(".canvas").focus()
        page.keyboard.press("0")
        assert figure.get_attribute("data-zoomed") == "false"
        page.mouse.move(0, 0)
        assert _colored(page, "plain-1", 0) == pytest.approx(everything, rel=0.05)
        page.keyboard.press("+")
        assert figure.get_attribute("data-zoomed") == "true"


def test_seeds_are_shown_and_named(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        figure = page.locator("#plain-1")
        seeds = figure.get_by_role("button", name="seeds")
        seeds.click()
        assert seeds.get_attribute("aria-pressed") == "true"
        figure.scroll_into_view_if_needed()
        box = figure.locator(".u-over").bounding_box()
        for part in range(1, 20):
            page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + part / 20 * box["height"])
            if "seed" in figure.locator(".at").inner_text():
                break
        assert "seed" in figure.locator(".at").inner_text()


def test_keys_read_the_points_aloud(browser: Any, report: Path) -> None:
    from playwright.sync_api import expect

    with _opened(browser, report) as page:
        figure = page.locator("#plain-1")
        figure.locator(".canvas").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(figure.locator("[aria-live]")).to_have_text(re.compile("^at 0.01: AWS "))
        assert "[" in figure.locator(".legend .value").first.inner_text()


def test_the_points_are_a_table(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        page.locator("#plain-1 details > summary").click()
        table = page.locator("#plain-1 details table")
        assert table.locator("tbody tr").count() == 7
        assert table.locator("thead th").count() == 1 + 4 * (3 + len(made_up_results.SEEDS))
        assert table.locator("tbody tr").nth(3).locator("td").nth(12).inner_text() == "–"  # the gap


def test_training_is_drawn_when_it_is_opened(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        assert page.locator("#plain-trace-1 canvas").count() == 0
        page.locator("#plain details.traces > summary").click()
        page.wait_for_selector("#plain-trace-3.live canvas", state="attached")
        assert _colored(page, "plain-trace-2", 5) > 100


def test_attacks_in_the_text_are_text(browser: Any, report: Path) -> None:
    with _opened(browser, report) as page:
        assert page.locator("#nasty h2").inner_text().startswith("<script>alert(")
        assert page.locator("#nasty-1 .legend button").first.inner_text().startswith("<script>")
        assert page.locator("#nasty-1.live").count() == 1


@pytest.mark.parametrize("width", [380, 800, 1400])
@pytest.mark.one_in(2)
def test_nothing_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    with _opened(browser, report, viewport={"width": width, "height": 700}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        page.wait_for_selector("#plain-trace-3.live canvas", state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_a_script_the_curves_are_there(browser: Any, report: Path) -> None:
    with _opened(browser, report, java_script_enabled=False) as page:
        assert page.locator("#plain-1 .static svg").is_hidden()
        page.locator("#plain > details > summary").click()
        assert page.locator("#plain-1 .static svg").is_visible()
        assert page.locator("#plain-1 .canvas").is_hidden()


def test_on_paper_there_are_drawings_and_commands(browser: Any, report: Path) -> None:
    with _opened(browser, report, color_scheme="dark") as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("#plain-1 .static svg").is_visible()
        assert page.locator("#plain-1 .canvas").is_hidden()
        assert page.locator("#plain .repeat pre").is_visible()
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("#plain .repeat pre").is_hidden()


@pytest.mark.thorough
def test_the_quick_budget_is_below_a_megabyte(browser: Any, tmp_path: Path) -> None:
    with made_up_results.without_figures():
        path = write_report(made_up_results.many(), tmp_path / "report.html")
    assert path.stat().st_size < 1_000_000
    with _opened(browser, path) as page:
        assert page.locator("figure.live canvas").count() == 40
        assert page.locator("figure.heat").count() == 5
