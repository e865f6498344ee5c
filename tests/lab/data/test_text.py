from __future__ import annotations

import pytest
import torch

from normwise.lab.data.text import BIBLE, FINGERPRINTS, NUMBERS, TEXTS, Text, load_text


def _read(loaded: Text) -> str:
    ids = torch.cat([loaded.train, loaded.validation, loaded.test])
    return "".join(loaded.characters[index] for index in ids.tolist())


@pytest.mark.parametrize("name", TEXTS)
def test_texts_have_the_fingerprints_that_runs_are_identified_by(name: str) -> None:
    assert load_text(name).fingerprint == FINGERPRINTS[name]


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(ValueError, match="text 'novel' is not known; it must be one of bible-kjv, numbers"):
        load_text("novel")


def test_the_bible_is_complete_and_without_verse_numbers() -> None:
    bible = load_text(BIBLE)
    content = _read(bible)
    assert content.startswith("In the beginning God created the heaven and the earth.\n")
    assert content.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert content.count("\n") + 1 == 31_102
    assert not any(character.isdigit() for character in bible.characters)
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
