"""The public names of normwise, each imported from the module that defines it.

``import normwise`` does not import this module; the first use of a public name does.
"""

from __future__ import annotations

from normwise import theory
from normwise.decay.decay import Decay
from normwise.decay.rules import L2, AdaptiveWeightShrink, EpsilonShiftedL2, PowerShrink, Rule, Sphere
from normwise.decay.weight_rules import PublishedEpsilonShift, RotatingSphere
from normwise.invariance import Invariances, find_invariances
from normwise.monitor import trackers
from normwise.monitor.monitor import Monitor
from normwise.normalization import functional
from normwise.normalization.checkpoints import upgrade_state_dict
from normwise.normalization.convert import convert
from normwise.normalization.fold import fold
from normwise.normalization.parametrizations import centered_weight_norm, weight_norm, weight_standardization
from normwise.planning.attach import attach
from normwise.planning.audit import Audit, audit
from normwise.planning.plan import Plan, plan
from normwise.units import Unit

# modules of normwise.integrations: nw.lightning and so on; each needs its library, so none is in __all__
INTEGRATIONS = ("accelerate", "lightning", "transformers")

__all__ = [
    "L2",
    "AdaptiveWeightShrink",
    "Audit",
    "Decay",
    "EpsilonShiftedL2",
    "Invariances",
    "Monitor",
    "Plan",
    "PowerShrink",
    "PublishedEpsilonShift",
    "RotatingSphere",
    "Rule",
    "Sphere",
    "Unit",
    "attach",
    "audit",
    "centered_weight_norm",
    "convert",
    "find_invariances",
    "fold",
    "functional",
    "plan",
    "theory",
    "trackers",
    "upgrade_state_dict",
    "weight_norm",
    "weight_standardization",
]
