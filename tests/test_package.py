"""What an installation consists of: files, metadata, and what importing it imports."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import normwise as nw

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"


def build(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build by hatchling as `make dist` does, without a new environment."""
    pytest.importorskip("hatchling")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    builder: Any = {"wheel": WheelBuilder, "sdist": SdistBuilder}[kind](str(ROOT))
    (made,) = builder.build(directory=str(folder), versions=["standard"])
    return Path(made)


def test_the_wheel_holds_the_package_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path, monkeypatch)) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(f"normwise-{nw.__version__}.dist-info/METADATA"))
    here = {
        path.relative_to(SOURCES).as_posix()
        for path in (SOURCES / "normwise").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == here
    assert "normwise/py.typed" in here
    assert not [name for name in here if "test" in Path(name).name]
    assert {name.split("vendor/")[1].split("/")[0] for name in here if "vendor/" in name} == {"uplot"}
    licenses = [name.split("licenses/")[1] for name in names if "licenses/" in name]
    assert [name for name in licenses if "uplot" in name] == ["src/normwise/pages/vendor/uplot/LICENSE"]
    needed = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert [re.split(r"[<>=]", one)[0] for one in sorted(needed)] == ["numpy", "torch"]


def test_the_sdist_holds_sources_tests_and_what_tests_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(build("sdist", tmp_path, monkeypatch)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tops = {name.split("/")[0] for name in names}
    pages = {"README.md", "DESCRIPTION.md", "CHANGELOG.md"}
    assert tops == pages | {
        "src",
        "tests",
        "LICENSE",
        "CITATION.cff",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".whl"))]


def test_the_description_stands_alone_on_an_index_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no link to a file, and begins as the README does."""
    with zipfile.ZipFile(build("wheel", tmp_path, monkeypatch)) as wheel:
        metadata = wheel.read(f"normwise-{nw.__version__}.dist-info/METADATA").decode()
    fields, description = metadata.split("\n\n", 1)
    assert "Description-Content-Type: text/markdown" in fields
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", description)
    assert targets
    assert all(target.startswith("https://") for pair in targets for target in pair if target)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert description.split("\n\n")[:2] == readme.split("\n\n")[:2]
    codes = [re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0] for text in (description, readme)]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_second_build_gives_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (build(kind, tmp_path / name, monkeypatch).read_bytes() for name in ("one", "two"))
    assert first == second


def test_the_version_is_said_alike_everywhere() -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.*)"', metadata, re.MULTILINE) == [nw.__version__]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)", citation, re.MULTILINE) == [nw.__version__]


def outcome(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_an_import_imports_nothing_and_the_library_torch_and_numpy_alone() -> None:
    code = """
import sys
import normwise
print("torch" in sys.modules, "numpy" in sys.modules)
import torch, numpy
before = set(sys.modules)
for name in normwise.__all__:
    getattr(normwise, name)
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - set(sys.stdlib_module_names) - {"normwise", "numpy", "torch"}))
print("torch._dynamo" in sys.modules, "torch.distributed.tensor" in sys.modules)
"""
    found = outcome(code)
    assert found.stdout.splitlines() == ["False False", "[]", "False False"], found.stderr


def test_the_command_without_its_extra_says_how_to_get_it() -> None:
    found = outcome("import sys; sys.modules['typer'] = None; from normwise.cli import main; main()")
    assert found.returncode == 2
    assert not found.stdout
    assert found.stderr == "normwise: the command line needs the extra 'lab': pip install normwise[lab]\n"


@pytest.mark.parametrize("name", ["tests", "publish"])
def test_workflows_call_targets_that_the_makefile_has(name: str) -> None:
    workflow = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    called = re.findall(r"run: make (\w+)", workflow)
    assert called
    assert set(called) <= set(targets)
