"""What a Decay accepts: its arguments, its parameters, and a state to continue from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay import copying
from normwise.decay.clock import CLOCKS
from normwise.decay.rules import EpsilonShiftedL2, Rule, Sphere
from normwise.units import Unit, needs_reduction

__all__ = [
    "MEASURES",
    "MODES",
    "POLICIES",
    "check_options",
    "check_parts",
    "check_settings",
    "check_state",
    "check_units",
    "group_of",
    "name_of",
    "parameters_of",
]

MODES = ("flow", "explicit", "coupled")
MEASURES = ("norm", "rms")
POLICIES = ("skip", "warn", "raise")


def check_settings(optimizer: Optimizer, rule: Rule, mode: str, clock: str, measure: str) -> None:
    """Raise an error that names the first setting that is not known or does not go with another."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"{type(optimizer).__name__} with overlap_with_ddp=True takes its step inside the backward pass, "
            "where no decay can follow it: leave overlap_with_ddp out"
        )
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule such as AdaptiveWeightShrink(0.01), not {rule!r}")
    for name, value, allowed in (
        ("mode", mode, MODES),
        ("clock", clock, CLOCKS),
        ("measure", measure, MEASURES),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not known: choose from {', '.join(map(repr, allowed))}")
    if mode == "coupled" and clock != "lr":
        raise ValueError(
            f'clock={clock!r} has no meaning with mode="coupled", which adds to the gradient and has no '
            'time of its own: use mode="flow" or "explicit", or leave clock out'
        )
    if mode not in rule.modes:
        fitting = " or ".join(map(repr, rule.modes))
        raise ValueError(f"mode={mode!r} cannot apply {rule}: use mode={fitting}, or another rule")
    if mode != "flow" and isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"mode={mode!r} does not go with LBFGS, which evaluates its closure many times in one step: "
            'use mode="flow"'
        )


def check_options(
    rule: Rule, mode: str, measure: str, compensated: bool, nonfinite: str, check_every: int
) -> None:
    """Raise an error that names the first option that is not allowed or does not go with a setting."""
    if nonfinite not in POLICIES:
        raise ValueError(
            f"nonfinite={nonfinite!r} is not known: choose from {', '.join(map(repr, POLICIES))}"
        )
    if isinstance(check_every, bool) or not isinstance(check_every, int) or check_every < 1:
        raise ValueError(f"check_every={check_every!r} is not allowed: give a number of steps, 1 or more")
    if not isinstance(compensated, bool):
        raise TypeError(f"compensated must be True or False, not {compensated!r}")
    if compensated and (mode == "coupled" or (isinstance(rule, Sphere) and rule.rotate)):
        raise ValueError(
            f"compensated=True does not go with mode={mode!r} and {rule}, where decay is not a factor of its "
            'own: use mode="flow" and another rule, or leave compensated out'
        )
    if isinstance(rule, EpsilonShiftedL2) and rule.form == "std" and measure != "norm":
        raise ValueError(f'measure={measure!r} has no meaning with form="std": leave measure out')


def check_units(
    optimizer: Optimizer, rule: Rule, params: Tensor | Unit | Iterable[Tensor | Unit], dim: int | None
) -> tuple[Unit, ...]:
    """Return the Units to decay; raise where one is unknown to the optimizer or under a rule already."""
    given = [params] if isinstance(params, (Tensor, Unit)) else list(params)
    if not given:
        raise ValueError("params is empty: give at least one parameter of the optimizer")
    groups = group_of(optimizer)
    units: list[Unit] = []
    for one in given:
        if not isinstance(one, (Tensor, Unit)):
            raise TypeError(f"params must be parameters or Units, not {type(one).__name__}")
        for param in one.params if isinstance(one, Unit) else (one,):
            if id(param) not in groups:
                raise ValueError(
                    f"params holds a tensor of shape {tuple(param.shape)} that is not in the optimizer: "
                    "add it to a param_group first, or leave it out"
                )
            if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"{name_of(optimizer, param)} was flattened by FullyShardedDataParallel (FSDP1), which "
                    "leaves no rows or columns: use fully_shard (FSDP2)"
                )
        units.append(one if isinstance(one, Unit) else Unit(one, dim))
    taken = [(unit, other.rule) for other in copying.attached(optimizer) for unit in other.units]
    for unit in units:
        for other, its_rule in taken:
            if unit.overlaps(other):
                shared = next(p for p in unit.params if any(p is q for q in other.params))
                raise ValueError(
                    f"{name_of(optimizer, shared)} is under {its_rule} already and would be decayed twice: "
                    "name it once, remove() the other Decay, or give Units with masks that do not overlap"
                )
        taken.append((unit, rule))
    _warn_of_weight_decay(optimizer, units, groups)
    return tuple(units)


