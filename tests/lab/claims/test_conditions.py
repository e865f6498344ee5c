from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normwise.lab.claims.conditions import (
    Condition,
    above,
    all_of,
    all_some_none,
    any_of,
    below,
    equivalent,
    verdict_of,
)
from normwise.lab.claims.statistics import Estimate, within

conditions = st.sampled_from([True, False, None])
numbers = st.floats(-5, 5)
RANK = {"reproduced": 2, "partly": 1, "not reproduced": 0}


def _answers(known: list[Condition]) -> list[list[bool]]:
    """Return every way to answer what is open."""
    return [list(way) for way in product(*([True, False] if c is None else [bool(c)] for c in known))]


@given(st.lists(conditions, max_size=5))
def test_a_combination_is_decided_where_every_answer_to_what_is_open_gives_the_same(
    known: list[Condition],
) -> None:
    for combined, plain in ((all_of, all), (any_of, any)):
        possible = {plain(way) for way in _answers(known)}
        assert combined(known) == (possible.pop() if len(possible) == 1 else None)


@given(st.lists(conditions, min_size=1, max_size=5))
def test_a_verdict_is_one_that_every_answer_to_what_is_open_gives(known: list[Condition]) -> None:
    verdict = all_some_none(known)
    possible = {all_some_none(way) for way in _answers(known)}
    assert "undecided" not in possible
    if verdict != "undecided":
        assert possible == {verdict}
    else:
        assert len(possible) > 1


@given(st.lists(conditions, min_size=1, max_size=5), st.lists(conditions, min_size=1, max_size=5))
def test_two_jobs_of_which_no_condition_is_contrary_never_show_reproduced_against_not(
    here: list[Condition], there: list[Condition]
) -> None:
    pairs = list(zip(here, there, strict=False))
    if any({a, b} == {True, False} for a, b in pairs):
        return
    verdicts = {all_some_none(side) for side in zip(*pairs, strict=True)}
    assert verdicts != {"reproduced", "not reproduced"}


@given(numbers, st.floats(0, 3), numbers)
def test_a_threshold_within_the_interval_leaves_it_open(mean: float, half: float, threshold: float) -> None:
    estimate = Estimate(mean, mean - half, mean + half, 3)
    inside = estimate.low <= threshold <= estimate.high
    assert (above(estimate, threshold) is None) == inside
    assert (below(estimate, threshold) is None) == inside
    if not inside:
        assert above(estimate, threshold) == (mean > threshold) != below(estimate, threshold)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.4, 0.4, True), (0.6, 0.9, False), (-0.9, -0.6, False), (0.3, 0.9, None), (-2.0, 2.0, None)],
)
def test_an_equivalence_is_shown_refuted_or_open(low: float, high: float, expected: Condition) -> None:
    assert equivalent(within(Estimate((low + high) / 2, low, high, 5), 0.5)) is expected


def test_nothing_is_decided_without_an_interval() -> None:
    nan = float("nan")
    for estimate in (Estimate(3.0, nan, nan, 1), Estimate(nan, nan, nan, 0)):
        assert above(estimate) is below(estimate) is None


def test_verdicts_of_a_rule_with_two_conditions() -> None:
    assert verdict_of(True, None) == "reproduced"
    assert verdict_of(False, True) == "partly"
    assert verdict_of(False, False) == "not reproduced"
    for open_ended in ((None, True), (None, False), (False, None)):
        assert verdict_of(*open_ended) == "undecided"
