"""Predictions of what decay does to scale-invariant weights, each tested against simulation.

docs/theory.md derives the formulas and states the limits of each.
"""

from __future__ import annotations

from normwise.theory.equilibrium import effective_lr, equilibrium_norm, equilibrium_rotation
from normwise.theory.equivalence import UndecayedSteps, without_decay
from normwise.theory.matching import match

__all__ = [
    "UndecayedSteps",
    "effective_lr",
    "equilibrium_norm",
    "equilibrium_rotation",
    "match",
    "without_decay",
]
