"""A Chromium, where one is installed, and a report to look at with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.pages import made_up_results

from normwise.lab.report.html_report import write_report

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    path = next((one for one in found if one), None)
    if path is None:
        pytest.skip("no Chromium is installed (looked for chromium, chromium-browser, google-chrome)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two claims: one in plain words with everything in it, one whose every text is an attack."""
    claims = {
        "plain": made_up_results.claim(Random(0), 2, plots=2, maps=1, traces=3),
        "nasty": made_up_results.claim(Random(1), 3, text=made_up_results.NASTY),
    }
    folder = tmp_path_factory.mktemp("report")
    with made_up_results.without_figures():
        return write_report(made_up_results.results(claims), folder / "report.html")
