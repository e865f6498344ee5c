from __future__ import annotations

import pytest
from tests.lab.small import text, training

from normwise.lab.engine.forecast import Forecast


def test_the_time_left_is_learned_for_each_class_of_runs() -> None:
    images, texts = ([make(seed=seed) for seed in range(200)] for make in (training, text))
    forecast = Forecast()
    forecast.begin([*images, *texts])
    assert forecast.seconds == pytest.approx(sum(run.cost for run in (*images, *texts)))
    for run in images[:100]:
        forecast.finish(run, 30 * run.cost)  # a slow machine
    for run in texts[:100]:
        forecast.finish(run, run.cost)
    left = sum(30 * run.cost for run in images[100:]) + sum(run.cost for run in texts[100:])
    assert forecast.seconds == pytest.approx(left, rel=0.3)


def test_the_time_left_covers_runs_that_are_not_known_yet() -> None:
    run = training()
    forecast = Forecast(later=1000.0)
    forecast.begin([run])
    assert forecast.seconds == pytest.approx(1000.0 + run.cost)
    forecast.finish(run, run.cost)
    assert forecast.seconds == pytest.approx(1000.0)
    forecast.later = 0.0  # the second lot begins
    forecast.begin([training(seed=1)])
    assert forecast.seconds == pytest.approx(run.cost)
