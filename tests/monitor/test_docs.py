"""What docs/monitor.md shows works as it stands there, and its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import normwise as nw
from normwise.monitor.finding import KINDS
from normwise.monitor.findings import THRESHOLDS
from normwise.monitor.observation import QUANTITIES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "monitor.md").read_text("utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "monitor.md", "exec"), names)
    monitor = names["monitor"]
    assert isinstance(monitor, nw.Monitor)
    assert monitor.steps == 100
    assert (Path(str(names["folder"])) / "monitor.jsonl").exists()


def test_the_tables_are_those_of_the_code() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("| ")]
    for name, meaning in QUANTITIES.items():
        assert f"| `{name}` | {meaning} |" in rows
    for name, (value, reason) in THRESHOLDS.items():
        assert f"| {name} | {value:g} | {reason} |" in rows
    assert [row.split(" | ")[0][2:] for row in rows if row.split(" | ")[0][2:] in KINDS] == list(KINDS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (DOCS / target).exists(), target
