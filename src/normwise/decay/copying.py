"""What an optimizer knows of the Decays attached to it, and how both are copied together.

``copy.deepcopy`` and ``pickle`` of an optimizer keep its state but drop its hooks, so a copied optimizer
would silently train without decay. Therefore attaching a Decay gives the optimizer instance a
``__reduce_ex__`` that rebuilds the Decays beside the copy. This module knows no class: a Decay is rebuilt
through its type.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normwise.decay import riding
from normwise.units import Unit

__all__ = ["OPTIONS", "attached", "reduce_decay", "register", "unregister"]

_LIST, _REDUCE = "_normwise_decays", "__reduce_ex__"
OPTIONS = ("mode", "clock", "measure", "every", "compensated", "nonfinite", "check_every", "start")


def attached(optimizer: Optimizer) -> list[Any]:
    """Return the Decays attached to this optimizer, in the order in which they were attached."""
    return list(vars(optimizer).get(_LIST, ()))


def register(optimizer: Optimizer, decay: Any) -> None:
    """Record that ``decay`` is attached to ``optimizer``."""
    vars(optimizer).setdefault(_LIST, []).append(decay)

    def reduce_ex(protocol: Any) -> Any:
        return _reduce_optimizer(optimizer, protocol)

    vars(optimizer)[_REDUCE] = reduce_ex


def unregister(optimizer: Optimizer, decay: Any) -> None:
    """Forget ``decay``; forgetting the last Decay leaves no trace on the optimizer."""
    remaining = [other for other in attached(optimizer) if other is not decay]
    if remaining:
        vars(optimizer)[_LIST] = remaining
    else:
        vars(optimizer).pop(_LIST, None)
        vars(optimizer).pop(_REDUCE, None)


def reduce_decay(decay: Any) -> Any:
    """Copy a Decay as a part of its optimizer: the copy is the one that the copied optimizer calls."""
    decays = attached(decay.optimizer)
    if decay not in decays:
        raise RuntimeError(
            "this Decay was removed from its optimizer and cannot be copied: construct a new one"
        )
    return _nth, (decay.optimizer, decays.index(decay))


def _nth(optimizer: Optimizer, index: int) -> Any:
    return attached(optimizer)[index]


def _reduce_optimizer(optimizer: Optimizer, protocol: Any) -> Any:
    plain: Any = type(optimizer).__reduce_ex__(optimizer, protocol)
    construct, arguments, state = plain[0], plain[1], plain[2] if len(plain) > 2 else None
    if isinstance(state, dict):
        state = _without_ours(optimizer, state)
    return _rebuild, (construct, arguments, state, [_recipe(decay) for decay in attached(optimizer)])


def _without_ours(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Take the original's Decays and hooks out of a state that, for some classes, is all of ``__dict__``."""
    ours = {handle.id for decay in attached(optimizer) for handle in decay._handles}
    ours |= riding.handle_ids(optimizer)
    kept = {k: v for k, v in state.items() if not k.startswith("_normwise") and k != _REDUCE}
    for name, hooks in kept.items():
        if isinstance(hooks, OrderedDict) and ours.intersection(hooks):
            kept[name] = OrderedDict((key, hook) for key, hook in hooks.items() if key not in ours)
    return kept


_Units = list[tuple[tuple[Tensor, ...], int | None, Tensor | None]]
_Recipe = tuple[type, Any, _Units, dict[str, Any], Any, list[str]]


def _recipe(decay: Any) -> _Recipe:
    units = [(unit.params, unit.dim, unit.mask) for unit in decay.units]
    options = {name: getattr(decay, name) for name in OPTIONS}
    return type(decay), decay.rule, units, options, decay.state_dict(), list(decay._notes)


def _rebuild(
    construct: Callable[..., Optimizer], arguments: tuple[Any, ...], state: Any, recipes: list[_Recipe]
) -> Optimizer:
    optimizer = construct(*arguments)
    if state is not None:
        optimizer.__setstate__(state)
    for kind, rule, units, options, saved, notes in recipes:
        decay: Any = kind(optimizer, rule, [Unit(*unit) for unit in units], **options)
        decay.load_state_dict(saved)
        decay._notes = notes
    return optimizer
