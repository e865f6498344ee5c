"""What a Monitor predicts is where a training settles: norms and rotations, for every kind of decay."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from tests.monitor.common import Kept
from torch import nn
from torch.optim import SGD, AdamW

import normwise as nw

CASES: dict[str, tuple[Any, dict[str, Any], Any, float]] = {
    "L2": (SGD, {"lr": 0.1}, (nw.L2(0.1), {}), 0.1),
    "AWS": (SGD, {"lr": 0.1}, (nw.AdaptiveWeightShrink(0.1), {}), 0.1),
    "AWS, momentum": (SGD, {"lr": 0.05, "momentum": 0.5}, (nw.AdaptiveWeightShrink(0.1), {}), 0.1),
    "every 4": (SGD, {"lr": 0.1}, (nw.L2(0.1), {"every": 4}), 0.1),
    "explicit": (SGD, {"lr": 0.1}, (nw.PowerShrink(0.1, 2.0), {"mode": "explicit"}), 0.1),
    "coupled": (SGD, {"lr": 0.05, "momentum": 0.5}, (nw.L2(0.1), {"mode": "coupled"}), 0.1),
    "clock": (SGD, {"lr": 0.1}, (nw.L2(0.01), {"clock": "step"}), 0.1),
    "rms": (SGD, {"lr": 0.1}, (nw.AdaptiveWeightShrink(1.0), {"measure": "rms"}), 0.1),
    "relative": (SGD, {"lr": 0.1}, (nw.AdaptiveWeightShrink(0.1), {"measure": "relative"}), 0.1),
    "weight_decay": (SGD, {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}, None, 0.1),
    "AdamW": (AdamW, {"lr": 0.02, "betas": (0.5, 0.99), "weight_decay": 0.3}, None, 0.15),
    "AdamW, AWS": (
        AdamW,
        {"lr": 0.02, "betas": (0.5, 0.99), "weight_decay": 0.0},
        (nw.AdaptiveWeightShrink(1.0), {"measure": "rms"}),
        0.15,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.one_in(3)
def test_a_training_settles_where_the_monitor_says(case: str) -> None:
    """Gradients of a scale-invariant loss that do not correlate: across w, and of norm γ/‖w‖."""
    kind, settings, decay, tolerance = CASES[case]
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 64, generator=generator, dtype=torch.float64) / 8)
    optimizer = kind([weight], **settings)
    if decay is not None:
        nw.Decay(optimizer, decay[0], weight, **decay[1])
    tracker = Kept()
    nw.Monitor(optimizer, units=[weight], every=10, trackers=tracker)
    for _ in range(480):
        direction = nn.functional.normalize(weight.detach(), dim=1)
        g = torch.randn(8, 64, generator=generator, dtype=torch.float64) / 8
        g -= (g * direction).sum(1, keepdim=True) * direction
        weight.grad = g / weight.detach().norm(dim=1, keepdim=True)
        optimizer.step()
    settled = [values for step, values in tracker.rows if step > 250]
    (name,) = {name.rpartition("/")[2] for name in settled[0] if "/rotation/" in name}

    def mean(quantity: str) -> float:
        return statistics.fmean(values[f"normwise/{quantity}/{name}"] for values in settled)

    assert mean("norm") == pytest.approx(mean("equilibrium_norm"), rel=tolerance)
    assert mean("rotation") == pytest.approx(mean("equilibrium_rotation"), rel=tolerance)
    if kind is SGD:
        assert mean("rotation_predicted") == pytest.approx(mean("rotation"), rel=tolerance)
