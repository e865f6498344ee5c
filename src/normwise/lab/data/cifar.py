"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the binary version of their own site.

A record of CIFAR-10 is a label byte and 3072 bytes of pixels: 1024 of red, 1024 of green, 1024 of blue, each
row by row. A record of CIFAR-100 has two label bytes, the coarse and the fine class; the label here is the
fine one.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from normwise.lab.data.datasets import Dataset, cache_directory, to_stderr
from normwise.lab.data.fetch import Announce, download, locked
from normwise.lab.data.source import DataError, open_regular

__all__ = ["CIFAR10", "CIFAR100", "Archive", "load_cifar"]

_PIXELS = (3, 32, 32)
_SITE = "https://www.cs.toronto.edu/~kriz/"
_LIMIT = 200_000_000  # the archives have about 170 MB


@dataclass(frozen=True)
class Archive:
    """A tar.gz archive of records.

    Attributes:
        name: Name of the data set, and of its folder in the cache.
        url: Address of the archive.
        md5: MD5 of the archive, as the site publishes it.
        train: The files of training records.
        test: The file of test records.
        names: The file of class names, one a line.
        label_bytes: Label bytes of a record; the last one is the class.
    """

    name: str
    url: str
    md5: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int

    @property
    def file(self) -> str:
        """Name of the archive."""
        return self.url.rpartition("/")[2]


CIFAR10 = Archive(
    name="cifar10",
    url=f"{_SITE}cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    train=tuple(f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)),
    test="cifar-10-batches-bin/test_batch.bin",
    names="cifar-10-batches-bin/batches.meta.txt",
    label_bytes=1,
)
CIFAR100 = Archive(
    name="cifar100",
    url=f"{_SITE}cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    train=("cifar-100-binary/train.bin",),
    test="cifar-100-binary/test.bin",
    names="cifar-100-binary/fine_label_names.txt",
    label_bytes=2,
)


def load_cifar(
    archive: Archive,
    *,
    cache: Path | None = None,
    offline: bool = False,
    announce: Announce = to_stderr,
) -> Dataset:
    """Load CIFAR-10 or CIFAR-100; download its archive if it is missing or damaged.

    The MD5 of the archive is verified at every load.

    Args:
        archive: ``CIFAR10`` or ``CIFAR100``.
        cache: Folder of the cache. The default is ``cache_directory()``.
        offline: Forbids the network.
        announce: Called with one line for the download.

    Returns:
        The data set. Its images have the shape (N, 3, 32, 32) and the type uint8; their levels are 0 to 255.

    Raises:
        DataError: The archive is missing, truncated or altered, and downloading it is forbidden or failed; or
            it does not hold the records that it should.
    """
    directory = (cache or cache_directory()) / archive.name
    path = directory / archive.file
    problem = _problem(path, archive)
    if problem is not None and offline:
        raise DataError(f"{problem}; run again without --offline, or {_remedy(archive, directory)}")
    if problem is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory, archive.name, announce):
                problem = _problem(path, archive)  # another process may have fetched it by now
                if problem is not None:
                    _fetch(archive, path, problem, announce)
        except OSError as error:
            raise DataError(
                f"{archive.name} cannot be stored in {error.filename or directory}: "
                f"{error.strerror or error}; name a writable folder in the variable NORMWISE_CACHE"
            ) from error
    return _parsed(path, archive)


def _fetch(archive: Archive, path: Path, problem: DataError, announce: Announce) -> None:
    if path.exists():
        announce(f"{problem}; it is not used")
    announce(f"{archive.name}: fetching about 170 MB from {archive.url} to {path.parent}")
    try:
        download(archive.url, path, _LIMIT, lambda part: _verify(part, archive))
    except DataError as error:
        raise DataError(
            f"{archive.name} could not be fetched ({error}); run again when the network is back, or "
            f"{_remedy(archive, path.parent)}"
        ) from error
    announce(f"{archive.name}: fetched and verified")


def _remedy(archive: Archive, directory: Path) -> str:
    return f"put {archive.url} into {directory} by hand"


def _problem(path: Path, archive: Archive) -> DataError | None:
    try:
        _verify(path, archive)
    except DataError as error:
        return error
    return None


def _verify(path: Path, archive: Archive) -> None:
    """Raise a DataError unless ``path`` is the archive."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open_regular(path, "rb", follow=True) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: expected MD5 {archive.md5}, found no file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest.hexdigest() != archive.md5:
        raise DataError(
            f"{path} is truncated or altered: expected MD5 {archive.md5}, found {digest.hexdigest()} for "
            f"{path.stat().st_size:,} bytes"
        )


def _parsed(path: Path, archive: Archive) -> Dataset:
    digest = hashlib.sha256(archive.name.encode())
    try:
        with tarfile.open(path, "r:gz") as tar:
            contents = {}
            for name in (*archive.train, archive.test, archive.names):
                member = tar.extractfile(name)
                contents[name] = b"" if member is None else member.read()
                digest.update(f" {name} {len(contents[name])} ".encode() + contents[name])
        classes = tuple(contents[archive.names].decode("utf-8").split())
    except (KeyError, tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} does not hold what it should: {error}") from error
    parts: list[torch.Tensor] = []
    for names in (archive.train, (archive.test,)):
        records = [_records(contents[name], f"{name} of {path}", archive, len(classes)) for name in names]
        table = np.concatenate(records)
        labels = table[:, archive.label_bytes - 1].astype(np.int64)
        images = np.ascontiguousarray(table[:, archive.label_bytes :]).reshape(-1, *_PIXELS)
        parts += [torch.from_numpy(images), torch.from_numpy(labels)]
    train, train_labels, test, test_labels = parts
    return Dataset(archive.name, train, train_labels, test, test_labels, classes, digest.hexdigest())


def _records(
    content: bytes, name: str, archive: Archive, classes: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    length = archive.label_bytes + int(np.prod(_PIXELS))
    if not content or len(content) % length:
        raise DataError(
            f"{name} has {len(content):,} bytes: expected records of {length:,} bytes; delete the archive"
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, length)
    largest = int(table[:, archive.label_bytes - 1].max())
    if largest >= classes:
        raise DataError(f"{name} has the label {largest}, but there are {classes} class names")
    return table
