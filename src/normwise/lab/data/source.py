"""The files of a data set: what they must contain, and a reader that returns verified content or an error."""

from __future__ import annotations

import errno
import gzip
import hashlib
import math
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

__all__ = ["FASHION_MNIST", "DataError", "Source", "SourceFile", "open_regular", "parse_idx", "read_content"]


class DataError(ValueError):
    """A data file is missing, truncated or altered, or cannot be downloaded. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class SourceFile:
    """One gzipped file, known by the size and SHA-256 of its decompressed content.

    The checksum is not that of the file itself, as Debian and the authors compress the same data differently.

    Attributes:
        name: Name of the file.
        size: Bytes of the content.
        sha256: SHA-256 of the content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str

    @classmethod
    def idx(cls, name: str, shape: tuple[int, ...], sha256: str) -> SourceFile:
        """Return the idx file of an array of unsigned bytes with this shape."""
        return cls(name, 4 + 4 * len(shape) + math.prod(shape), sha256)  # magic number, dimensions, elements

    @property
    def limit(self) -> int:
        """Largest possible size of the gzipped file in bytes: gzip can always store the content verbatim."""
        return self.size + self.size // 100 + 1024

    @property
    def expected(self) -> str:
        """Description of the expected content, for messages."""
        return f"expected {self.size:,} bytes with SHA-256 {self.sha256[:12]}… after decompression"


@dataclass(frozen=True)
class Source:
    """Where to get the files of a data set.

    Attributes:
        name: Name of the data set, and of its folder in the cache.
        files: The files.
        package: Name of the Debian package that holds the files.
        url: Address of the folder that holds the files, with a slash at the end.
        download_size: Bytes of all files together as downloaded, for announcements.
    """

    name: str
    files: tuple[SourceFile, ...]
    package: str
    url: str
    download_size: int

    def remedy(self, directory: Path) -> str:
        """Return how a user gets the files into place by hand."""
        return (
            f"`apt-get install {self.package}`, or put the {len(self.files)} .gz files of {self.url} into "
            f"{directory} by hand"
        )


FASHION_MNIST = Source(
    name="fashion-mnist",
    files=(
        SourceFile.idx(
            "train-images-idx3-ubyte.gz",
            (60000, 28, 28),
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        SourceFile.idx(
            "train-labels-idx1-ubyte.gz",
            (60000,),
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        SourceFile.idx(
            "t10k-images-idx3-ubyte.gz",
            (10000, 28, 28),
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        SourceFile.idx(
            "t10k-labels-idx1-ubyte.gz",
            (10000,),
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    package="dataset-fashion-mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    download_size=30_878_645,
)


def open_regular(path: Path, mode: str, follow: bool = False) -> IO[bytes]:
    """Open a file in binary mode if it is a regular file, or is new. It never waits, as for a named pipe.

    Args:
        path: The file.
        mode: As of ``open``.
        follow: Whether ``path`` may be a symbolic link to a regular file.

    Raises:
        DataError: It is something else: a symbolic link, a folder, a named pipe, a device.
        OSError: It cannot be opened.
    """
    extra = getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    refusal = DataError(f"{path} is not a regular file: delete it")
    try:
        file = open(path, mode, opener=lambda name, flags: os.open(name, flags | extra, 0o666))  # noqa: SIM115
    except OSError as error:
        if (path.is_symlink() and not follow) or error.errno in (errno.ENXIO, errno.EISDIR):
            raise refusal from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise refusal
    return file


def read_content(path: Path, file: SourceFile) -> bytes:
    """Return the decompressed content of ``path`` if it is the file that ``file`` describes.

    At most one byte more than expected is decompressed.

    Raises:
        DataError: The file is missing, unreadable, truncated or altered.
    """
    expected = file.expected
    try:
        with open_regular(path, "rb", follow=True) as packed, gzip.open(packed) as stream:
            length = os.fstat(packed.fileno()).st_size
            if length > file.limit:
                raise DataError(f"{path} is altered: {expected}, found {length:,} before it")
            content = stream.read(file.size + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {expected}, found no file") from None
    except EOFError:
        raise DataError(
            f"{path} is truncated: {expected}, found a gzip stream that ends after {length:,} bytes"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is altered: {expected}, found {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) != file.size:
        found = f"{len(content):,} bytes" if len(content) < file.size else f"more than {file.size:,} bytes"
        raise DataError(f"{path} is altered: {expected}, found {found}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(f"{path} is altered: {expected}, found SHA-256 {digest[:12]}…")
    return content


def parse_idx(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the array in an idx file of unsigned bytes, the format of the MNIST files.

    The format is two zero bytes, the element type (8), the number of dimensions, each dimension as a
    big-endian 32-bit integer, and the elements in row-major order.

    Args:
        content: The decompressed file, as :func:`read_content` has verified it.

    Returns:
        A read-only array that shares memory with ``content``.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
