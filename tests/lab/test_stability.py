from __future__ import annotations

from benchmarks.stability import contradictions, table

FOUND = {
    ("own", "0-2"): {"shrink": "not reproduced", "coefficient": "reproduced"},
    ("none", "0-2"): {"shrink": "undecided", "coefficient": "undecided"},
    ("own", "100-102"): {"shrink": "partly"},
}


def test_the_table_has_a_sign_for_each_job_and_a_dash_where_there_is_none() -> None:
    assert table(FOUND) == [
        "| claim | own, seeds 0-2 | none, seeds 0-2 | own, seeds 100-102 |",
        "| --- | --- | --- | --- |",
        "| `shrink` | ✗ | ? | ◐ |",
        "| `coefficient` | ✓ | ? | – |",
    ]


def test_only_reproduced_against_not_reproduced_is_a_contradiction() -> None:
    assert contradictions(FOUND) == []
    contrary = FOUND | {("own", "200-202"): {"shrink": "reproduced"}}
    assert contradictions(contrary) == [
        "shrink: not reproduced with own 0-2, reproduced with own 200-202",
    ]
