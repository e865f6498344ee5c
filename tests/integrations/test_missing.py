"""A library that is not installed is an error that says how to get it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import normwise as nw

PARTS = {"lightning": "lightning", "transformers": "hf", "accelerate": "hf"}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"normwise.integrations.{name}", raising=False)
    with pytest.raises(
        ImportError, match=rf"normwise\.{name} needs .*pip install 'normwise\[{PARTS[name]}\]'"
    ):
        getattr(nw, name)
    monkeypatch.undo()


def test_names_are_there_and_import_nothing() -> None:
    assert set(PARTS) <= set(dir(nw))
    code = "import normwise, sys; dir(normwise); normwise.Decay\n"
    code += "print([name for name in {names!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code.format(names=list(PARTS))], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_modules_are_those_of_the_package() -> None:
    pytest.importorskip("lightning")
    assert nw.lightning is importlib.import_module("normwise.integrations.lightning")
