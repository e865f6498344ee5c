"""The tables of docs/monitor.md are those of the code."""

from __future__ import annotations

from pathlib import Path

from normwise.monitor.finding import KINDS
from normwise.monitor.findings import THRESHOLDS
from normwise.monitor.observation import QUANTITIES

PAGE = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text("utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("| ")]
    for name, meaning in QUANTITIES.items():
        assert f"| `{name}` | {meaning} |" in rows
    for name, (value, reason) in THRESHOLDS.items():
        assert f"| {name} | {value:g} | {reason} |" in rows
    assert [row.split(" | ")[0][2:] for row in rows if row.split(" | ")[0][2:] in KINDS] == list(KINDS)