def _warn_of_weight_decay(optimizer: Optimizer, units: list[Unit], groups: dict[int, int]) -> None:
    for k in sorted({groups[id(param)] for unit in units for param in unit.params}):
        own = optimizer.param_groups[k].get("weight_decay", 0)
        if own:
            warnings.warn(
                f"param_groups[{k}] of {type(optimizer).__name__} has weight_decay={own}, so its parameters "
                "are decayed twice, by the optimizer and by this rule: set weight_decay=0 in that group",
                stacklevel=4,
            )


def check_parts(
    optimizer: Optimizer,
    rule: Rule,
    compensated: bool,
    units: Sequence[Unit],
    parts: Sequence[tuple[Unit, ...]],
) -> None:
    """Raise where units of sharded parameters lie on several ranks and a setting needs them whole."""
    moment = isinstance(rule, EpsilonShiftedL2) and rule.form == "std"
    turns = isinstance(rule, Sphere) and rule.rotate
    for unit, its in zip(units, parts, strict=True):
        if needs_reduction(its[0]) and (moment or turns or compensated):
            what = "compensated=True" if compensated else str(rule)
            raise ValueError(
                f"{name_of(optimizer, unit.params[0])}: {what} needs whole units on one rank, and its "
                f"sharding splits those along dim={unit.dim}: shard along that dim (fully_shard's "
                "shard_placement_fn), or use another rule or setting"
            )


def parameters_of(optimizer: object) -> list[Tensor]:
    """Return all parameters of an optimizer; none of what is no optimizer."""
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []
    return [param for group in groups for param in group["params"]]


def group_of(optimizer: Optimizer) -> dict[int, int]:
    """Map the id of each parameter to the index of its group, as the optimizer holds them now."""
    return {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}


def name_of(optimizer: Optimizer, param: Tensor) -> str:
    """Name a parameter for an error, as the optimizer knows it."""
    for k, group in enumerate(optimizer.param_groups):
        for j, candidate in enumerate(group["params"]):
            if candidate is param:
                named = group.get("param_names")
                where = repr(named[j]) if named else f"param_groups[{k}]['params'][{j}]"
                return f"parameter {where} of shape {tuple(param.shape)}"
    return f"a parameter of shape {tuple(param.shape)}"


def check_state(theirs: Any, own: dict[str, Any], groups: int) -> None:
    """Raise an error that names the first difference between a state_dict and what this Decay is."""
    if not isinstance(theirs, dict) or set(theirs) != set(own):
        raise ValueError(f"state_dict is not one of a Decay: it needs the keys {', '.join(own)}")
    for key in ("format", "rule", "mode", "clock", "measure", "compensated"):
        if theirs[key] != own[key]:
            raise ValueError(
                f"state_dict was made with {key}={_spoken(theirs[key])}, and this Decay has "
                f"{key}={_spoken(own[key])}: construct it as it was, or start without the old state"
            )
    if len(theirs["units"]) != len(own["units"]):
        raise ValueError(
            f"state_dict has {len(theirs['units'])} units, and this Decay has {len(own['units'])}: "
            "construct it with the same parameters"
        )
    for k, (their, mine) in enumerate(zip(theirs["units"], own["units"], strict=True)):
        for key in mine:
            if their[key] != mine[key]:
                raise ValueError(
                    f"unit {k} of the state_dict has {key}={their[key]}, and of this Decay "
                    f"{key}={mine[key]}: construct it with the same units"
                )
    if len(theirs["max_lr"]) > groups:
        raise ValueError(
            f"state_dict has the peak rates of {len(theirs['max_lr'])} param_groups, and the optimizer has "
            f"{groups}: add its groups before loading"
        )


def _spoken(value: Any) -> str:
    if isinstance(value, dict):
        arguments = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "name")
        return f"{value.get('name')}({arguments})"
    return repr(value)
