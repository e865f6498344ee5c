"""The cache and Debian's package as ways to a data set's files."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.lab.made_up import CONTENTS, PACKED, Site, ignore, never, put_cache, put_command, put_debian

from normwise.lab.data.fetch import obtain
from normwise.lab.data.source import DataError, Source, read_content


def test_a_cached_set_needs_and_says_nothing(tmp_path: Path, source: Source, site: Site) -> None:
    put_cache(tmp_path / "cache", PACKED)
    for offline in (True, False):
        assert obtain(source, tmp_path / "cache", offline=offline, announce=never) == CONTENTS
    assert site.requests == []


def test_content_counts_and_not_its_compression(tmp_path: Path, source: Source) -> None:
    stored = {name: gzip.compress(content, 0, mtime=5) for name, content in CONTENTS.items()}
    put_cache(tmp_path / "cache", stored)
    assert obtain(source, tmp_path / "cache", offline=True, announce=never) == CONTENTS


# damaged and missing files


def test_missing_and_offline(tmp_path: Path, source: Source, site: Site) -> None:
    with pytest.raises(DataError) as caught:
        obtain(source, tmp_path / "cache", offline=True, announce=never)
    assert str(caught.value) == (
        f"{tmp_path}/cache/images.gz is missing: expected 20,016 bytes with SHA-256 "
        f"{source.files[0].sha256[:12]}… after decompression, found no file; run again without --offline, "
        f"or `apt-get install dataset-made-up`, or put the 2 .gz files of {site.url} into "
        f"{tmp_path}/cache by hand"
    )
    assert site.requests == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        pytest.param("truncated", PACKED["labels.gz"][:-20], id="truncated"),
        pytest.param("truncated", PACKED["labels.gz"][:-4], id="truncated after the content"),
        pytest.param("altered", b"", id="empty"),
        pytest.param("altered", gzip.compress(CONTENTS["labels.gz"][:-1] + b"?"), id="altered"),
        pytest.param("altered", PACKED["labels.gz"][:10] + bytes([255] * 50), id="garbled"),
        pytest.param("altered", PACKED["images.gz"], id="another file"),
        pytest.param("altered", CONTENTS["labels.gz"], id="unpacked"),
    ],
)
def test_a_damaged_file_is_an_error_offline_and_else_replaced_aloud(
    tmp_path: Path, source: Source, site: Site, kind: str, damaged: bytes
) -> None:
    put_cache(tmp_path, {**PACKED, "labels.gz": damaged})
    with pytest.raises(DataError, match=rf"{tmp_path}/labels\.gz is {kind}: expected 58 bytes"):
        obtain(source, tmp_path, offline=True, announce=never)
    assert (tmp_path / "labels.gz").read_bytes() == damaged

    said: list[str] = []
    assert obtain(source, tmp_path, offline=False, announce=said.append) == CONTENTS
    assert f"{tmp_path}/labels.gz is" in said[0]
    assert said[0].endswith("it is not used")
    assert (tmp_path / "labels.gz").read_bytes() == PACKED["labels.gz"]
    assert site.requests == [("labels.gz", None)]


def test_a_damaged_file_stays_while_there_is_no_better_one(
    tmp_path: Path, source: Source, site: Site
) -> None:
    put_cache(tmp_path, {**PACKED, "labels.gz": b"precious"})
    site.files["labels.gz"] = b"wrong too"
    with pytest.raises(DataError):
        obtain(source, tmp_path, offline=False, announce=ignore)
    assert (tmp_path / "labels.gz").read_bytes() == b"precious"


def test_a_folder_in_a_files_place(tmp_path: Path, source: Source) -> None:
    (tmp_path / "images.gz").mkdir()
    with pytest.raises(DataError, match=r"images.gz is not a regular file: delete it"):
        read_content(tmp_path / "images.gz", source.files[0])
    with pytest.raises(DataError, match="Is a directory"):
        obtain(source, tmp_path, offline=False, announce=ignore)


def test_a_cache_that_cannot_be_made(tmp_path: Path, source: Source) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be stored in .*cache: Not a directory.*NORMWISE_CACHE"):
        obtain(source, tmp_path / "file" / "cache", offline=False, announce=ignore)


# regular files only

_KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, elsewhere: path.symlink_to(elsewhere),
    "link to nothing": lambda path, elsewhere: path.symlink_to(elsewhere.with_name("nothing")),
    "link to a device": lambda path, elsewhere: path.symlink_to("/dev/zero"),
    "pipe": lambda path, elsewhere: os.mkfifo(path),
    "folder": lambda path, elsewhere: path.mkdir(),
}
_WRITTEN = (".lock", "images.gz.part", "labels.gz.part")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@example(placed={".apt": "pipe"}, offline=False)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    placed=st.dictionaries(
        st.sampled_from([*_WRITTEN, *PACKED, ".apt"]), st.sampled_from(list(_KINDS)), min_size=1, max_size=3
    ),
    offline=st.booleans(),
)
def test_what_is_no_regular_file_is_never_written_to_nor_waited_for(
    tmp_path: Path, source: Source, placed: dict[str, str], offline: bool
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "cache").mkdir()
    (folder / "elsewhere").write_bytes(b"precious")
    for name, kind in placed.items():
        _KINDS[kind](folder / "cache" / name, folder / "elsewhere")
    try:
        assert obtain(source, folder / "cache", offline=offline, announce=ignore) == CONTENTS
    except DataError as error:
        assert offline or any(name in str(error) for name in placed)  # noqa: PT017
    assert {path.name for path in folder.iterdir()} == {"cache", "elsewhere"}
    assert (folder / "elsewhere").read_bytes() == b"precious"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("kind", list(_KINDS))
@pytest.mark.parametrize("name", _WRITTEN)
def test_the_remedy_is_to_delete_it(tmp_path: Path, source: Source, site: Site, name: str, kind: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").touch()
    path = tmp_path / "cache" / name
    _KINDS[kind](path, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"^{path} is not a regular file: delete it$"):
        obtain(source, tmp_path / "cache", offline=False, announce=ignore)
    assert site.requests == []
    path.rmdir() if kind == "folder" else path.unlink()
    assert obtain(source, tmp_path / "cache", offline=False, announce=ignore) == CONTENTS


def test_a_link_to_a_file_of_the_right_content_is_read(tmp_path: Path, source: Source) -> None:
    put_cache(tmp_path / "shared", PACKED)
    (tmp_path / "cache").mkdir()
    for name in PACKED:
        (tmp_path / "cache" / name).symlink_to(tmp_path / "shared" / name)
    assert obtain(source, tmp_path / "cache", offline=True, announce=never) == CONTENTS


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_with_a_name_that_is_too_long(tmp_path: Path, source: Source, offline: bool) -> None:
    with pytest.raises(DataError, match="File name too long"):
        obtain(source, tmp_path / ("n" * 300), offline=offline, announce=ignore)


# Debian's package


def test_the_installed_package_is_used_where_it_is(
    tmp_path: Path, source: Source, site: Site, commands: Path
) -> None:
    put_cache(tmp_path / "share", PACKED)
    listing = "\n".join(["/.", str(tmp_path / "share"), *(f"{tmp_path}/share/{name}" for name in PACKED)])
    put_command(commands, "dpkg", f'[ "$*" = "-L dataset-made-up" ] && echo "{listing}"')
    said: list[str] = []
    assert obtain(source, tmp_path / "cache", offline=True, announce=said.append) == CONTENTS
    assert said == [f"made-up: using the installed Debian package dataset-made-up, in {tmp_path}/share"]
    assert not (tmp_path / "cache").exists()

    (tmp_path / "share" / "labels.gz").write_bytes(b"altered")
    with pytest.raises(DataError, match=r"cache/images\.gz is missing"):
        obtain(source, tmp_path / "cache", offline=True, announce=said.append)
    assert "the installed Debian package is not used" in said[-1]
    assert "share/labels.gz is altered" in said[-1]


def test_a_package_that_is_not_installed(tmp_path: Path, source: Source, commands: Path) -> None:
    put_command(commands, "dpkg", "echo 'dpkg-query: package is not installed' >&2; exit 1")
    with pytest.raises(DataError, match="missing"):
        obtain(source, tmp_path, offline=True, announce=never)


def test_the_package_through_apt(tmp_path: Path, source: Source, site: Site, commands: Path) -> None:
    asked = put_debian(commands, PACKED)
    cache, said = tmp_path / "cache", list[str]()
    put_cache(cache, {"images.gz.part": b"from an earlier, broken download"})
    assert obtain(source, cache, offline=False, announce=said.append) == CONTENTS
    assert {path.name for path in cache.iterdir()} - {".lock"} == set(PACKED)
    assert asked.read_text().endswith("download dataset-made-up\n")
    assert said[0] == (f"made-up: fetching Debian's package dataset-made-up, 0.0 MB, with apt-get to {cache}")
    assert site.requests == []


NEEDS_OWN_LISTS = """
case "$*" in
  *Dir::State::lists=*/lists*update) touch "$PWD/lists/updated"; exit {update} ;;
  *Dir::State::lists=*/lists*download*) [ -f "$PWD/lists/updated" ] && touch made-up_1_all.deb ;;
  *) echo "W: something else" >&2; echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""


