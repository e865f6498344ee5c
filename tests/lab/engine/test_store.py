from __future__ import annotations

import os
from pathlib import Path

import pytest

from normwise.lab.engine.store import Store, write_atomically


def test_a_new_an_empty_and_an_own_folder_are_taken(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "new")
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "empty")
    Store(tmp_path / "empty")
    assert Store.existing(tmp_path / "empty").folder == tmp_path / "empty"


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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"cannot be written to .*: give another folder"):
        Store(tmp_path / "out")


def test_a_folder_without_runs_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is not a folder of results: give the --out of a normwise reproduce"
    ):
        Store.existing(tmp_path)


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
