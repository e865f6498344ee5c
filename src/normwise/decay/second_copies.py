"""Optimizers that keep a second copy of the weights, from which they would undo the decay of the first.

Schedule-free optimizers step one copy (z) and evaluate gradients between it and an average; Lookahead pulls
the weights back to slow ones. Where decay scales a weight it scales the copy alike, so that every
interpolation between the two is scaled. Classes that compute weights anew from something else are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["check_second_copies", "second_copies"]

_KEYS = ("slow_params", "slow_buffer", "slow_buff", "slow_param", "lookahead_params")
_SCHEDULE_FREE = "schedulefree"
# found by decaying a weight without gradients beside each optimizer of the packages that are in use
_REFUSED = {
    "accsgd": "takes the weights from an average that it keeps",
    "adamwschedulefreepaper": "keeps further copies of the weights",
    "adamwschedulefreereference": "keeps further copies of the weights",
    "focus": "pulls the weights to an average that it keeps",
    "ftrl": "computes the weights anew from sums of gradients",
    "hyperballadamw": "sets the norms of the weights itself",
    "madgrad": "computes the weights anew from the initial ones and the sum of the gradients",
    "msamlaprop": "sets back in each step what it has added to the weights",
    "nero": "sets the norms of the weights itself",
    "sfadamw": "keeps a second copy of the weights where it cannot be found",
    "sgdschedulefreereference": "keeps further copies of the weights",
    "srmm": "takes the weights from an average that it keeps",
    "trac": "computes the weights anew from the initial ones and the sum of the steps",
}


def check_second_copies(optimizer: Optimizer, mode: str, *, scales: bool, compensated: bool) -> bool:
    """Return whether the optimizer may keep second copies of weights, which decay must scale too.

    Args:
        optimizer: The optimizer.
        mode: As for Decay.
        scales: Whether the rule acts by scaling the weights.
        compensated: As for Decay.

    Raises:
        ValueError: The optimizer would undo what the rule does to the weights.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") or mode == "coupled":
        return False
    name = kind.__name__.lower()
    if name in _REFUSED:
        raise ValueError(
            f"{kind.__name__} {_REFUSED[name]}, so it undoes what a rule does to them: use another "
            'optimizer, or mode="coupled", which goes through the gradient'
        )
    if (compensated or not scales) and (_SCHEDULE_FREE in name or "lookahead" in name):
        remedy = "leave compensated out" if scales else "use a rule that is a function of the norm"
        raise ValueError(
            f"{kind.__name__} keeps a second copy of the weights, which is only scaled, and not "
            f"{'compensated' if scales else 'turned'}: {remedy}"
        )
    return True


def second_copies(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """Return the copies of a parameter that an optimizer keeps in its state."""
    state = optimizer.state.get(param)
    if not state or not isinstance(state, dict):
        return []
    keys: Sequence[str] = _KEYS
    if _SCHEDULE_FREE in type(optimizer).__name__.lower():
        keys = ("z", *_KEYS)
    copies = [state.get(key) for key in keys]
    return [copy for copy in copies if isinstance(copy, Tensor) and copy.shape == param.shape]
