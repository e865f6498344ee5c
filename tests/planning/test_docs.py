"""What docs/planning.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import normwise as nw

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "planning.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "planning.md", "exec"), names)
    assert isinstance(names["plan"], nw.Plan)
    assert "Adaptive Weight Shrink on 1 of 6 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["planning.md", "architectures.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text("utf-8")):
        assert (DOCS / target).exists(), target
