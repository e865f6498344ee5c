"""Which parameters a step concerns: those that have a gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.checks import group_of
from normwise.units import Unit

__all__ = ["Live", "batches", "live_parameters", "magnitudes"]


class Live(NamedTuple):
    """A parameter that has a gradient in this step."""

    which: int  # the index of its Unit
    place: int  # its index in the Unit
    unit: Unit
    param: Tensor
    group: int


def live_parameters(optimizer: Optimizer, units: tuple[Unit, ...]) -> list[Live]:
    """Return the parameters of these units that have a gradient, with their groups as they are now.

    Raises:
        RuntimeError: A parameter is no longer in the optimizer.
    """
    groups = group_of(optimizer)
    live = []
    for which, unit in enumerate(units):
        for place, param in enumerate(unit.params):
            if id(param) not in groups:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} that this Decay was attached to is no longer "
                    "in the optimizer (was it replaced, as fully_shard does?): remove() this Decay and "
                    "construct it anew"
                )
            if param.grad is not None:
                live.append(Live(which, place, unit, param, groups[id(param)]))
    return live


def magnitudes(norms: Tensor, unit: Unit, measure: str) -> Tensor:
    """Return what a rule sees of a unit with these norms: n, or n/√numel."""
    return norms / unit.numel**0.5 if measure == "rms" else norms


def batches(live: list[Live], measure: str) -> list[list[Live]]:
    """Sort parameters into batches for which a rule can be evaluated at once.

    A batch is of one group, device, type, dim and (with ``measure="rms"``) size of units.
    """
    sorted_by: dict[object, list[Live]] = {}
    for one in live:
        param, unit = one.param, one.unit
        size = unit.numel if measure == "rms" else None
        sorted_by.setdefault((one.group, param.device, param.dtype, unit.dim, size), []).append(one)
    return list(sorted_by.values())
