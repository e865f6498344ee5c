"""The decay rules that claims compare, with matched coefficients.

Every coefficient follows from the Σlr of the run; none is tuned. The reference is AWS with
``AdaptiveWeightShrink.for_budget``. The other rules have the same pull at a reference norm
(``normwise.theory.match``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import normwise as nw
from normwise.lab.runs.base import ImageRun, OptimizerRun, rule_from

__all__ = [
    "ARMS",
    "AWS",
    "EPSILON",
    "EXPLICIT_AWS",
    "L2",
    "NONE",
    "SPHERE",
    "STARTED",
    "from_equilibrium",
    "reference_norm",
    "scaled",
    "times",
    "with_arm",
]

S = TypeVar("S", bound=ImageRun)
R = TypeVar("R", bound=OptimizerRun)

NONE = "no decay"
L2 = "L2"
EPSILON = "ε-shifted L2"
EXPLICIT_AWS = "AWS, explicit"
AWS = "AWS"
SPHERE = "sphere"
STARTED = "AWS from equilibrium"
ARMS = (NONE, L2, EPSILON, SPHERE, EXPLICIT_AWS, AWS)


def with_arm(settings: S, arm: str) -> S:
    """Return the same run with the rule of this arm.

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


def from_equilibrium(settings: R, rule: type[nw.Rule] = nw.AdaptiveWeightShrink, strength: float = 3.0) -> R:
    """Return the same run under AWS or L2 with nothing tuned, started in equilibrium (``normwise.attach``).

    The rule's coefficient names no choice: ``normwise.attach`` sets the rate and the initial norms.
    """
    named = settings.with_rule(rule(strength / settings.total_time))  # type: ignore[call-arg]
    return replace(named, start="equilibrium", strength=strength)


def reference_norm(settings: ImageRun) -> float:
    """Return the norm at which all arms have the same pull.

    For SGD it is 1, the norm of a unit. Adam moves every element by about the learning rate, so for Adam it
    is the RMS that an undecayed weight reaches from zero, √Σlr²; the run must then have ``measure="rms"``.
    """
    if getattr(settings, "optimizer", "sgd") != "adam":
        return 1.0
    return float(settings.total_squares**0.5)


def scaled(settings: S, scale: float) -> S:
    """Return the same run with this initial norm of every unit."""
    return replace(settings, init_scale=float(scale))


def times(settings: R, multiple: float) -> R:
    """Return the same run with a multiple of the rule's coefficient."""
    rule = rule_from(settings.rule)
    assert rule is not None
    return settings.with_rule(replace(rule, coefficient=rule.coefficient * multiple))  # type: ignore[type-var, attr-defined]
