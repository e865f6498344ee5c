"""Which parameters a step concerns: those that have a gradient, and what this rank holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.checks import group_of, name_of
from normwise.units import LocalUnit, Unit, global_norms, local_values, needs_reduction

if TYPE_CHECKING:
    from normwise.decay.compensation import Compensation

__all__ = [
    "Live",
    "batches",
    "check_gradients",
    "live_parameters",
    "magnitudes",
    "magnitudes_of",
    "summed_norms",
]


class Live(NamedTuple):
    """A parameter that has a gradient in this step."""

    which: int  # the index of its Unit
    place: int  # its index in the Unit
    unit: Unit  # of a sharded parameter the part on this rank
    param: Tensor  # of a sharded parameter the part on this rank
    group: int
    owner: Tensor  # the parameter as the optimizer knows it


def live_parameters(optimizer: Optimizer, units: Sequence[tuple[Unit, ...]]) -> list[Live]:
    """Return the parameters of these units that have a gradient, with their groups as they are now.

    Args:
        optimizer: The optimizer.
        units: Each Unit as :func:`normwise.units.local_units` returned it.

    Raises:
        RuntimeError: A parameter is no longer in the optimizer.
    """
    groups = group_of(optimizer)
    live = []
    for which, parts in enumerate(units):
        for place, unit in enumerate(parts):
            if isinstance(unit, LocalUnit):
                unit.refresh()
                param = unit.whole.params[place]
            else:
                param = unit.params[place]
            if id(param) not in groups:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} that this Decay was attached to is no longer "
                    "in the optimizer (was it replaced, as fully_shard does?): remove() this Decay and "
                    "construct it anew"
                )
            if param.grad is not None:
                live.append(Live(which, place, unit, unit.params[place], groups[id(param)], param))
    return live


def check_gradients(optimizer: Optimizer) -> None:
    """Raise if no parameter of an optimizer has a gradient while several processes train together.

    Raises:
        RuntimeError: So it is; most likely the optimizer holds parameters that are not those of the model any
            more.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if any(param.grad is not None for param in params):
            return
        raise RuntimeError(
            f"{name_of(optimizer, params[0])} and all others of {type(optimizer).__name__} have no gradient "
            "in the first step: if fully_shard or parallelize_module has replaced the model's parameters, "
            "construct the optimizer, and then the Decay, after it"
        )


def summed_norms(units: Sequence[tuple[Unit, ...]]) -> dict[int, Tensor]:
    """Return the norms of the Units that lie on several ranks, by index: all in one reduction.

    Not only of those that have a gradient, so that all ranks communicate alike.
    """
    summed = [which for which, parts in enumerate(units) if needs_reduction(parts[0])]
    return dict(zip(summed, global_norms([units[which] for which in summed]), strict=True))


def magnitudes(norms: Tensor, unit: Unit, measure: str) -> Tensor:
    """Return what a rule sees of a unit with these norms: n, or n/√numel."""
    return norms / unit.numel**0.5 if measure == "rms" else norms


def magnitudes_of(
    live: Sequence[Live],
    units: Sequence[tuple[Unit, ...]],
    measure: str,
    compensation: Compensation | None = None,
    summed: dict[int, Tensor] | None = None,
) -> list[Tensor]:
    """Return for each parameter the magnitudes of those units of it that this rank holds a part of.

    Args:
        live: The parameters.
        units: All Units of the Decay, as :func:`normwise.units.local_units` returned them.
        measure: The magnitude that the rule sees.
        compensation: What knows the norms that are meant, or None.
        summed: What :func:`summed_norms` has returned already, or None.
    """
    summed = summed_norms(units) if summed is None else summed
    norms: dict[int, Tensor] = {}
    seen = []
    for one in live:
        if one.which in summed:
            own = local_values(one.unit, summed[one.which])
        else:
            if one.which not in norms:  # once for all parameters of a joint unit
                norms[one.which] = one.unit.norms() if compensation is None else compensation.norms(one.which)
            own = norms[one.which]
        seen.append(magnitudes(own, one.unit, measure))
    return seen


def batches(live: list[Live], measure: str) -> list[list[Live]]:
    """Sort parameters into batches for which a rule can be evaluated at once.

    A batch is of one group, device, type, dim and (with ``measure="rms"``) size of units, and its norms need
    what lies on other ranks, or do not.
    """
    sorted_by: dict[object, list[Live]] = {}
    for one in live:
        param, unit = one.param, one.unit
        size = unit.numel if measure == "rms" else None
        key = (one.group, param.device, param.dtype, unit.dim, size, needs_reduction(unit))
        sorted_by.setdefault(key, []).append(one)
    return list(sorted_by.values())
