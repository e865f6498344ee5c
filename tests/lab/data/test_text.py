"""Text: unpacked by our own reader, fetched like any other data, split in contiguous blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.lab.data.packed import bible_data, compressed, package
from tests.lab.made_up import Site, ignore, never, put_cache, put_debian

from normwise.lab.data import text
from normwise.lab.data.debian import unpack
from normwise.lab.data.lzw import uncompress
from normwise.lab.data.source import BIBLE_KJV, DataError, Source, SourceFile
from normwise.lab.data.text import BIBLE, FINGERPRINTS, NUMBERS, TEXTS, load_text

VERSES = [f"Ge1:{k} And the {k * 7919 % 1000} of the {k * 104729 % 997} was good." for k in range(1, 200)]
CONTENT = "\n".join(["A title", *VERSES]) + "\n"
FILE = bible_data(CONTENT.encode())
PACKAGE = package({"other": b"no", "bible.data": FILE})


# compress


def test_the_reader_of_compress_reads_what_it_wrote_for_real() -> None:
    real = bytes.fromhex("48deb0c90342481a31")  # the first bytes of a window of /usr/lib/bible.data
    assert uncompress(real) == b"Holy Bib"


@given(st.text("ab ", max_size=300), st.lists(st.integers(1, 299), max_size=3))
def test_what_was_compressed_comes_back(content: str, clear_at: list[int]) -> None:
    assert uncompress(compressed(content.encode(), tuple(clear_at))) == content.encode()


@pytest.mark.parametrize("clear_at", [(), (700, 30_000), (59_999,)])
def test_codes_of_every_width_are_read(clear_at: tuple[int, ...]) -> None:
    numbers = torch.randint(97, 123, (60_000,), generator=torch.Generator().manual_seed(0))
    content = bytes(numbers.tolist())
    packed = compressed(content, clear_at)
    assert uncompress(packed) == content


def test_a_damaged_stream_is_an_error() -> None:
    with pytest.raises(DataError, match="code 511 where 257 are known"):
        uncompress(b"\xff\xff\xff")
    with pytest.raises(DataError, match="its table would be full"):
        uncompress(bytes(140_000))


# fetching


@pytest.fixture
def bible(site: Site, commands: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A small text in the place of the Bible, on a machine without Debian."""
    site.files = {"made-up.deb": PACKAGE}
    source = Source(
        "made-up",
        (SourceFile("bible.data", len(FILE), hashlib.sha256(FILE).hexdigest(), gzipped=False),),
        "made-up-text",
        f"{site.url}made-up.deb",
        len(PACKAGE),
        SourceFile("made-up.deb", len(PACKAGE), hashlib.sha256(PACKAGE).hexdigest(), gzipped=False),
    )
    monkeypatch.setattr(text, "BIBLE_KJV", source)
    return source


def _read(loaded: text.Text) -> str:
    ids = torch.cat([loaded.train, loaded.validation, loaded.test])
    return "".join(loaded.characters[index] for index in ids.tolist())


def test_the_package_is_fetched_and_unpacked_without_debian(
    tmp_path: Path, bible: Source, site: Site
) -> None:
    said: list[str] = []
    loaded = load_text(cache=tmp_path, announce=said.append)
    assert _read(loaded) == "\n".join(verse.partition(" ")[2] for verse in VERSES)
    assert f"from {bible.url} to {tmp_path}/made-up" in said[2]
    assert {path.name for path in (tmp_path / "made-up").iterdir()} == {"bible.data", ".lock"}
    again = load_text(cache=tmp_path, offline=True, announce=never)
    assert again.fingerprint == loaded.fingerprint
    assert len(site.requests) == 1


def test_the_package_through_apt(tmp_path: Path, bible: Source, site: Site, commands: Path) -> None:
    put_debian(commands, {"bible.data": FILE})
    assert len(load_text(cache=tmp_path / "cache", announce=ignore).train) > 1000
    assert site.requests == []


