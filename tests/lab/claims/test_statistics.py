from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from normwise.lab.claims.statistics import (
    bootstrap,
    equivalence,
    mean_with_interval,
    median,
    paired_difference,
    pooled_deviation,
)


def test_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=7), rng.normal(size=7)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = paired_difference(first.tolist(), second.tolist())
    assert found.mean == pytest.approx((first - second).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 7


def test_missing_runs_are_left_out_in_pairs() -> None:
    assert paired_difference([1.0, None, 3.0, 3.0], [0.0, 1.0, None, 2.0]).n == 2
    assert mean_with_interval([None, 2.0, 4.0]).mean == 3.0


def test_there_is_no_mean_over_fewer_than_half_of_the_seeds() -> None:
    assert mean_with_interval([None, None, None, 2.0]).n == 0
    assert median([None, None, 1.0]) is None
    assert mean_with_interval([None, None, 1.0, 2.0]).n == 2
    assert paired_difference([1.0, None, 3.0], [0.0, 1.0, None]).n == 0


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


def _range(means: np.ndarray) -> np.ndarray:
    return np.asarray(means.max(-1) - means.min(-1))


@pytest.mark.parametrize("n", [3, 5, 8])  # all draws, and a sample of them
def test_the_bootstrap_of_a_mean_is_students_interval(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 1))
    found = bootstrap(values.tolist(), lambda means: means[..., 0])
    expected = mean_with_interval(values[:, 0].tolist())
    assert found == pytest.approx(expected, abs=1e-12 if n <= 5 else 0.05)


def test_a_bootstrap_pairs_the_columns_of_a_seed() -> None:
    common = np.random.default_rng(0).normal(size=(5, 1))
    found = bootstrap((common + np.array([0.0, 1.0, 3.0])).tolist(), _range)
    assert found == pytest.approx((3.0, 3.0, 3.0, 5))


@pytest.mark.parametrize("n", [3, 4, 6])
def test_the_interval_of_a_spread_covers_it(n: int) -> None:
    """Five norms, of which two are far down; seeds differ by a third of a point, as in training."""
    rng = np.random.default_rng(n)
    truth = np.array([0.0, 1.5, 2.0, 2.0, 1.8])
    covered = 0
    for _ in range(300):
        rows = truth + 0.35 * rng.normal(size=(n, 5)) + 0.3 * rng.normal(size=(n, 1))
        found = bootstrap(rows.tolist(), _range)
        covered += found.low <= 2.0 <= found.high
    assert covered >= 0.92 * 300


def test_a_pooled_deviation_is_that_of_an_analysis_of_variance() -> None:
    samples = [[1.0, 2.0, 4.0], [10.0, 10.0, 13.0], [0.0, 5.0, 5.0]]
    deviation, freedom = pooled_deviation(samples)
    assert freedom == 6
    between = 3 * np.var([np.mean(sample) for sample in samples], ddof=1)
    assert between / deviation**2 == pytest.approx(stats.f_oneway(*samples).statistic)
