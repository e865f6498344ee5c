"""What docs/planning.md shows works as it stands there."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import normwise as nw

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_runs(caplog: pytest.LogCaptureFixture) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "planning.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    with caplog.at_level(logging.INFO, "normwise"):
        exec(compile(block, "planning.md", "exec"), names)
    assert isinstance(names["plan"], nw.Plan)
    assert "learning rate of 1 scale-invariant parameter" in caplog.text


@pytest.mark.parametrize("page", ["planning.md", "architectures.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text("utf-8")):
        assert (DOCS / target).exists(), target
