"""Downloads from a local web server that misbehaves on demand."""

from __future__ import annotations

import concurrent.futures
import gzip
import io
import itertools
import multiprocessing
import queue
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from tests.lab.made_up import CONTENTS, PACKED, Site, ignore, never, put_cache

from normwise.lab.data import fetch
from normwise.lab.data.fetch import obtain
from normwise.lab.data.source import DataError, Source, SourceFile


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "bin"}


def test_a_download_says_what_from_where_to_where(tmp_path: Path, source: Source, site: Site) -> None:
    cache, said = tmp_path / "a" / "cache", list[str]()
    assert obtain(source, cache, offline=False, announce=said.append) == CONTENTS
    assert {name: (cache / name).read_bytes() for name in _files(cache)} == PACKED
    assert site.requests == [("images.gz", None), ("labels.gz", None)]
    told = "\n".join(said)
    assert "not from Debian (there is no apt-get here)" in told
    assert f"MB from {site.url} to {cache}" in told
    assert obtain(source, cache, offline=True, announce=never) == CONTENTS


def test_only_what_is_missing_is_downloaded(tmp_path: Path, source: Source, site: Site) -> None:
    put_cache(tmp_path, {"images.gz": PACKED["images.gz"]})
    obtain(source, tmp_path, offline=False, announce=ignore)
    assert site.requests == [("labels.gz", None)]


def test_a_broken_connection_is_tried_again_from_where_it_broke(
    tmp_path: Path, source: Source, site: Site
) -> None:
    site.break_off = [5000, 3000]
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    asked = [wanted for name, wanted in site.requests if name == "images.gz"]
    assert asked == [None, "bytes=5000-", "bytes=8000-"]


def test_three_broken_connections_are_an_error_and_the_next_call_resumes(
    tmp_path: Path, source: Source, site: Site
) -> None:
    site.break_off = [5000, 3000, 1000]
    with pytest.raises(DataError, match=r"the connection broke off after 9,000 of 20,\d+ bytes"):
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert not (tmp_path / "images.gz").exists()
    assert (tmp_path / "images.gz.part").read_bytes() == PACKED["images.gz"][:9000]
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert site.requests[3] == ("images.gz", "bytes=9000-")
    assert _files(tmp_path) == set(PACKED)


@pytest.mark.parametrize("trouble", ["no ranges", "wrong range", "foreign part", "part too long"])
def test_a_part_that_cannot_be_resumed_starts_again(
    tmp_path: Path, source: Source, site: Site, trouble: str
) -> None:
    site.ranges, site.wrong_range = trouble != "no ranges", trouble == "wrong range"
    part = {"foreign part": bytes(7000), "part too long": PACKED["images.gz"] + bytes(10)}
    put_cache(tmp_path, {"images.gz.part": part.get(trouble, PACKED["images.gz"][:7000])})
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert _files(tmp_path) == set(PACKED)
    asked = [wanted for name, wanted in site.requests if name == "images.gz"]
    assert len(asked) == (1 if trouble == "no ranges" else 2)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (gzip.compress(CONTENTS["images.gz"][:-1] + b"?"), "found SHA-256 [0-9a-f]{12}…"),
        (gzip.compress(CONTENTS["images.gz"][:-1]), "found 20,015 bytes"),
        (gzip.compress(CONTENTS["images.gz"] + b"?"), "found more than 20,016 bytes"),
        (gzip.compress(bytes(10**7)), "found more than 20,016 bytes"),
        (b"<html>sign in to this network</html>", "Not a gzipped file"),
        (PACKED["images.gz"][:-100] + bytes(100), "is altered"),
        (bytes(10**6), "expected at most 21,240 bytes, found more"),
    ],
    ids=["altered", "short", "long", "bomb", "portal", "garbled", "endless"],
)
@pytest.mark.parametrize("lengths", [True, False])
def test_a_wrong_download_is_an_error_and_leaves_nothing(
    tmp_path: Path, source: Source, site: Site, body: bytes, found: str, lengths: bool
) -> None:
    site.files["images.gz"], site.lengths = body, lengths
    with pytest.raises(DataError, match=found) as caught:
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert "\n" not in str(caught.value)
    assert "apt-get install dataset-made-up" in str(caught.value)
    assert _files(tmp_path) == set()
    assert len(site.requests) == 1


def test_a_site_without_the_file_or_without_anyone(tmp_path: Path, source: Source, site: Site) -> None:
    del site.files["labels.gz"]
    with pytest.raises(DataError, match=r"labels.gz: HTTP Error 404"):
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert _files(tmp_path) == {"images.gz"}
    with pytest.raises(DataError, match=r"neither as Debian's package .* nor from its site .*refused"):
        obtain(replace(source, url="http://127.0.0.1:9/"), tmp_path, offline=False, announce=ignore)


def test_a_crash_in_the_middle_leaves_no_final_file(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, target: Path, file: SourceFile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_store", crash)
        with pytest.raises(KeyboardInterrupt):
            obtain(source, tmp_path, offline=False, announce=ignore)
    assert _files(tmp_path) == {"images.gz.part"}
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert _files(tmp_path) == set(PACKED)


def _obtain_in_a_process(source: Source, directory: Path) -> dict[str, bytes]:
    return obtain(source, directory, offline=False, announce=ignore)


def test_three_processes_download_once_and_all_get_it(tmp_path: Path, source: Source, site: Site) -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        futures = [pool.submit(_obtain_in_a_process, source, tmp_path / "cache") for _ in range(3)]
        assert [future.result() for future in futures] == [CONTENTS] * 3
    assert sorted(site.requests) == [("images.gz", None), ("labels.gz", None)]


def test_the_second_process_says_that_it_waits_and_downloads_nothing(
    tmp_path: Path, source: Source, site: Site
) -> None:
    said: queue.Queue[str] = queue.Queue()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".lock"):
            second = pool.submit(obtain, source, tmp_path, offline=False, announce=said.put)
            assert "waiting for another process that is fetching it" in said.get(timeout=30)
            put_cache(tmp_path, PACKED)
        assert second.result(timeout=30) == CONTENTS
    assert said.empty()
    assert site.requests == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "stream", "shown"), [(3.0, Terminal, True), (0.0, Terminal, False), (3.0, io.StringIO, False)]
)
def test_only_a_long_download_in_a_terminal_shows_a_bar(
    tmp_path: Path,
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    stream: type[io.StringIO],
    shown: bool,
) -> None:
    clock = itertools.count(time.time(), seconds)
    monkeypatch.setattr(sys, "stderr", captured := stream())
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    obtain(source, tmp_path, offline=False, announce=ignore)
    assert ("images.gz" in captured.getvalue()) is shown
