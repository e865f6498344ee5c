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
    """One file: its name, and the size and SHA-256 of its content.

    The checksum of a gzipped file is that of the decompressed content, as the same data are compressed in
    several ways: Debian's files and the authors' differ in the gzip header.

    Attributes:
        name: Name of the file.
        size: Bytes of the content.
        sha256: Of the content, in hexadecimal.
        gzipped: Whether the content is compressed by gzip in the file.
    """

    name: str
    size: int
    sha256: str
    gzipped: bool = True

    @classmethod
    def idx(cls, name: str, shape: tuple[int, ...], sha256: str) -> SourceFile:
        """Return the gzipped idx file of an array of unsigned bytes of this shape."""
        return cls(name, 4 + 4 * len(shape) + math.prod(shape), sha256)  # magic number, dimensions, elements

    @property
    def limit(self) -> int:
        """Bytes that no file of this content needs to exceed (gzip can always store verbatim)."""
        return self.size + self.size // 100 + 1024 if self.gzipped else self.size

    @property
    def expected(self) -> str:
        """What is expected, for messages."""
        after = " after decompression" if self.gzipped else ""
        return f"expected {self.size:,} bytes with SHA-256 {self.sha256[:12]}…{after}"


@dataclass(frozen=True)
class Source:
    """Where a data set's files come from.

    Attributes:
        name: name of the data set, and of its folder in the cache.
        files: what must be there.
        package: Debian's package that holds the files.
        url: address of the files' folder, with a slash at its end; or, where only Debian has them, of the
            package itself, which ends in ".deb".
        download_size: bytes of all files as they are downloaded, to be announced.
        package_file: name, size and checksum of the package that ``url`` names, where it names one.
    """

    name: str
    files: tuple[SourceFile, ...]
    package: str
    url: str
    download_size: int
    package_file: SourceFile | None = None

    def remedy(self, directory: Path) -> str:
        """How a person gets the files into place without this program's help."""
        install = f"`apt-get install {self.package}`, or put "
        if self.package_file is None:
            return f"{install}the {len(self.files)} .gz files of {self.url} into {directory} by hand"
        names = " and ".join(file.name for file in self.files)
        return f"{install}{names}, which {self.url} holds, into {directory} by hand"


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


BIBLE_KJV = Source(
    name="bible-kjv",
    files=(
        SourceFile(
            "bible.data",
            1_740_565,
            "6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
            gzipped=False,
        ),
    ),
    package="bible-kjv-text",
    url="http://deb.debian.org/debian/pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb",
    download_size=2_445_000,
    package_file=SourceFile(
        "bible-kjv-text_4.38_all.deb",
        2_445_000,
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
        gzipped=False,
    ),
)


def read_content(path: Path, file: SourceFile) -> bytes:
    """Content of the file at ``path``, decompressed, if it is the one that ``file`` describes.

    At most one byte more than expected is read, whatever the file claims to hold.

    Raises:
        DataError: missing, unreadable, truncated or altered; says what was expected and what was found.
    """
    expected = file.expected
    try:
        length = path.stat().st_size
        if length > file.limit:
            before = " before it" if file.gzipped else ""
            raise DataError(f"{path} is altered: {expected}, found {length:,}{before}")
        with gzip.open(path) if file.gzipped else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {expected}, found no file") from None
    except EOFError:
        raise DataError(
            f"{path} is truncated: {expected}, found a gzip stream that breaks off after {length:,} "
            "compressed bytes"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is altered: {expected}, found {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) != file.size:
        found = f"{len(content):,} bytes" if len(content) < file.size else f"more than {file.size:,} bytes"
        kind = "truncated" if len(content) < file.size and not file.gzipped else "altered"
        raise DataError(f"{path} is {kind}: {expected}, found {found}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(f"{path} is altered: {expected}, found SHA-256 {digest[:12]}…")
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
