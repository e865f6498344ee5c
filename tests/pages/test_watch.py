"""The page of ``normwise watch`` in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.monitor import made_up
from tests.pages.checker import Page

from normwise.monitor.log import Log
from normwise.monitor.page import write_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("watch")
    made = {}
    for name, settings in {"plain": {}, "nasty": {"text": made_up.NASTY}, "many": {"layers": 300}}.items():
        made_up.write(folder / name, **settings).close()  # type: ignore[arg-type]
        made[name] = write_page(Log.open(folder / name), folder / f"{name}.html")
    return made


@contextmanager
def opened(browser: Any, path: Path, **settings: Any) -> Iterator[Any]:
    """Open a page; afterwards nothing may have gone wrong in it, and nothing been asked for outside."""
    context = browser.new_context(**settings)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url.split("#")[0][:200]))
    page.goto(path.as_uri())
    yield page
    assert complaints == []
    assert set(requests) == {path.as_uri()}
    context.close()


def painted(page: Any, selector: str) -> int:
    """The number of pixels of a canvas that are not empty."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return int(
        page.locator(selector).first.evaluate(
            """(canvas) => {
              const copy = document.createElement("canvas");
              [copy.width, copy.height] = [canvas.width, canvas.height];
              const pen = copy.getContext("2d", { willReadFrequently: true });
              pen.drawImage(canvas, 0, 0);
              const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
              let count = 0;
              for (let i = 3; i < data.length; i += 4) count += data[i] > 0;
              return count;
            }"""
        )
    )


def test_the_page_is_well_formed_and_names_nothing_outside(pages: dict[str, Path]) -> None:
    for path in pages.values():
        page = Page(path.read_text(encoding="utf-8"))
        assert all(target.startswith(("#", "data:")) for target in page.targets())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.one_in(2)
def test_the_map_and_the_loss_are_drawn(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    with opened(browser, pages["plain"], color_scheme=scheme) as page:
        assert painted(page, "#heat") > 10_000
        assert painted(page, "#loss-plot canvas") > 500


def test_a_finding_leads_to_its_layer(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["many"]) as page:
        layer = page.locator("#layer-0")
        assert layer.get_attribute("open") is None
        page.locator(".findings .where a").first.click()
        page.wait_for_selector("#layer-0[open] canvas")
        assert layer.locator("canvas").count() == 3
        assert layer.is_visible()
        assert "effective rate vanished" in layer.inner_text()


def test_the_map_is_read_with_keys_and_opens_a_layer(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["plain"]) as page:
        page.locator("#heat").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        assert (
            page.locator("#heat-at").inner_text().startswith("blocks.0.attn.key, step 390: turn per step 0.0")
        )
        page.keyboard.press("Enter")
        page.wait_for_selector("#layer-1[open] canvas")
        page.locator("[data-quantity=norm]").click()
        assert page.locator("#heat-high").inner_text().endswith("norm")
        assert "2" in page.locator("#heat-high").inner_text()


def test_the_filter(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["many"]) as page:
        page.locator("#filter").fill("17.mlp")
        assert page.locator("#shown").inner_text() == "2 of 300 layers"
        assert page.locator("details.layer:visible").count() == 2
        page.locator("#filter").fill("")
        assert page.locator("#shown").inner_text() == "300 layers"


@pytest.mark.parametrize("width", [320, 380, 1200])
@pytest.mark.parametrize("name", ["plain", "many", "nasty"])
@pytest.mark.one_in(3)
def test_nothing_scrolls_sideways(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    with opened(browser, pages[name], viewport={"width": width, "height": 800}) as page:
        page.locator(".findings .where a").first.click()
        page.wait_for_selector("#layer-0[open] canvas")
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1]


def test_attacks_in_names_are_text(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["nasty"]) as page:
        page.locator("#heat").hover()
        assert made_up.NASTY in page.locator(".findings .where").first.inner_text()
        assert page.locator("img").count() == 0


def test_without_a_script_the_numbers_are_there(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["plain"], java_script_enabled=False) as page:
        assert page.locator("#heat").is_hidden()
        assert "turn 0.0" in page.locator("#layer-1 summary").inner_text()
        assert "need JavaScript" in page.inner_text("main")


def test_paper_is_white_in_dark_mode_too(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["plain"], color_scheme="dark") as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert (
            page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')").strip()
            == "#fff"
        )
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.pdf()[:4] == b"%PDF"


def test_a_log_without_rows_has_a_page(browser: Any, tmp_path: Path) -> None:
    made_up.write(tmp_path / "empty", rows=0).close()
    path = write_page(Log.open(tmp_path / "empty"), tmp_path / "empty.html")
    with opened(browser, path) as page:
        assert "0 rows" in page.inner_text("header")


def test_ten_thousand_observations_of_a_hundred_layers_are_below_a_megabyte(tmp_path: Path) -> None:
    log = Log.open(made_up.write(tmp_path / "a", layers=100, rows=300).folder)
    log.rows = [log.rows[k % 300] for k in range(10_000)]
    log.steps = [50 * (k + 1) for k in range(10_000)]
    path = write_page(log, tmp_path / "big.html")
    assert path.stat().st_size < 1_000_000


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    log = Log.open(made_up.write(tmp_path / "a").folder)
    with pytest.raises(ValueError, match=r"--html .* cannot be written .*: give another file"):
        write_page(log, tmp_path)
