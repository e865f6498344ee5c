"""What the theory's functions refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import normwise as nw
from normwise.theory import effective_lr, equilibrium_norm, equilibrium_rotation, without_decay

Call = Callable[[], object]
ONES, L2 = torch.ones(3, 2), nw.L2(0.1)
LRS = [0.1] * 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: effective_lr("a", 1.0), TypeError, "lr must be a real number"),  # type: ignore[arg-type]
        (lambda: effective_lr(True, 1.0), TypeError, "lr must be .* not True"),
        (lambda: effective_lr(0.1, torch.ones(2, dtype=torch.complex64)), TypeError, "norm must be"),
        (lambda: effective_lr(0.1, None), TypeError, "norm must be .* not NoneType"),  # type: ignore[arg-type]
        (
            lambda: effective_lr(-0.1, 1.0),
            ValueError,
            "lr=-0.1 is not allowed: give finite, zero or",
        ),
        (lambda: effective_lr(0.1, 0.0), ValueError, "norm=0 is not allowed: give finite, positive"),
        (lambda: effective_lr(0.1, torch.tensor([1.0, torch.nan])), ValueError, "norm=nan"),
        (lambda: effective_lr(float("inf"), 1.0), ValueError, "lr=inf"),
        (lambda: effective_lr(0.1, 1.0, degree=3), ValueError, "degree=3 .* 2 for SGD, 1 for Adam"),
        (lambda: effective_lr(0.1, 1.0, degree=True), ValueError, "degree=True"),
    ],
)
def test_effective_lr(call: Call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("function", [equilibrium_norm, equilibrium_rotation])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rule": nw.L2}, TypeError, "rule must be a decay rule such as L2"),
        ({"rule": nw.L2(lambda step: 0.1)}, ValueError, r"function of the step: .* rule.at\(step\)"),
        ({"rule": nw.Sphere()}, ValueError, "give radius="),
        ({"rule": nw.PublishedEpsilonShift(0.1)}, ValueError, "not a function of the norm"),
        ({"rule": nw.Sphere(1.0), "mode": "explicit"}, ValueError, "cannot apply Sphere.*give mode='flow'"),
        ({"rule": nw.Sphere(1.0), "mode": "coupled"}, ValueError, "cannot apply Sphere.*give mode='flow'"),
        ({"lr": 0.0}, ValueError, "lr=0 is not allowed"),
        ({"gradient_scale": 0.0}, ValueError, "gradient_scale=0 is not allowed"),
        ({"gradient_scale": "1"}, TypeError, "gradient_scale must be"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0 is not allowed: give a number from 0 to below 1"),
        ({"momentum": float("nan")}, ValueError, "momentum=nan"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a number, not '0.9'"),
        ({"mode": "decoupled"}, ValueError, "mode='decoupled' .* 'flow', 'explicit', 'coupled'"),
        ({"mode": "coupled", "degree": 1}, ValueError, 'mode="coupled" with degree=1 has no theory'),
        ({"degree": 0}, ValueError, "degree=0"),
        ({"rule": nw.L2(20.0), "mode": "explicit"}, ValueError, r"lr·c\(norm\)=2 must stay below 1"),
    ],
)
def test_equilibrium(
    function: Callable[..., object], arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        function(**{"rule": L2, "lr": 0.1, "gradient_scale": 1.0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rule": nw.L2}, TypeError, "rule must be a decay rule"),
        ({"rule": nw.Sphere()}, ValueError, "give radius="),
        ({"rule": nw.RotatingSphere(1.0)}, ValueError, "scales the updates too"),
        ({"rule": nw.PublishedEpsilonShift(0.1)}, ValueError, "not a function of the norm"),
        ({"rule": nw.Sphere(1.0), "mode": "explicit"}, ValueError, "cannot apply Sphere.*give mode='flow'"),
        ({"lrs": [0.1, -0.1, 0.1]}, ValueError, "lrs=-0.1"),
        ({"lrs": ["x"]}, TypeError, "lrs must be .* not list"),
        ({"lrs": [0.1, 0.1]}, ValueError, r"lrs has the shape \(2,\) and norms \(3, 2\): .* the 3 steps"),
        ({"lrs": 0.1}, ValueError, r"lrs has the shape \(\)"),
        ({"norms": 0 * ONES}, ValueError, "norms=0 is not allowed"),
        ({"norms": torch.tensor(1.0)}, ValueError, "norms has no dimension for the steps"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0"),
        ({"mode": "after"}, ValueError, "mode='after'"),
        ({"mode": "coupled", "degree": 1}, ValueError, "degree=1 has no theory"),
        ({"degree": 3}, ValueError, "degree=3"),
        ({"mode": "coupled", "times": LRS}, ValueError, "has no clock"),
        ({"times": [0.1]}, ValueError, r"times has the shape \(1,\)"),
        (
            {"lrs": [0.1, 10.0, 0.1], "mode": "explicit"},
            ValueError,
            "at step 1 the decay of a unit of norm 1 leaves a scale of 0",
        ),
        ({"lrs": [0.1, 0.1, 30.0], "mode": "coupled"}, ValueError, "at step 2 .* flips"),
        ({"lrs": [0.1, 4000.0, 0.1]}, ValueError, "at step 2 the undecayed step size overflows"),
    ],
)
def test_without_decay(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        without_decay(**{"lrs": LRS, "rule": L2, "norms": ONES, **arguments})  # type: ignore[arg-type]
