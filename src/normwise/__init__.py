"""normwise: weight decay for normalised networks.

Most weights of a modern network are followed by a normalisation, so only their direction matters.
Weight decay on them does not regularise: it sets the effective learning rate. normwise says which
weights these are, decays them by rules that are functions of their norm, and predicts what follows.

Names are imported on first use, so that ``import normwise`` (and the command line's ``--help``) does
not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normwise import theory as theory
    from normwise.decay.decay import Decay as Decay
    from normwise.decay.rules import L2 as L2
    from normwise.decay.rules import AdaptiveWeightShrink as AdaptiveWeightShrink
    from normwise.decay.rules import EpsilonShiftedL2 as EpsilonShiftedL2
    from normwise.decay.rules import PowerShrink as PowerShrink
    from normwise.decay.rules import Rule as Rule
    from normwise.decay.rules import Sphere as Sphere
    from normwise.invariance.find import find_invariances as find_invariances
    from normwise.invariance.result import Invariances as Invariances
    from normwise.normalization import functional as functional
    from normwise.normalization.checkpoints import upgrade_state_dict as upgrade_state_dict
    from normwise.normalization.convert import convert as convert
    from normwise.normalization.fold import fold as fold
    from normwise.normalization.parametrizations import centered_weight_norm as centered_weight_norm
    from normwise.normalization.parametrizations import weight_norm as weight_norm
    from normwise.normalization.parametrizations import weight_standardization as weight_standardization
    from normwise.planning.audit import Audit as Audit
    from normwise.planning.audit import audit as audit
    from normwise.planning.plan import Plan as Plan
    from normwise.planning.plan import plan as plan
    from normwise.units import Unit as Unit

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveWeightShrink": "normwise.decay.rules",
    "Audit": "normwise.planning.audit",
    "Decay": "normwise.decay.decay",
    "EpsilonShiftedL2": "normwise.decay.rules",
    "Invariances": "normwise.invariance.result",
    "L2": "normwise.decay.rules",
    "Plan": "normwise.planning.plan",
    "PowerShrink": "normwise.decay.rules",
    "Rule": "normwise.decay.rules",
    "Sphere": "normwise.decay.rules",
    "Unit": "normwise.units",
    "audit": "normwise.planning.audit",
    "centered_weight_norm": "normwise.normalization.parametrizations",
    "convert": "normwise.normalization.convert",
    "find_invariances": "normwise.invariance.find",
    "fold": "normwise.normalization.fold",
    "plan": "normwise.planning.plan",
    "upgrade_state_dict": "normwise.normalization.checkpoints",
    "weight_norm": "normwise.normalization.parametrizations",
    "weight_standardization": "normwise.normalization.parametrizations",
}
_MODULES = {
    "functional": "normwise.normalization.functional",
    "theory": "normwise.theory",
}

__all__ = ["__version__", *sorted([*_HOMES, *_MODULES])]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'normwise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
