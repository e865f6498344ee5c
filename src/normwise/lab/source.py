"""What the files of a data set must contain, and how they are read: checked, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

_UNSIGNED_BYTE = 0x08  # the idx format's code for the only element type that is read here
_MOST_DIMENSIONS = 8  # more is not a data set but a damaged header


class DataError(ValueError):
    """A data file is missing, truncated or altered, or could not be had. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class SourceFile:
    """One gzipped idx file of unsigned bytes: its name, its array's shape, and its content's SHA-256.

    The checksum is that of the decompressed content, as the same data are compressed in several ways:
    Debian's files and the authors' differ in the gzip header.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the decompressed content: magic number, dimensions, elements."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)

    @property
    def compressed_limit(self) -> int:
        """Bytes that no compressed form of the content needs to exceed (gzip can always store verbatim)."""
        return self.size + self.size // 100 + 1024


@dataclass(frozen=True)
class Source:
    """Where a data set's files come from.

    Attributes:
        name: name of the data set, and of its folder in the cache.
        files: what must be there.
        package: Debian's package that holds the files.
        url: address of the files' folder, with a slash at its end.
        download_size: bytes of all files as they are downloaded, to be announced.
    """

    name: str
    files: tuple[SourceFile, ...]
    package: str
    url: str
    download_size: int

    def remedy(self, directory: Path) -> str:
        """How a person gets the files into place without this program's help."""
        return (
            f"`apt-get install {self.package}`, or put the {len(self.files)} .gz files of {self.url} "
            f"into {directory} by hand"
        )


FASHION_MNIST = Source(
    name="fashion-mnist",
    files=(
        SourceFile(
            "train-images-idx3-ubyte.gz",
            (60000, 28, 28),
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        SourceFile(
            "train-labels-idx1-ubyte.gz",
            (60000,),
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        SourceFile(
            "t10k-images-idx3-ubyte.gz",
            (10000, 28, 28),
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        SourceFile(
            "t10k-labels-idx1-ubyte.gz",
            (10000,),
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    package="dataset-fashion-mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    download_size=30_878_645,
)


def read_content(path: Path, file: SourceFile) -> bytes:
    """Decompressed content of the file at ``path``, if it is the one that ``file`` describes.

    At most one byte more than expected is decompressed, whatever the file claims to hold.

    Raises:
        DataError: missing, unreadable, truncated or altered; says what was expected and what was found.
    """
    expected = f"expected {file.size:,} bytes with SHA-256 {file.sha256[:12]}…"
    try:
        length = path.stat().st_size
        if length > file.compressed_limit:
            raise DataError(f"{path} is altered: {expected} after decompression, found {length:,} before it")
        with gzip.open(path) as stream:
            content = stream.read(file.size + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {expected} after decompression, found no file") from None
    except EOFError:
        raise DataError(
            f"{path} is truncated: {expected} after decompression, found a gzip stream that breaks off "
            f"after {length:,} compressed bytes"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is altered: {expected} after decompression, found {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) != file.size:
        found = f"{len(content):,} bytes" if len(content) < file.size else f"more than {file.size:,} bytes"
        raise DataError(f"{path} is altered: {expected} after decompression, found {found}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(f"{path} is altered: {expected} after decompression, found SHA-256 {digest[:12]}…")
    return content


def parse_idx(content: bytes, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The array in an idx file of unsigned bytes (the format of MNIST's files).

    The format is two zero bytes, the element type, the number of dimensions, each dimension as a
    big-endian 32-bit integer, and the elements in row-major order.

    Args:
        content: the decompressed file.
        name: what error messages call it.

    Returns:
        A read-only array that shares memory with ``content``.

    Raises:
        DataError: the header is malformed, or does not agree with the number of bytes.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), "labels")
        array([7, 8, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise DataError(
            f"{name} is not an idx file of unsigned bytes: expected a header of 00 00 08, "
            f"found {content[:3].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * content[3]
    if not 1 <= content[3] <= _MOST_DIMENSIONS or len(content) < start:
        raise DataError(f"{name} has a malformed idx header: {content[3]} dimensions in {len(content)} bytes")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{name} has a malformed idx header: shape {shape} needs {start + math.prod(shape):,} bytes, "
            f"found {len(content):,}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
