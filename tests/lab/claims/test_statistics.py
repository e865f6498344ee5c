from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from normwise.lab.claims.statistics import equivalence, mean_with_interval, paired_difference


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
    assert str(one) == one.short == "2.0"
    assert str(mean_with_interval([None])) == "–"
    assert one.as_dict() == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert math.isnan(mean_with_interval([None]).mean)


def test_equivalence_agrees_with_two_one_sided_tests() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.3, 0.6):
        first, second = rng.normal(shift, 0.5, size=12), np.zeros(12)
        below = stats.ttest_1samp(first, -0.5, alternative="greater").pvalue
        above = stats.ttest_1samp(first, 0.5, alternative="less").pvalue
        found = equivalence(first.tolist(), second.tolist(), margin=0.5)
        assert found.shown == (max(below, above) < 0.05)


def test_power_of_an_equivalence_test_is_how_often_it_shows_what_is_there() -> None:
    rng = np.random.default_rng(2)
    found = [equivalence(values.tolist(), [0.0] * 10, margin=0.6) for values in rng.normal(size=(400, 10))]
    shown = np.mean([test.shown for test in found])
    assert np.mean([test.power for test in found]) == pytest.approx(shown, abs=0.1)


def test_an_equivalence_needs_two_seeds() -> None:
    one = equivalence([1.0], [1.0], margin=1.0)
    assert not one.shown
    assert one.as_dict()["power"] is None
