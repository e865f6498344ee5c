"""Text for language models, character by character: the King James Bible, or numbers in words.

Both need no network: the package contains the Bible (``bible-kjv.COPYRIGHT`` states its origin and licence).
"""

from __future__ import annotations

import hashlib
import lzma
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["BIBLE", "FINGERPRINTS", "NUMBERS", "TEXTS", "Text", "load_text"]

BIBLE = "bible-kjv"
NUMBERS = "numbers"
TEXTS = (BIBLE, NUMBERS)

# Fingerprints of the texts, so that the settings of a run need not load the text.
FINGERPRINTS = {
    BIBLE: "496466cc2ac72e32c61eca9053c0d09fb4957cfbaf4f46ef995214ed5ad218c5",
    NUMBERS: "9121b5088796029f609fba09d50359d021a39ecfbf373ec60c76ec32f9235dc6",
}

_HELD_OUT = 0.05  # fraction of the text for validation, and the same for testing

_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
_ONES = (*_TO_TWELVE.split(), *(f"{name}teen" for name in _TEENS))
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three contiguous parts, in the order of the text: training, validation, test.

    Attributes:
        name: One of ``TEXTS``.
        train: Shape (N,), int64: for each character an index into ``characters``.
        validation: Like ``train``.
        test: Like ``train``.
        characters: The distinct characters, sorted.
        fingerprint: SHA-256 (hexadecimal) of the name, the size of the test part and the content.
    """

    name: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    characters: str
    fingerprint: str

    @property
    def unigram_entropy(self) -> float:
        """Loss in nats per character of a model that knows only the character frequencies of the test."""
        counts = torch.bincount(self.test, minlength=len(self.characters)).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def load_text(name: str = BIBLE) -> Text:
    """Load a text.

    "bible-kjv" is the King James Bible, a verse per line, without the numbers of the verses. "numbers" are
    the numbers below 10,000 in words, one per line.

    Args:
        name: One of ``TEXTS``.

    Raises:
        ValueError: There is no text of that name.

    Example:
        >>> numbers = load_text("numbers")
        >>> "".join(numbers.characters[index] for index in numbers.test[-19:].tolist())
        'hundred ninety-nine'
    """
    if name == BIBLE:
        packed = Path(__file__).with_name("bible-kjv.txt.xz").read_bytes()
        return _text(name, lzma.decompress(packed))
    if name == NUMBERS:
        return _text(name, "\n".join(_in_words(number) for number in range(10_000)).encode("ascii"))
    raise ValueError(f"text {name!r} is not known; it must be one of {', '.join(TEXTS)}")


def _text(name: str, content: bytes) -> Text:
    encoded = np.frombuffer(content, dtype=np.uint8)
    present = np.flatnonzero(np.bincount(encoded, minlength=256)).astype(np.uint8)
    index = np.zeros(256, dtype=np.int64)
    index[present] = np.arange(len(present))
    ids = torch.from_numpy(index[encoded])
    held_out = math.ceil(_HELD_OUT * len(ids))
    train, validation, test = ids.split([len(ids) - 2 * held_out, held_out, held_out])
    characters = present.tobytes().decode("ascii")
    digest = hashlib.sha256(f"{name} {held_out} ".encode() + content)
    return Text(name, train, validation, test, characters, digest.hexdigest())


def _in_words(number: int) -> str:
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {_in_words(number % size)}" if number % size else ""
            return f"{_in_words(number // size)} {name}{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
