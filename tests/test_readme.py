"""What the README and the reference results tell is what came out (tests/docs/ has code and links)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from normwise.lab.claims.conditions import SIGNS

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "docs" / "results"


def claims(budget: str) -> dict[str, Any]:
    found = json.loads((RESULTS / budget / "results.json").read_text(encoding="utf-8"))["claims"]
    return dict(sorted(found.items(), key=lambda item: item[1]["order"]))


def test_there_are_exactly_two_commands() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make reproduce", "make test"]


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_the_reference_results_are_told_as_they_came_out(budget: str) -> None:
    told = (RESULTS / "README.md").read_text(encoding="utf-8")
    for name, claim in claims(budget).items():
        assert f"| `{name}` | {claim['verdict']} | {claim['answer']} |" in told


def test_the_table_of_claims_has_the_verdicts_of_the_reference_results() -> None:
    rows = re.findall(r"^\|[^|]+\| (.) \| (.) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [
        [SIGNS[claim["verdict"]] for claim in claims(budget).values()] for budget in ("quick", "full")
    ]
    assert rows == list(zip(*expected, strict=True))
