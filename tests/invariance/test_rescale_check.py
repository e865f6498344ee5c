"""Rescaling in several directions: what two items change must not cancel in all trials."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from normwise.invariance.probe import Probe
from normwise.invariance.rescale_check import RescaleCheck, directions


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 33])
def test_each_pair_is_inverted_in_all_four_ways(count: int) -> None:
    trials = directions(count)
    assert all(len(trial) == count for trial in trials)
    assert count == 0 or {trial[0] for trial in trials} == {False, True}
    for a, b in itertools.combinations(range(count), 2):
        assert {(trial[a], trial[b]) for trial in trials} == set(itertools.product([False, True], repeat=2))


def test_items_that_fail_in_different_trials() -> None:
    """An item that has failed takes part in no further trial, and the others keep their numbers."""

    class Fails(RescaleCheck):
        def failures(self, items: Sequence[Any], *_: Any, trial: int = 0, **__: Any) -> dict[int, float]:
            tried.append(list(items))
            return {
                place: 1.0 for place, item in enumerate(items) if (trial, item) in {(0, 1), (1, 3), (4, 0)}
            }

    tried: list[list[int]] = []
    check = Fails(
        Probe(nn.Linear(2, 2), [torch.zeros(1, 2)], lambda model, x: model(x), torch.float64), (0, 1)
    )
    failed = check.refuted([*"abcde"], lambda *_: None, lambda _: [], 1e-4, real_constants=True)
    assert failed == {1: 1.0, 3: 1.0, 0: 1.0}
    assert tried[:3] == [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 2, 4]]
    assert tried[-1] == [2, 4]
