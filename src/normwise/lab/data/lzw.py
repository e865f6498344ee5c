"""Unpacking what Unix ``compress`` packed, which no module of Python's standard library does."""

from __future__ import annotations

import numpy as np

from normwise.lab.data.source import DataError

__all__ = ["uncompress"]

_CLEAR = 256  # the code that starts a new table; compress writes it when the old one serves badly
_FIRST = 257


def uncompress(packed: bytes) -> bytes:
    """Return the content of an LZW stream of Unix ``compress`` (16 bits, block mode), without its header.

    Each code stands for a sequence of bytes, and each but the first adds a sequence to the table: that of the
    code before it and one byte more (Welch 1984, "A Technique for High-Performance Data Compression"). Codes
    are as wide as the table needs, from 9 bits, and packed from the low bit up.

    Raises:
        DataError: It is damaged, or has more codes than a table without a clear holds.

    Example:
        >>> uncompress(bytes([ord("a"), 2, 2]))  # the codes 97, which is "a", and 257, which is "aa"
        b'aaa'
    """
    found: list[bytes] = []
    start = 0
    while start < len(packed):
        start += _one_table(packed[start:], found)
    return b"".join(found)


def _one_table(packed: bytes, found: list[bytes]) -> int:
    """Append the sequences up to a clear or the end; return how many bytes they took."""
    codes, ends = _codes(packed)
    sequences = [bytes([value]) for value in range(256)] + [b""]
    before = b""
    for k, code in enumerate(codes):
        if code == _CLEAR:  # compress writes codes in groups of eight, and fills up the last
            filled = -(-(k + 1) // 8) * 8 - (k + 1)
            return -(-(ends[k] + filled * (k + 256).bit_length()) // 8)
        if code < len(sequences):
            now = sequences[code]
        elif code == len(sequences) and before:
            now = before + before[:1]  # the very sequence that this code adds
        else:
            raise DataError(f"a compressed stream is damaged: code {code} where {len(sequences)} are known")
        if before:
            sequences.append(before + now[:1])
        found.append(now)
        before = now
    return len(packed)


def _codes(packed: bytes) -> tuple[list[int], list[int]]:
    """Return the numbers in a stream and the bits up to the end of each.

    The k-th number, from 0, has as many bits as k + 256 has.
    """
    most = min(len(packed) * 8 // 9, (1 << 16) - _FIRST + 1)
    sizes = np.arange(256, 256 + most)
    widths = np.frexp(sizes.astype(np.float64))[1].astype(np.int64)
    ends = np.cumsum(widths)
    ends = ends[ends <= 8 * len(packed)]
    if len(ends) > (1 << 16) - _FIRST:
        raise DataError("a compressed stream is too long: its table would be full")
    widths = widths[: len(ends)]
    starts = ends - widths
    first = starts >> 3
    values = np.frombuffer(packed + bytes(3), dtype=np.uint8).astype(np.int64)
    words = values[first] | values[first + 1] << 8 | values[first + 2] << 16
    numbers: list[int] = (words >> (starts & 7) & (1 << widths) - 1).tolist()
    return numbers, ends.tolist()
