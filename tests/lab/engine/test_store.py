from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.engine.odd_runs import OddRun

from normwise.lab.engine.execution import execute
from normwise.lab.engine.store import MisfitError, Store, write_atomically


def test_a_new_an_empty_and_an_own_folder_are_taken(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "new")
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "empty")
    Store(tmp_path / "empty")


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something that normwise did not write: give a new or empty"):
        Store(tmp_path)
    (tmp_path / "normwise.json").write_text('{"what": "something else"}')
    with pytest.raises(ValueError, match="holds something"):
        Store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["normwise.json", "thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written to"):
        Store(tmp_path / "file" / "below")


@pytest.mark.parametrize("out", ["n" * 300, "a/" * 3000 + "b"], ids=["name", "path"])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(
        ValueError, match=r"--out .* cannot be written to \(File name too long\): give another"
    ):
        Store(tmp_path / out)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    store, run = Store(tmp_path), OddRun(way="well")
    store.run_folder(run).touch()
    with pytest.raises(ValueError, match=rf"{run.identity} cannot be written \(File exists\): give the same"):
        store.write_run(run, [], {"status": "finished"})
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").touch()
    with pytest.raises(ValueError, match=r"--out .* cannot be written to \(File exists\)"):
        Store(tmp_path)


# a new folder, at any moment of its making

_OPENED = """
import os, sys
from pathlib import Path
from normwise.lab.engine import store

def stop_at(number, calls=[]):
    real = os.fsync, Path.replace, Path.mkdir, Path.open

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                os._exit(9)  # as kill -9 does: no finally is executed
            return function(*args, **kwargs)
        return call

    os.fsync, Path.replace, Path.mkdir, Path.open = map(counted, real)

for number in range(1, 8):
    if os.fork() == 0:
        stop_at(number)
        store.Store(Path(sys.argv[1]) / str(number))
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.thorough
def test_a_new_folder_is_taken_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _OPENED, str(tmp_path)], check=True)
    left = [sorted(path.name[:14] for path in folder.iterdir()) for folder in sorted(tmp_path.iterdir())]
    assert [".normwise.json"] in left  # a kill while the mark was written
    for folder in tmp_path.iterdir():
        Store(folder)
        assert json.loads((folder / "normwise.json").read_text())["format"] == 1


def test_a_new_folder_is_taken_while_another_process_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = os.fsync, list[Store]()

    def meanwhile(file: int) -> None:
        real(file)
        if not opened:
            opened.append(None)  # type: ignore[arg-type]  # not again
            opened.append(Store(tmp_path / "new"))

    monkeypatch.setattr(os, "fsync", meanwhile)
    Store(tmp_path / "new")
    assert len(opened) == 2


def test_a_hidden_file_of_someone_else_is_respected(tmp_path: Path) -> None:
    (tmp_path / ".normwise.json.mine").touch()
    with pytest.raises(ValueError, match="holds something"):
        Store(tmp_path)


# stored runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two runs with different metrics and summaries."""
    store = Store(tmp_path_factory.mktemp("finished"))
    for seed in (0, 1):
        metrics = [{"step": step, "loss": 1 / (step + seed + 1)} for step in range(3)]
        store.write_run(
            OddRun(way="well", seed=seed), metrics, {"status": "finished", "test_accuracy": 0.5 + seed / 8}
        )
    return store


def _rewritten(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        change(summary)
        (folder / "summary.json").write_text(json.dumps(summary))

    return changed


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_rewritten(lambda s: s.update(test_accuracy=7.0)), "files that were changed"),
        (_rewritten(lambda s: s.update(test_accuracy=float("nan"))), "files that were changed"),
        (_rewritten(lambda s: s.pop("test_accuracy")), "files that were changed"),
        (_rewritten(lambda s: s.pop("digest")), "files that were changed"),
        (_rewritten(lambda s: s.pop("identity")), "files of another run"),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n'), "files that were changed"),
        (lambda f: (f / "metrics.jsonl").unlink(), "cannot be read (No such file or directory)"),
        (lambda f: (f / "config.json").unlink(), "cannot be read (No such file or directory)"),
        (lambda f: (f / "summary.json").write_text("[" * 100_000), "holds a damaged file"),
        (lambda f: (f / "summary.json").write_text("[]"), "holds a damaged file"),
        (lambda f: (f / "summary.json").write_bytes(b"\xff{}"), "holds a damaged file"),
    ],
)
def test_a_stored_run_that_does_not_fit_is_executed_again_and_said(
    tmp_path: Path, finished: Store, damage: Callable[[Path], object], said: str
) -> None:
    shutil.copytree(finished.folder, tmp_path / "copy")
    store, runs, lines = (
        Store(tmp_path / "copy"),
        [OddRun(way="well", seed=seed) for seed in (0, 1)],
        list[str](),
    )
    damage(store.run_folder(runs[0]))
    summaries = execute(runs, store, announce=lines.append)
    (line,) = lines
    assert line.startswith("1 stored runs are executed again, as they cannot be trusted: ")
    assert said in line
    assert "test_accuracy" not in summaries[runs[0].identity]  # what the run itself returns
    assert summaries[runs[1].identity]["test_accuracy"] == 0.625
    execute(runs, store, announce=lines.append)
    assert len(lines) == 1


def test_summaries_that_are_exchanged_are_noticed(tmp_path: Path, finished: Store) -> None:
    shutil.copytree(finished.folder, tmp_path / "copy")
    store, runs = Store(tmp_path / "copy"), [OddRun(way="well", seed=seed) for seed in (0, 1)]
    texts = [(store.run_folder(run) / "summary.json").read_text() for run in runs]
    for run, text in zip(runs, reversed(texts), strict=True):
        (store.run_folder(run) / "summary.json").write_text(text)
        with pytest.raises(MisfitError, match="holds files of another run"):
            store.summary(run)


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files_are_a_misfit_or_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, finished: Store, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished.folder, folder)
    store, run = Store(folder), OddRun(way="well")
    whole = store.summary(run), store.metrics(run)
    path = store.run_folder(run) / data.draw(
        st.sampled_from(["config.json", "metrics.jsonl", "summary.json"])
    )
    content = path.read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[end:])
    try:
        found = store.summary(run), store.metrics(run)
    except MisfitError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found == whole


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"cannot be written to .*: give another folder"):
        Store(tmp_path / "out")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def broken(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert path.read_text() == "old"
