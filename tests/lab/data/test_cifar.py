from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.lab.made_up import Site, ignore, never
from tests.lab.small_images import cifar_archive

from normwise.lab.data.catalog import CATALOG, load_images
from normwise.lab.data.cifar import CIFAR10, CIFAR100, Archive, load_cifar
from normwise.lab.data.source import DataError


@pytest.mark.parametrize("published", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_a_download_is_resumed_verified_parsed_and_then_cached(
    tmp_path: Path, site: Site, published: Archive
) -> None:
    content, archive = cifar_archive(published)
    archive = replace(archive, url=site.url + archive.file)
    site.files[archive.file] = content
    site.break_off = [5000]
    said = list[str]()
    dataset = load_cifar(archive, cache=tmp_path, announce=said.append)
    assert site.requests == [(archive.file, None), (archive.file, "bytes=5000-")]
    assert f"from {archive.url} to {tmp_path / archive.name}" in said[0]

    files = len(archive.train)
    classes = 10 if files == 5 else 100
    assert dataset.train_images.shape == (40 * files, 3, 32, 32)
    assert dataset.test_images.shape == (40, 3, 32, 32)
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == torch.int64
    assert dataset.classes == tuple(f"class_{k}" for k in range(classes))
    assert dataset.train_labels[:40].tolist() == [k % classes for k in range(40)]
    # the bytes as they are, read another way
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile(archive.train[0])
        assert member is not None
        raw = member.read()
    start = archive.label_bytes
    for channel, row, column in ((0, 0, 0), (1, 2, 3), (2, 31, 31)):
        assert (
            dataset.train_images[0, channel, row, column] == raw[start + 1024 * channel + 32 * row + column]
        )

    again = load_cifar(archive, cache=tmp_path, offline=True, announce=never)
    assert again.fingerprint == dataset.fingerprint
    assert len(site.requests) == 2


def test_a_damaged_archive_is_fetched_again_or_with_offline_an_error(tmp_path: Path, site: Site) -> None:
    content, archive = cifar_archive(CIFAR10)
    archive = replace(archive, url=site.url + archive.file)
    site.files[archive.file] = content
    path = tmp_path / "cifar10" / archive.file
    with pytest.raises(DataError, match=r"is missing: expected MD5 .* again without --offline, or put http"):
        load_cifar(archive, cache=tmp_path, offline=True, announce=never)
    path.parent.mkdir()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"is truncated or altered: expected MD5 \w+, found \w+ for [\d,]+ b"):
        load_cifar(archive, cache=tmp_path, offline=True, announce=never)
    said = list[str]()
    load_cifar(archive, cache=tmp_path, announce=said.append)
    assert said[0].endswith("it is not used")
    assert path.read_bytes() == content


def test_a_site_that_sends_something_else(tmp_path: Path, site: Site) -> None:
    content, archive = cifar_archive(CIFAR10)
    archive = replace(archive, url=site.url + archive.file)
    site.files[archive.file] = content[:-1] + b"?"
    with pytest.raises(DataError, match=r"could not be fetched .*altered: expected MD5 .* by hand") as caught:
        load_cifar(archive, cache=tmp_path, announce=ignore)
    assert "\n" not in str(caught.value)
    assert {p.name for p in (tmp_path / "cifar10").iterdir()} <= {".lock"}


def test_an_archive_of_another_format_is_said(tmp_path: Path) -> None:
    content, archive = cifar_archive(CIFAR10)
    path = tmp_path / "cifar10" / archive.file
    path.parent.mkdir()
    path.write_bytes(content)
    for changes, message in (
        ({"test": "cifar-10-batches-bin/other.bin"}, "does not hold what it should: .*other.bin"),
        ({"label_bytes": 2}, r"has 122,920 bytes: expected records of 3,074 bytes"),
        ({"names": archive.test}, "does not hold what it should: .*utf-8"),
    ):
        with pytest.raises(DataError, match=message):
            load_cifar(replace(archive, **changes), cache=tmp_path, offline=True, announce=never)


def test_the_catalog(tmp_path: Path) -> None:
    assert load_images("digits").name == "digits"
    with pytest.raises(
        ValueError, match="'imagenet' is not known; it must be one of fashion-mnist, digits, "
    ):
        load_images("imagenet")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is missing"):
        load_images("cifar10", cache=tmp_path, offline=True)
    assert CATALOG == ("fashion-mnist", "digits", "cifar10", "cifar100", "imagefolder:DIR")
    assert (CIFAR10.md5, CIFAR100.md5) == (  # as the site publishes them
        "c32a1d4ab5d03f1284b67883e8d87530",
        "03b5dce01913d631647c71ecec9e9cb8",
    )
