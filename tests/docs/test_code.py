"""The code on every page of the documentation works as it stands there.

The Python blocks of a page run one after the other, in one namespace. What a reader has and a page does not
show (a model, a loader), and what must come out, stands between them in comments that are no part of the
rendered page: ``<!-- invisible-code-block: python ... -->``. A block of the language "text" is what the
Python blocks print. Commands are not run: their options must exist, and the files that they name.
"""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from tests.docs.pages import FENCE, PAGES, ROOT, blocks, name

from normwise.cli import app

LANGUAGES = {"python", "text", "console", "", "{toctree}", "{eval-rst}"}
# Without one of these a block is left out; the extra "dev" has them all.
OPTIONAL = {"accelerate", "lightning", "transformers"}
SYBIL = Sybil(parsers=[PythonCodeBlockParser()], encoding="utf-8")
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text("utf-8")]
COMMANDS = sorted(
    {
        (name(page), command)
        for page in PAGES
        for pattern in (r"^((?:normwise|python -m|make) .*)", r"`((?:normwise|python -m|make) [^`\n]+)`")
        for command in re.findall(pattern, page.read_text("utf-8"), re.MULTILINE)
        if page.name != "CHANGELOG.md"
    }
)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|transformers|accelerate|torch")
        for block in SYBIL.parse(page).examples():
            try:
                block.evaluate()
            except ImportError as error:
                cause = error.name or getattr(error.__cause__, "name", None) or ""
                if cause.split(".")[0] not in OPTIONAL:
                    raise
                missing.add(cause)
    printed = _lines(capsys.readouterr().out)
    for shown in blocks(page.read_text("utf-8"), "text"):
        assert missing or _lines(shown) in printed
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}; all other blocks ran")


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_is_marked_as_what_it_is(page: Path) -> None:
    text = page.read_text("utf-8")
    assert {language for _, language, _ in FENCE.findall(text)} <= LANGUAGES  # "py" would not run
    for unmarked in [*blocks(text, "", "console"), *re.findall(r"\n\n((?:    .*\n)+)", FENCE.sub("", text))]:
        assert not re.search(r"^\s*(?:import |from .* import |\w+ = nw\.|nw\.)", unmarked, re.MULTILINE)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: str(text)[:60])
def test_commands_exist_with_their_options(page: str, command: str) -> None:
    program, *arguments = shlex.split(re.split(r" {2,}|…| > ", command)[0], comments=True)
    if program == "normwise":
        called, *rest = arguments
        subcommands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if rest:  # a command without its arguments is a mere mention
            subcommands[called].make_context(called, rest).close()
        assert called in subcommands
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    elif arguments[1] == "pytest":
        path, pattern = arguments[2], arguments[-1]
        assert re.search(rf"def test_\w*{pattern}", (ROOT / path).read_text("utf-8"))
    elif (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").exists():
        source = (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").read_text("utf-8")
        for option in (a for a in arguments[2:] if a.startswith("--")):
            assert f'"{option}"' in source
    else:
        raise AssertionError(f"{page}: there is no {command}")
