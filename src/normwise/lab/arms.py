"""The decay rules under comparison, with coefficients matched as design and paper ask.

Every coefficient follows from the budget Σlr of the run, and none is tuned. The reference is AWS with
``AdaptiveWeightShrink.for_budget``; the others have its pull at norm 1 (``normwise.theory.match``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import normwise as nw
from normwise.lab.settings import ImageSettings

__all__ = ["ARMS", "AWS", "EPSILON", "EXPLICIT_AWS", "L2", "NONE", "scaled", "with_arm"]

S = TypeVar("S", bound=ImageSettings)

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
        >>> from normwise.lab.settings import TrainSettings
        >>> run = TrainSettings(data="digits", fingerprint="", train_size=1400, image_size=8)
        >>> with_arm(run, "AWS").rule["coefficient"] * run.total_time
        3.0
    """
    aws = nw.AdaptiveWeightShrink.for_budget(settings.total_time)
    if arm == NONE:
        return settings.with_rule(None)
    if arm == AWS:
        return settings.with_rule(aws)
    if arm == EXPLICIT_AWS:
        return settings.with_rule(aws, mode="explicit")
    if arm == L2:
        return settings.with_rule(nw.theory.match(aws, nw.L2))
    if arm == EPSILON:
        return settings.with_rule(nw.theory.match(aws, nw.EpsilonShiftedL2))
    if arm == SPHERE:
        return settings.with_rule(nw.Sphere(1.0))
    raise ValueError(f"arm {arm!r} is not known: choose from {', '.join(ARMS)}")


def scaled(settings: S, scale: float) -> S:
    """Return the same run from units of this norm."""
    return replace(settings, init_scale=float(scale))
