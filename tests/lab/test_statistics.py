from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from normwise.lab.statistics import mean_with_interval, paired_difference


def test_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=7), rng.normal(size=7)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = paired_difference(first.tolist(), second.tolist())
    assert found.mean == pytest.approx((first - second).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 7


def test_missing_runs_are_left_out_in_pairs() -> None:
    assert paired_difference([1.0, None, 3.0], [0.0, 1.0, None]).n == 1
    assert mean_with_interval([None, 2.0, 4.0]).mean == 3.0


def test_too_few_values_have_no_interval() -> None:
    one = mean_with_interval([2.0])
    assert one.mean == 2.0
    assert math.isnan(one.low)
    assert one.as_dict() == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert math.isnan(mean_with_interval([None]).mean)
