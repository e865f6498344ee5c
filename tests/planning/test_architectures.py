"""The command behind docs/architectures.md, on one small architecture."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest


def test_a_row_of_the_table_and_the_page_are_those_of_the_command() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        from benchmarks.architectures import ARCHITECTURES, PAGE, RECIPES, examine, percent, table

        result = examine(ARCHITECTURES["qwen3"])
    # two layers: q and k alone; the embedding and two writers of each layer jointly
    assert (result.alone, result.jointly) == (4, 5)
    assert sum(result.decayed.values()) == pytest.approx(1)
    assert result.decayed["none"] == 0  # two dimensions or more: no gain among them
    (row,) = table([result]).splitlines()[2:]
    assert percent(result.decayed["shrink"]) in row
    assert row in Path(PAGE).read_text(encoding="utf-8")
    assert all(a.recipe in RECIPES for a in ARCHITECTURES.values())