@pytest.mark.parametrize("update", [0, 100])
def test_empty_lists_are_fetched_for_this_download_only(
    tmp_path: Path, source: Source, commands: Path, update: int
) -> None:
    asked = put_debian(commands, PACKED, NEEDS_OWN_LISTS.replace("{update}", str(update)))
    said: list[str] = []
    assert obtain(source, tmp_path / "cache", offline=False, announce=said.append) == CONTENTS
    assert len(asked.read_text().splitlines()) == 3
    assert "apt-get download: E: Unable to locate package; fetching package lists" in said[1]
    assert {path.name for path in (tmp_path / "cache").iterdir()} - {".lock"} == set(PACKED)


@pytest.mark.parametrize(
    ("apt", "reason"),
    [
        ("echo reading; echo 'E: no route' >&2; exit 100", "apt-get update: E: no route"),
        ("exit 3", "apt-get update: exit status 3"),
        ("true", "apt-get download left 0 packages"),
        ("echo > a.deb; echo > b.deb", "apt-get download left 2 packages"),
    ],
)
def test_apt_that_fails_leads_to_the_site_aloud(
    tmp_path: Path, source: Source, site: Site, commands: Path, apt: str, reason: str
) -> None:
    put_debian(commands, PACKED, apt)
    said: list[str] = []
    assert obtain(source, tmp_path / "cache", offline=False, announce=said.append) == CONTENTS
    assert any(f"not from Debian ({reason}" in line for line in said)
    assert len(site.requests) == 2
    assert not (tmp_path / "cache" / ".apt").exists()


