"""A Decay as plain values, so that a checkpoint can hold all that is needed to attach the same one again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay.copying import OPTIONS
from normwise.decay.decay import Decay
from normwise.decay.rules import RULES, Rule
from normwise.decay.start import JointGroup, Start, running_statistics
from normwise.units import Unit

__all__ = ["described", "rebuilt"]

_MEASURED = ("readings", "bounded")  # of a Start, in the first steps: part of the state of its Decay


def described(decay: Decay, model: nn.Module) -> dict[str, Any]:
    """Return the rule, units and options of a Decay; parameters by their names in ``model``."""
    names = {id(param): name for name, param in model.named_parameters()}
    return {
        "rule": decay.rule.settings(),
        "units": [
            {
                "params": [names[id(param)] for param in unit.params],
                "dim": unit.dim,
                "mask": None if unit.mask is None else unit.mask.tolist(),
            }
            for unit in decay.units
        ],
        "options": {name: getattr(decay, name) for name in OPTIONS if name != "start"},
        "start": None if decay.start is None else _described_start(decay.start, names),
        "notes": list(decay._notes),
    }


def rebuilt(recipe: Mapping[str, Any], optimizer: Optimizer, model: nn.Module, rule: Rule | None) -> Decay:
    """Attach a Decay like the one that :func:`described` has seen. Its state is loaded later.

    Args:
        recipe: What :func:`described` returned.
        optimizer: The optimizer.
        model: The model.
        rule: The rule, if the user gave one; it must have the same settings.

    Raises:
        ValueError: The model lacks a parameter, or the rule is another one.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    missing = [name for unit in recipe["units"] for name in unit["params"] if name not in named]
    if missing:
        raise ValueError(
            f"the checkpoint decays {missing[0]!r}, which the model does not have: build it as it was"
        )
    units = [
        Unit(
            [named[name] for name in unit["params"]],
            unit["dim"],
            None if unit["mask"] is None else torch.tensor(unit["mask"], dtype=torch.bool),
        )
        for unit in recipe["units"]
    ]
    start = None if recipe["start"] is None else _rebuilt_start(recipe["start"], named, model)
    decay = Decay(optimizer, _rule(recipe["rule"], rule), units, **recipe["options"], start=start)
    decay._notes += recipe["notes"]
    return decay


def _described_start(start: Start, names: Mapping[int, str]) -> dict[str, Any]:
    fields = {f.name: getattr(start, f.name) for f in dataclasses.fields(start) if f.name not in _MEASURED}
    # Groups across optimizers are placed in the first step. Before it, those weights stay as they are.
    across = {k for group in start.joint if group.elsewhere for k in group.units}
    fields["norms"] = [None if k in across else norm for k, norm in enumerate(start.norms)]
    fields["statistics"] = bool(start.statistics)  # those of the model
    joint: list[dict[str, Any]] = [
        {"units": dict(group.units), "others": [[names[id(p)], float(e)] for p, e in group.others]}
        for group in start.joint
        if not group.elsewhere
    ]
    return {name: joint if name == "joint" else _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def _rebuilt_start(saved: Mapping[str, Any], named: Mapping[str, Tensor], model: nn.Module) -> Start:
    joint = [
        JointGroup(group["units"], [(named[name], exponent) for name, exponent in group["others"]])
        for group in saved["joint"]
    ]
    statistics = running_statistics(model) if saved["statistics"] else []
    rigid = frozenset(saved["rigid"])
    return Start(**{**saved, "joint": joint, "rigid": rigid, "statistics": statistics})


def _rule(settings: Mapping[str, Any], given: Rule | None) -> Rule:
    if given is not None:
        if given.settings() != settings:
            raise ValueError(
                f"the checkpoint was made with the rule {dict(settings)}, and this is {given}: give the same"
            )
        return given
    arguments = dict(settings)
    name = arguments.pop("name")
    kinds = {kind.__name__: kind for kind in RULES}
    if name not in kinds or "scheduled" in arguments.values():
        raise ValueError(f"the checkpoint was made with a rule {name}: give it as rule=")
    return kinds[name](**arguments)
