"""Text for language models, character by character: the King James Bible, or numbers in words.

The translation of 1611 is out of copyright; the file is that of Debian's package ``bible-kjv-text`` (Chip
Chapin's Bible Retrieval System, 1989: "for unrestricted use"), fetched when it is first needed. Numbers in
words need no network.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normwise.lab.data.datasets import cache_directory, to_stderr
from normwise.lab.data.fetch import obtain
from normwise.lab.data.lzw import uncompress
from normwise.lab.data.source import BIBLE_KJV, DataError, Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["BIBLE", "FINGERPRINTS", "NUMBERS", "TEXTS", "Text", "load_text"]

BIBLE = "bible-kjv"
NUMBERS = "numbers"
TEXTS = (BIBLE, NUMBERS)

# SHA-256 of the prepared text; known here, so that settings can be written down without the text.
FINGERPRINTS = {
    BIBLE: "496466cc2ac72e32c61eca9053c0d09fb4957cfbaf4f46ef995214ed5ad218c5",
    NUMBERS: "9121b5088796029f609fba09d50359d021a39ecfbf373ec60c76ec32f9235dc6",
}

_HELD_OUT = 0.05  # of the text, for validation and for testing each

_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
_ONES = (*_TO_TWELVE.split(), *(f"{name}teen" for name in _TEENS))
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three contiguous blocks, in its own order: training, validation, test.

    Attributes:
        name: One of ``TEXTS``.
        train: Shape (N,), int64: an index into ``characters`` for each character.
        validation: As ``train``.
        test: As ``train``.
        characters: What the indices stand for, sorted.
        fingerprint: SHA-256 (hexadecimal) of the whole text.
    """

    name: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    characters: str
    fingerprint: str

    @property
    def unigram_entropy(self) -> float:
        """Loss (nats a character) of who knows only how frequent each character is in the test part."""
        counts = torch.bincount(self.test, minlength=len(self.characters)).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def load_text(
    name: str = BIBLE,
    *,
    cache: Path | None = None,
    offline: bool = False,
    announce: Callable[[str], None] = to_stderr,
) -> Text:
    """Load a text, fetching it first if it is not there.

    "bible-kjv": the file comes from the cache, from Debian's package ``bible-kjv-text`` where it is
    installed, or is fetched: as that package through apt (without being root), else the package over HTTP.
    It is verified at every load, and nothing of the package is run. The verses' numbers are left out: a verse
    is a line.

    "numbers": those below 10,000 in words, a line each, for machines without network and for tests.

    Args:
        name: One of ``TEXTS``.
        cache: Folder of the cache; ``cache_directory()`` by default.
        offline: Forbids the network.
        announce: Is called with one line for each thing that is fetched, from where, to where.

    Raises:
        ValueError: There is no text of that name.
        DataError: The file is missing, truncated or altered and was not to be fetched, or could not be.

    Example:
        >>> numbers = load_text("numbers")
        >>> "".join(numbers.characters[index] for index in numbers.test[-19:].tolist())
        'hundred ninety-nine'
    """
    if name == BIBLE:
        return _bible(BIBLE_KJV, cache or cache_directory(), offline, announce)
    if name == NUMBERS:
        return _text(name, "\n".join(_in_words(number) for number in range(10_000)))
    raise ValueError(f"text {name!r} is not known; it must be one of {', '.join(TEXTS)}")


def _bible(source: Source, cache: Path, offline: bool, announce: Callable[[str], None]) -> Text:
    contents = obtain(source, cache / source.name, offline=offline, announce=announce)
    lines = _unpacked(contents[source.files[0].name]).decode("ascii").splitlines()
    # the first line is a title; each other begins with book, chapter and verse, as in "Ge1:1 In the ..."
    return _text(source.name, "\n".join(line.partition(" ")[2] for line in lines[1:]))


def _text(name: str, content: str) -> Text:
    encoded = np.frombuffer(content.encode("ascii"), dtype=np.uint8)
    present = np.flatnonzero(np.bincount(encoded, minlength=256)).astype(np.uint8)
    index = np.zeros(256, dtype=np.int64)
    index[present] = np.arange(len(present))
    everything = torch.from_numpy(index[encoded])
    held_out = math.ceil(_HELD_OUT * len(everything))
    train, validation, test = everything.split([len(everything) - 2 * held_out, held_out, held_out])
    characters = present.tobytes().decode("ascii")
    digest = hashlib.sha256(f"{name} {held_out} ".encode() + content.encode("ascii"))
    return Text(name, train, validation, test, characters, digest.hexdigest())


def _in_words(number: int) -> str:
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {_in_words(number % size)}" if number % size else ""
            return f"{_in_words(number // size)} {name}{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def _unpacked(data: bytes) -> bytes:
    """The text in a file of the Bible Retrieval System (its format EC02).

    After 84 bytes come, as big-endian 32-bit integers, the bytes of a window of text, the number of windows,
    and where in the file each begins and the last ends. Each window is an LZW stream of its own.
    """
    numbers = np.frombuffer(data, dtype=">u4", count=2, offset=84)
    if data[:4] != b"EC02" or not 0 < numbers[1] < len(data) // 4:
        raise DataError(f"the text is in no known format: it begins with {data[:4]!r}, expected b'EC02'")
    places = np.frombuffer(data, dtype=">u4", count=int(numbers[1]) + 1, offset=92).tolist()
    return b"".join(uncompress(data[a:b]) for a, b in itertools.pairwise(places))
