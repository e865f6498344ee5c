"""The hash of the sources that a run executes, on a small package of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from normwise.lab.engine.sources import source_hash
from normwise.lab.runs.dead_units import DeadUnitsRun
from normwise.lab.runs.replay import ReplayRun

FILES = {
    "_public.py": "from small.api import double\n",
    "runs.py": '''
"""A run."""
import small as s
from small.tools.norms import norm
__all__ = ["R"]
class R:
    """What it is."""
    def run(self): return norm(s.double(2))  # a comment
''',
    "api.py": "def double(x): return 2 * x\n",
    "tools/__init__.py": "",
    "tools/norms.py": "import math\ndef norm(x): return math.sqrt(x)\n",
    "elsewhere.py": "def other(): return 1\n",
}
_names = count()


@pytest.fixture
def hash_of(tmp_path: Path) -> Callable[[dict[str, str]], str]:
    """Return the hash of the class R in a package of these files, in a folder of its own."""

    def make(files: dict[str, str]) -> str:
        number = next(_names)
        root = tmp_path / str(number) / "small"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        (file,) = [root / name for name, content in files.items() if "class R" in content]
        spec = importlib.util.spec_from_loader(f"_small_{number}", loader=None, origin=str(file))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(file)
        sys.modules[spec.name] = module
        try:
            return source_hash(type("R", (), {"__module__": spec.name}), root)
        finally:
            del sys.modules[spec.name]

    return make


def _changed(name: str, old: str, new: str) -> dict[str, str]:
    assert old in FILES[name]
    return FILES | {name: FILES[name].replace(old, new)}


def _moved() -> dict[str, str]:
    files = _changed("runs.py", "small.tools.norms", "small.norms")
    files["norms.py"] = files.pop("tools/norms.py")
    files["deeper/runs.py"] = files.pop("runs.py")
    return files


@pytest.mark.parametrize(
    "files",
    [
        FILES,
        _changed("runs.py", "What it is.", "Something else."),
        _changed("runs.py", "a comment", "another comment"),
        _changed("tools/norms.py", "(x): return", "( x ) :\n    return"),
        _changed("tools/norms.py", "def norm(x): return", 'def norm(x):\n    "Documented."\n    return'),
        _changed("elsewhere.py", "1", "2"),
        _moved(),
    ],
    ids=["the same", "docstring", "comment", "formatting", "new docstring", "not imported", "moved files"],
)
def test_what_does_not_change_the_numbers_keeps_the_hash(
    hash_of: Callable[[dict[str, str]], str], files: dict[str, str]
) -> None:
    assert hash_of(files) == hash_of(FILES)


@pytest.mark.parametrize(
    "files",
    [
        _changed("runs.py", "norm(s.double(2))", "norm(s.double(3))"),
        _changed("tools/norms.py", "sqrt", "cbrt"),
        _changed("api.py", "2 * x", "3 * x"),
    ],
    ids=["the run", "an imported module", "a public name"],
)
def test_code_that_the_run_executes_changes_the_hash(
    hash_of: Callable[[dict[str, str]], str], files: dict[str, str]
) -> None:
    assert hash_of(files) != hash_of(FILES)


def test_runs_that_execute_different_code_have_different_hashes() -> None:
    assert source_hash(DeadUnitsRun) != source_hash(ReplayRun)


def test_another_process_computes_the_same_hash() -> None:
    code = (
        "from normwise.lab.engine.sources import source_hash\n"
        "from normwise.lab.runs.dead_units import DeadUnitsRun\n"
        "print(source_hash(DeadUnitsRun))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == source_hash(DeadUnitsRun)


def test_a_class_without_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_interactive", types.ModuleType("_interactive"))
    with pytest.raises(
        ValueError, match="R was defined interactively: define the class of a run in a module"
    ):
        source_hash(type("R", (), {"__module__": "_interactive"}))
