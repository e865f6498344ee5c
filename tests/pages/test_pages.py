from __future__ import annotations

import hashlib
import json
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
from tests.pages.made_up_results import NASTY

import normwise.pages
from normwise.pages import data_block, vendored


def test_vendored_files_are_what_their_author_released() -> None:
    folder = files("normwise.pages") / "vendor" / "uplot"
    told = dict(
        re.findall(r"\| `(.+)` \| `([0-9a-f]{64})` \|", (folder / "README.md").read_text(encoding="utf-8"))
    )
    assert set(told) == {"LICENSE", "uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in told.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_data_survive_and_cannot_leave_their_element() -> None:
    text = data_block({NASTY: [NASTY, 1.5, 3, None, True, 1e-300]})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {NASTY: [NASTY, 1.5, 3, None, True, 1e-300]}


@pytest.mark.parametrize(
    ("value", "written"),
    [(math.nan, "null"), (math.inf, "null"), (1 / 3, "0.3333333"), (5e6, "5000000"), (1e30, "1e+30")],
)
def test_numbers_are_json_in_seven_digits(value: float, written: str) -> None:
    assert data_block(value) == written


def test_a_vendored_file_that_could_end_its_element_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "bad.js").write_text("x = '</script>'", encoding="utf-8")
    monkeypatch.setattr(normwise.pages, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="escape it"):
        vendored("bad.js")
