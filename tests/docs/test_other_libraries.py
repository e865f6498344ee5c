"""The table of docs/other-libraries.md is what its command prints."""

from __future__ import annotations

import pytest
from benchmarks.other_libraries import rows, table
from tests.docs.pages import ROOT


def test_the_table_is_what_the_command_prints() -> None:
    pytest.importorskip("transformers")
    assert table(rows()) in (ROOT / "docs/other-libraries.md").read_text("utf-8")