def test_apt_that_hangs_is_ended(
    tmp_path: Path, source: Source, site: Site, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normwise.lab.data.debian._SECONDS", 0.2)
    put_debian(commands, PACKED, "exec sleep 60")
    said: list[str] = []
    assert obtain(source, tmp_path / "cache", offline=False, announce=said.append) == CONTENTS
    assert "took more than 0 s" in said[1]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({**PACKED, "labels.gz": gzip.compress(b"another release")}, "labels.gz is altered"),
        ({"images.gz": PACKED["images.gz"]}, "the package holds no labels.gz"),
    ],
)
def test_a_package_with_other_files_leads_to_the_site_aloud(
    tmp_path: Path, source: Source, site: Site, commands: Path, files: dict[str, bytes], reason: str
) -> None:
    put_debian(commands, files)
    said: list[str] = []
    assert obtain(source, tmp_path / "cache", offline=False, announce=said.append) == CONTENTS
    assert any("not from Debian" in line and reason in line for line in said)
    assert site.requests == [("labels.gz", None)]


def test_neither_apt_nor_site(tmp_path: Path, source: Source, commands: Path) -> None:
    put_debian(commands, PACKED, "echo 'E: no network' >&2; exit 100")
    with pytest.raises(DataError) as caught:
        obtain(replace(source, url="http://127.0.0.1:9/"), tmp_path / "cache", offline=False, announce=ignore)
    message = str(caught.value)
    assert "E: no network" in message
    assert "refused" in message
    assert "run again when the network is back" in message
    assert "\n" not in message
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, source: Source, commands: Path) -> None:
    put_debian(commands, PACKED)
    put_cache(tmp_path / "cache" / ".apt", {"old_1_all.deb": b"half a package"})
    assert obtain(source, tmp_path / "cache", offline=False, announce=ignore) == CONTENTS
