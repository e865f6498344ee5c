"""The decay rules under comparison, with coefficients matched as design and paper ask.

Every coefficient follows from the budget Σlr of the run, and none is tuned. The reference is AWS with
``AdaptiveWeightShrink.for_budget``; the others have its pull at one norm (``normwise.theory.match``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import normwise as nw
from normwise.lab.runs.base import ImageRun

__all__ = [
    "ARMS",
    "AWS",
    "EPSILON",
    "EXPLICIT_AWS",
    "L2",
    "NONE",
    "SPHERE",
    "reference_norm",
    "scaled",
    "with_arm",
]

S = TypeVar("S", bound=ImageRun)

NONE = "no decay"
L2 = "L2"
EPSILON = "ε-shifted L2"
EXPLICIT_AWS = "AWS, explicit"
AWS = "AWS"
SPHERE = "sphere"
ARMS = (NONE, L2, EPSILON, SPHERE, EXPLICIT_AWS, AWS)


def with_arm(settings: S, arm: str) -> S:
    """Return the same run under the rule of this arm.

    Example:
        >>> from normwise.lab.runs.train import TrainRun
        >>> run = TrainRun(data="digits", fingerprint="", train_size=1400, image_size=8)
        >>> with_arm(run, "AWS").rule["coefficient"] * run.total_time
        3.0
    """
    norm = reference_norm(settings)
    aws = nw.AdaptiveWeightShrink.for_budget(settings.total_time, norm=norm)
    if arm == NONE:
        return settings.with_rule(None)
    if arm == AWS:
        return settings.with_rule(aws)
    if arm == EXPLICIT_AWS:
        return settings.with_rule(aws, mode="explicit")
    if arm == L2:
        return settings.with_rule(nw.theory.match(aws, nw.L2, norm=norm))
    if arm == EPSILON:
        return settings.with_rule(nw.theory.match(aws, nw.EpsilonShiftedL2, norm=norm))
    if arm == SPHERE:
        return settings.with_rule(nw.Sphere(norm))
    raise ValueError(f"arm {arm!r} is not known: choose from {', '.join(ARMS)}")


def reference_norm(settings: ImageRun) -> float:
    """Return the norm at which the arms have the same pull.

    Under SGD 1, the norm of a unit. Under Adam, which moves every element by about the learning rate, the RMS
    that an undecayed weight reaches from zero, √Σlr²; the run must then have ``measure="rms"``.
    """
    if getattr(settings, "optimizer", "sgd") != "adam":
        return 1.0
    return float(settings.total_squares**0.5)


def scaled(settings: S, scale: float) -> S:
    """Return the same run from units of this norm."""
    return replace(settings, init_scale=float(scale))