def test_missing_and_offline(tmp_path: Path, bible: Source) -> None:
    with pytest.raises(DataError) as caught:
        load_text(cache=tmp_path, offline=True, announce=never)
    assert str(caught.value) == (
        f"{tmp_path}/made-up/bible.data is missing: expected {len(FILE):,} bytes with SHA-256 "
        f"{bible.files[0].sha256[:12]}…, found no file; run again without --offline, or `apt-get install "
        f"made-up-text`, or put bible.data, which {bible.url} holds, into {tmp_path}/made-up by hand"
    )


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        ("truncated", FILE[:-20]),
        ("truncated", b""),
        ("altered", FILE[:-1] + b"?"),
        ("altered", FILE + b"more"),
    ],
)
def test_a_damaged_file_is_an_error_offline_and_else_replaced_aloud(
    tmp_path: Path, bible: Source, kind: str, damaged: bytes
) -> None:
    put_cache(tmp_path / "made-up", {"bible.data": damaged})
    with pytest.raises(DataError, match=rf"bible\.data is {kind}: expected {len(FILE):,} bytes"):
        load_text(cache=tmp_path, offline=True, announce=never)
    said: list[str] = []
    load_text(cache=tmp_path, announce=said.append)
    assert said[0].endswith("it is not used")
    assert (tmp_path / "made-up" / "bible.data").read_bytes() == FILE


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (PACKAGE[:-8], "broke off|is truncated"),
        (PACKAGE[:-1] + b"?", "is altered"),
    ],
)
def test_a_damaged_package_is_not_unpacked(
    tmp_path: Path, bible: Source, site: Site, sent: bytes, reason: str
) -> None:
    site.files = {"made-up.deb": sent}
    with pytest.raises(DataError, match=reason):
        load_text(cache=tmp_path, announce=ignore)
    assert not (tmp_path / "made-up" / "bible.data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no package", "is no Debian package"),
        (package({"other": b""}), "the package holds no bible.data"),
        (PACKAGE[: len(PACKAGE) - 300], "is damaged"),
        (PACKAGE.replace(b"\xfd7zXZ", b"xxxxx"), "is damaged"),
    ],
)
def test_what_is_no_package_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(DataError, match=message):
        unpack(tmp_path / "x.deb", "bible.data")


# what is in it


def test_texts_have_the_fingerprints_that_the_source_knows() -> None:
    assert set(FINGERPRINTS) == set(TEXTS)
    assert load_text(NUMBERS, offline=True, announce=never).fingerprint == FINGERPRINTS[NUMBERS]
    with pytest.raises(ValueError, match="text 'novel' is not known"):
        load_text("novel")


def test_the_bible_has_its_fingerprint_where_it_is_on_this_machine() -> None:
    try:
        bible = load_text(BIBLE, offline=True, announce=ignore)
    except DataError:
        pytest.skip(f"{BIBLE_KJV.package} is not on this machine")
    assert bible.fingerprint == FINGERPRINTS[BIBLE]
    assert _read(bible).startswith("In the beginning God created the heaven and the earth.\n")
    assert _read(bible).endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert len(bible.characters) == 63


def test_parts_are_contiguous_disjoint_and_all_of_the_text() -> None:
    loaded = load_text(NUMBERS)
    lines = _read(loaded).split("\n")
    assert lines[:2] + lines[9_998:] == [
        "zero",
        "one",
        "nine thousand nine hundred ninety-eight",
        "nine thousand nine hundred ninety-nine",
    ]
    assert lines[1413] == "one thousand four hundred thirteen"
    total = len(loaded.train) + len(loaded.validation) + len(loaded.test)
    assert total == len("\n".join(lines))
    assert len(loaded.validation) == len(loaded.test) == pytest.approx(total / 20, abs=1)
    counts = torch.bincount(loaded.test).double()
    expected = torch.distributions.Categorical(counts).entropy()
    assert loaded.unigram_entropy == pytest.approx(float(expected))
