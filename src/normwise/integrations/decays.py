"""A Decay as plain values, so that a checkpoint can hold all that is needed to attach the same one again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay.copying import OPTIONS
from normwise.decay.decay import Decay
from normwise.decay.rules import RULES, Rule
from normwise.units import Unit

__all__ = ["described", "rebuilt"]


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
        "options": {name: getattr(decay, name) for name in OPTIONS},
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
    decay = Decay(optimizer, _rule(recipe["rule"], rule), units, **recipe["options"])
    decay._notes += recipe["notes"]
    return decay


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
