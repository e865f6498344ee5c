"""What decay does to scale-invariant weights: predictions, each tested against simulation.

docs/theory.md has the derivations and the limits of each formula.
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
