"""The code on every page of the documentation works as it stands there.

The Python blocks of a page run one after the other, in one namespace. What a reader has and a page does not
show (a model, a loader), and what must come out, stands between them in comments that are no part of the
rendered page: ``<!-- invisible-code-block: python ... -->``. A block of the language "text" is what the page
prints.
"""

from __future__ import annotations

import importlib
import logging
import re
import shlex
import warnings
from pathlib import Path

import click
import pytest
import typer
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from tests.docs.pages import FENCE, PAGES, ROOT, blocks, name

from normwise.cli import app

# Without one of these a block is left out; all are in the extra "dev".
OPTIONAL = {"accelerate", "lightning", "transformers"}
SHOWN = {
    "python",  # runs
    "text",  # is printed by the Python blocks before it
    "console",  # commands
    "",  # tables of the terminal
    "{toctree}",
    "{eval-rst}",
}
SYBIL = Sybil(parsers=[PythonCodeBlockParser()], encoding="utf-8")
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text("utf-8")]
COMMAND = re.compile(r"^(?:\$ )?(normwise|python -m|make) (.*)$", re.MULTILINE)
INLINE = re.compile(r"`((?:normwise|python -m|make) [^`\n]+)`")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    left_out = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|transformers|accelerate|torch")
        for example in SYBIL.parse(page).examples():
            try:
                example.evaluate()
            except ImportError as error:
                cause = error.name or getattr(error.__cause__, "name", None) or ""
                if cause.split(".")[0] not in OPTIONAL:
                    raise
                left_out.add(cause)
    printed = _lines(capsys.readouterr().out)
    for block in blocks(page.read_text("utf-8"), "text"):
        assert _lines(block) in printed
    if left_out:
        pytest.skip(f"blocks without {', '.join(sorted(left_out))} ran")


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
