"""Rescaling in several directions: what two items change must not cancel in all trials."""

from __future__ import annotations

import itertools

import pytest

from normwise.invariance.rescale_check import directions


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 33])
def test_each_pair_is_inverted_in_all_four_ways(count: int) -> None:
    trials = directions(count)
    assert all(len(trial) == count for trial in trials)
    assert count == 0 or {trial[0] for trial in trials} == {False, True}
    for a, b in itertools.combinations(range(count), 2):
        assert {(trial[a], trial[b]) for trial in trials} == set(itertools.product([False, True], repeat=2))
