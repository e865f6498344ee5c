"""What an optimizer knows of the rules attached to it, and how both are copied together.

``copy.deepcopy`` and ``pickle`` of an optimizer keep its state but drop its hooks, so a copied optimizer
would silently train without decay. Therefore an optimizer with a rule attached carries a ``__reduce_ex__``
of its own, which rebuilds the rules beside the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from normwise.units import Unit

if TYPE_CHECKING:
    from normwise.decay.decay import Decay

__all__ = ["attached", "reduce_decay", "register", "unregister"]

_LIST, _REDUCE = "_normwise_decays", "__reduce_ex__"


def attached(optimizer: Optimizer) -> list[Decay]:
    """Return the rules at work beside this optimizer, in the order in which they were attached."""
    return list(vars(optimizer).get(_LIST, ()))


def register(optimizer: Optimizer, decay: Decay) -> None:
    """Note that ``decay`` works beside ``optimizer``."""
    vars(optimizer).setdefault(_LIST, []).append(decay)

    def reduce_ex(protocol: Any) -> Any:
        return _reduce_optimizer(optimizer, protocol)

    vars(optimizer)[_REDUCE] = reduce_ex


def unregister(optimizer: Optimizer, decay: Decay) -> None:
    """Forget ``decay``; the last one takes every trace with it."""
    remaining = [other for other in attached(optimizer) if other is not decay]
    if remaining:
        vars(optimizer)[_LIST] = remaining
    else:
        vars(optimizer).pop(_LIST, None)
        vars(optimizer).pop(_REDUCE, None)


def reduce_decay(decay: Decay) -> Any:
    """Copy a Decay as a part of its optimizer: the copy is the one that the copied optimizer calls."""
    decays = attached(decay.optimizer)
    if decay not in decays:
        raise RuntimeError(
            "this Decay was removed from its optimizer and cannot be copied: construct a new one"
        )
    return _nth, (decay.optimizer, decays.index(decay))


def _nth(optimizer: Optimizer, index: int) -> Decay:
    return attached(optimizer)[index]


def _reduce_optimizer(optimizer: Optimizer, protocol: Any) -> Any:
    plain: Any = type(optimizer).__reduce_ex__(optimizer, protocol)
    construct, arguments, state = plain[0], plain[1], plain[2] if len(plain) > 2 else None
    decays = [_specification(decay) for decay in attached(optimizer)]
    return _rebuild, (construct, arguments, state, decays)


def _specification(decay: Decay) -> tuple[Any, ...]:
    units = [(unit.params, unit.dim, unit.mask) for unit in decay.units]
    names = ("mode", "clock", "measure", "compensated", "nonfinite", "check_every")
    return decay.rule, units, {name: getattr(decay, name) for name in names}, decay.state_dict()


def _rebuild(
    construct: Callable[..., Optimizer],
    arguments: tuple[Any, ...],
    state: Any,
    decays: list[tuple[Any, list[tuple[tuple[Tensor, ...], int | None, Tensor | None]], dict[str, Any], Any]],
) -> Optimizer:
    from normwise.decay.decay import Decay

    optimizer = construct(*arguments)
    if isinstance(state, dict):
        # a subclass whose __getstate__ returns its whole __dict__ must not pass on the original's notes
        state = {key: value for key, value in state.items() if key not in (_LIST, _REDUCE)}
    if state is not None:
        optimizer.__setstate__(state)
    for rule, units, settings, saved in decays:
        made = [Unit(params, dim, mask) for params, dim, mask in units]
        Decay(optimizer, rule, made, **settings).load_state_dict(saved)
    return optimizer
