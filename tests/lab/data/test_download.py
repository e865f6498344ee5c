"""Files from a data set's own site: a local web server that misbehaves on demand."""

from __future__ import annotations

import concurrent.futures
import gzip
import io
import itertools
import multiprocessing
import queue
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.made_up import CONTENTS, PACKED, Site, ignore, never, put_cache

from normwise.lab.data import download
from normwise.lab.data.fetch import obtain
from normwise.lab.data.source import DataError, Source, SourceFile


def test_fresh_fetch_from_the_site_says_what_from_where_to_where(
    tmp_path: Path, source: Source, site: Site
) -> None:
    cache, said = tmp_path / "a" / "cache", list[str]()
    assert obtain(source, cache, offline=False, announce=said.append) == CONTENTS
    assert {path.name for path in cache.iterdir()} == {*PACKED, ".lock"}
    assert {name: (cache / name).read_bytes() for name in PACKED} == PACKED
    assert site.requests == [("images.gz", None), ("labels.gz", None)]
    told = "\n".join(said)
    assert "not from Debian (there is no apt-get here)" in told
    assert f"MB from {site.url} to {cache}" in told
    assert obtain(source, cache, offline=True, announce=never) == CONTENTS


def test_only_what_is_missing_is_fetched(tmp_path: Path, source: Source, site: Site) -> None:
    put_cache(tmp_path, {"images.gz": PACKED["images.gz"]})
    obtain(source, tmp_path, offline=False, announce=ignore)
    assert site.requests == [("labels.gz", None)]


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, source: Source, site: Site) -> None:
    put_cache(tmp_path, {"images.gz.part": PACKED["images.gz"][:7000]})
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert site.requests[0] == ("images.gz", "bytes=7000-")
    assert not list(tmp_path.glob("*.part"))


def test_a_broken_connection_is_tried_again(tmp_path: Path, source: Source, site: Site) -> None:
    site.break_off = [5000, 3000]
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    asked = [wanted for name, wanted in site.requests if name == "images.gz"]
    assert asked == [None, "bytes=5000-", "bytes=8000-"]


def test_three_broken_connections_are_an_error_and_leave_the_part(
    tmp_path: Path, source: Source, site: Site
) -> None:
    site.break_off = [5000, 3000, 1000]
    with pytest.raises(DataError, match=r"the connection broke off after 9,000 of 20,\d+ bytes"):
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert not (tmp_path / "images.gz").exists()
    assert (tmp_path / "images.gz.part").read_bytes() == PACKED["images.gz"][:9000]
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert site.requests[3] == ("images.gz", "bytes=9000-")


@pytest.mark.parametrize("trouble", ["no ranges", "wrong range", "foreign part", "part too long"])
def test_a_part_that_cannot_be_resumed_starts_again(
    tmp_path: Path, source: Source, site: Site, trouble: str
) -> None:
    site.ranges, site.wrong_range = trouble != "no ranges", trouble == "wrong range"
    part = {"foreign part": bytes(7000), "part too long": PACKED["images.gz"] + bytes(10)}
    put_cache(tmp_path, {"images.gz.part": part.get(trouble, PACKED["images.gz"][:7000])})
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert not list(tmp_path.glob("*.part"))
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
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "bin"}
    assert len(site.requests) == 1


def test_a_site_without_the_file_or_without_anyone(tmp_path: Path, source: Source, site: Site) -> None:
    del site.files["labels.gz"]
    with pytest.raises(DataError, match=r"labels.gz: HTTP Error 404"):
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert (tmp_path / "images.gz").exists()
    with pytest.raises(DataError, match=r"neither as Debian's package .* nor from its site .*refused"):
        obtain(replace(source, url="http://127.0.0.1:9/"), tmp_path, offline=False, announce=ignore)


def test_a_crash_in_the_middle_leaves_no_final_file(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, file: SourceFile) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "read_content", crash)
        with pytest.raises(KeyboardInterrupt):
            obtain(source, tmp_path, offline=False, announce=ignore)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "bin", "images.gz.part"}
    assert obtain(source, tmp_path, offline=False, announce=ignore) == CONTENTS
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "bin", *PACKED}


def _obtain_in_a_process(source: Source, directory: Path) -> dict[str, bytes]:
    return obtain(source, directory, offline=False, announce=ignore)


def test_three_processes_fetch_once_and_all_get_it(tmp_path: Path, source: Source, site: Site) -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        futures = [pool.submit(_obtain_in_a_process, source, tmp_path / "cache") for _ in range(3)]
        assert [future.result() for future in futures] == [CONTENTS] * 3
    assert sorted(site.requests) == [("images.gz", None), ("labels.gz", None)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_who_comes_second_waits_aloud_and_fetches_nothing(tmp_path: Path, source: Source, site: Site) -> None:
    import fcntl

    said: queue.Queue[str] = queue.Queue()
    with (tmp_path / ".lock").open("w") as stream, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fcntl.flock(stream, fcntl.LOCK_EX)
        second = pool.submit(obtain, source, tmp_path, offline=False, announce=said.put)
        assert "waiting for another process that is fetching it" in said.get(timeout=30)
        put_cache(tmp_path, PACKED)
        stream.close()
        assert second.result(timeout=30) == CONTENTS
    assert said.empty()
    assert site.requests == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("tick", "shown"), [(3.0, True), (0.0, False)])
def test_a_download_of_more_than_two_seconds_shows_a_bar(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch, tick: float, shown: bool
) -> None:
    clock = itertools.count(0.0, tick)
    monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    obtain(source, tmp_path, offline=False, announce=ignore)
    assert ("images.gz" in terminal.getvalue()) is shown
