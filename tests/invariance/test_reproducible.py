"""A tiny gradient is told from rounding errors: nudged values hardly change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwise.invariance.scale_gradients import ScaleGradients, UnitSums
from normwise.invariance.verdicts import EpsPasses, Thresholds

THRESHOLDS = Thresholds.of(torch.float64)


def passes(changes: list[float], units: int) -> list[ScaleGradients]:
    """Return two passes: one parameter has a large gradient, one has 1e-17, changed by these fractions."""
    rows = []
    for number, change in enumerate(changes):
        tiny = 1e-17 * (2 + number) * (1 + change)
        row = ScaleGradients(np.array([1.0, tiny]), np.array([1.0, tiny**2]), np.ones(2, dtype=bool))
        if units:
            sums = np.full(units, tiny / units)
            row.units[1, 0] = UnitSums(sums, sums**2)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("units", "change", "is_real"),
    [(0, 0.001, True), (0, 0.02, False), (8, 0.001, True), (8, 0.02, True), (8, 0.2, False)],
)
def test_few_sums_must_agree_better_than_many(units: int, change: float, is_real: bool) -> None:
    unchanged = passes([0.0, 0.0], units)
    nudged = passes([change, -change], units)
    found = EpsPasses(shrunk=unchanged, real=unchanged, paired=unchanged, nudged=nudged).visible(THRESHOLDS)
    assert found.tolist() == [True, is_real]
