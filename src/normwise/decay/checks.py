"""What a Decay accepts: arguments and parameters."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from normwise.decay import copying
from normwise.decay.clock import CLOCKS, check_rate
from normwise.decay.modes import Mode, Schedule
from normwise.decay.nonfinite import POLICIES
from normwise.decay.riding import with_hook_tables
from normwise.decay.rules import MODES, Rule
from normwise.decay.targets import Targets, group_of, name_of
from normwise.norms import check_tensor, of_shape, overlap
from normwise.sharding import local_tensor
from normwise.units import Unit, needs_reduction

__all__ = [
    "MEASURES",
    "check_options",
    "check_rates",
    "check_settings",
    "check_units",
    "check_whole_units",
    "parameters_of",
    "warn_of_bypassed_steps",
    "watch_weight_decay",
]

MEASURES = ("norm", "rms", "relative")


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
    if not dataclasses.is_dataclass(rule):
        raise TypeError(
            f"{type(rule).__name__} is not a dataclass: put @dataclass(frozen=True) above the class"
        )
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
    if mode != "flow" and isinstance(optimizer, LBFGS):
        raise ValueError(
            f"mode={mode!r} does not go with LBFGS, which evaluates its closure many times in one step: "
            'use mode="flow"'
        )


def check_options(
    rule: Rule, mode: str, kind: type[Mode], measure: str, compensated: bool, schedule: Schedule
) -> None:
    """Raise an error that names the first option that is not allowed or does not go with a setting.

    Args:
        rule: The rule.
        mode: The mode by name.
        kind: The class that applies the rule in this mode.
        measure: As for Decay.
        compensated: As for Decay.
        schedule: As for Decay.
    """
    if schedule.nonfinite not in POLICIES:
        raise ValueError(
            f"nonfinite={schedule.nonfinite!r} is not known: choose from {', '.join(map(repr, POLICIES))}"
        )
    for name, steps in (("every", schedule.every), ("check_every", schedule.check_every)):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name}={steps!r} is not allowed: give a number of steps, 1 or more")
    if not isinstance(compensated, bool):
        raise TypeError(f"compensated must be True or False, not {compensated!r}")
    if compensated and not kind.scales:
        raise ValueError(
            f"compensated=True does not go with mode={mode!r} and {rule}, where decay is not a factor of the "
            'weight: use mode="flow" and another rule, or leave compensated out'
        )
    if measure == "relative" and rule.needs_initial_norms:
        raise ValueError(
            f'measure="relative" does not go with {rule}, which refers to the initial norms itself: give '
            "radius=1.0, or leave measure out"
        )
    if measure != "norm" and not kind.reads_measure:
        raise ValueError(f"measure={measure!r} has no meaning with {type(rule).__name__}: leave measure out")
    if schedule.every == 1:
        return
    if mode != "flow":
        raise ValueError(
            f"every={schedule.every} does not go with mode={mode!r}, which acts on every gradient step: use "
            'mode="flow", or every=1'
        )
    if not kind.scales:
        raise ValueError(
            f"every={schedule.every} does not go with {rule}, which changes the update of every step: use "
            "every=1, or another rule"
        )
    if rule.scheduled:
        raise ValueError(
            f"every={schedule.every} does not go with a coefficient that is a function of the step, as one "
            "application covers steps with different coefficients: use every=1, or give a number and "
            "schedule the learning rate"
        )


def check_units(
    optimizer: Optimizer, rule: Rule, given: Sequence[Tensor | Unit], dim: int | None
) -> tuple[Unit, ...]:
    """Return the Units to decay; raise where a parameter is not in the optimizer or under a rule already."""
    if not given:
        raise ValueError("params is empty: give at least one parameter of the optimizer")
    groups = group_of(optimizer)
    units: list[Unit] = []
    for item in given:
        if not isinstance(item, (Tensor, Unit)):
            raise TypeError(f"params must be parameters or Units, not {type(item).__name__}")
        for param in item.params if isinstance(item, Unit) else (item,):
            check_tensor(param, name_of(optimizer, param))
            if id(param) not in groups:
                raise ValueError(
                    f"params holds a tensor{of_shape(param)} that is not in the optimizer: "
                    "add it to a param_group first, or leave it out"
                )
            if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"{name_of(optimizer, param)} was flattened by FullyShardedDataParallel (FSDP1), which "
                    "leaves no rows or columns: use fully_shard (FSDP2)"
                )
        units.append(item if isinstance(item, Unit) else Unit(item, dim))
    taken = [(unit, other.rule) for other in copying.attached(optimizer) for unit in other.units]
    for unit in units:
        for other, present in taken:
            if unit.overlaps(other):
                shared = next(p for p in unit.params if any(p is q for q in other.params))
                raise ValueError(
                    f"{name_of(optimizer, shared)} is under {present} already and would be decayed twice: "
                    "name it once, remove() the other Decay, or give Units with masks that do not overlap"
                )
        taken.append((unit, rule))
    _check_memory(optimizer, [unit for unit, _ in taken])
    _warn_of_weight_decay(optimizer, units)
    return tuple(units)


def check_rates(optimizer: Optimizer, units: Sequence[Unit], mode: str, clock: str) -> None:
    """Raise if the clock needs the learning rate of a group that has none.

    Raises:
        ValueError: As said; some optimizers (Adafactor of transformers) choose the rate in their step.
    """
    if mode == "coupled" or clock == "step":
        return
    groups = group_of(optimizer)
    for k in sorted({groups[id(param)] for unit in units for param in unit.params}):
        check_rate(optimizer, k, clock)


def _check_memory(optimizer: Optimizer, units: list[Unit]) -> None:
    """Raise if two parameters share elements in memory, which would be decayed twice."""
    params = {id(param): param for unit in units for param in unit.params}
    by_memory: dict[object, list[Tensor]] = {}
    for param in params.values():
        local = local_tensor(param)
        if local.numel() and local.device.type != "meta":
            by_memory.setdefault(local.untyped_storage()._cdata, []).append(param)
    for some in by_memory.values():
        for first, second in itertools.combinations(some, 2):
            if overlap(local_tensor(first), local_tensor(second)):
                raise ValueError(
                    f"{name_of(optimizer, second)} shares memory with {name_of(optimizer, first)}, and would "
                    "be decayed twice: leave one of them out, or give it memory of its own "
                    "(param.data = param.data.clone())"
                )


def _groups_with_weight_decay(optimizer: Optimizer, units: Sequence[Unit]) -> dict[int, float]:
    """Return {index of a group: its weight_decay} for groups with parameters of these units."""
    groups = group_of(optimizer)
    indices = {groups[id(p)] for unit in units for p in unit.params if id(p) in groups}
    decays = {k: optimizer.param_groups[k].get("weight_decay", 0) for k in sorted(indices)}
    return {k: decay for k, decay in decays.items() if decay}


def _warn_of_weight_decay(optimizer: Optimizer, units: Sequence[Unit]) -> None:
    for k, decay in _groups_with_weight_decay(optimizer, units).items():
        warnings.warn(
            f"param_groups[{k}] of {type(optimizer).__name__} has weight_decay={decay}, so its "
            "parameters are decayed twice, by the optimizer and by this rule: set weight_decay=0 in that "
            "group",
            stacklevel=4,
        )


def watch_weight_decay(optimizer: Optimizer, units: Sequence[Unit]) -> list[Any]:
    """Warn when a state that is loaded brings weight_decay back to the parameters of these units.

    Returns:
        Handles that end this.
    """
    present: dict[int, float] = {}

    def before(*_: object) -> None:
        present.update(_groups_with_weight_decay(optimizer, units))

    def after(*_: object) -> None:
        for k, decay in _groups_with_weight_decay(optimizer, units).items():
            if k not in present:
                warnings.warn(
                    f"the state that was loaded sets weight_decay={decay} in param_groups[{k}] of "
                    f"{type(optimizer).__name__}, whose parameters are under a rule and would be decayed "
                    f"twice: set optimizer.param_groups[{k}]['weight_decay'] = 0 after loading",
                    stacklevel=4,
                )
        present.clear()

    with_hook_tables(optimizer)
    return [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after),
    ]


def warn_of_bypassed_steps(optimizer: Optimizer) -> None:
    """Warn if an optimizer is used by other methods than ``step()``, which call no hooks."""
    base = getattr(optimizer, "base_optimizer", None)
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        name = type(optimizer).__name__
        remedy = "attach to optimizer.base_optimizer" if isinstance(base, Optimizer) else "use step(closure)"
        warnings.warn(
            f"a loop of {name}.first_step() and {name}.second_step() never calls {name}.step(), so nothing "
            f"would be decayed: {remedy}",
            stacklevel=3,
        )


def check_whole_units(targets: Targets, rule: Rule, kind: type[Mode], compensated: bool) -> None:
    """Raise where units of sharded parameters lie on several ranks and a setting needs whole units."""
    for unit, parts in zip(targets.units, targets.local, strict=True):
        if needs_reduction(parts[0]) and (kind.needs_whole_units or compensated):
            what = "compensated=True" if compensated else str(rule)
            raise ValueError(
                f"{targets.name(unit.params[0])}: {what} needs whole units on one rank, and its sharding "
                f"splits those along dim={unit.dim}: shard along that dim (fully_shard's "
                "shard_placement_fn), or use another rule or setting"
            )


def parameters_of(optimizer: object) -> list[Tensor]:
    """Return all parameters of an optimizer; none of what is no optimizer."""
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []
    return [param for group in groups for param in group["params"]]
