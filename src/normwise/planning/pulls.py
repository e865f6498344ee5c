"""What decays each parameter of an optimizer now, and where that leads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.copying import attached
from normwise.decay.rules import L2, Rule
from normwise.planning.twin import decay_coupling, step_grows_with_gradient
from normwise.theory import equilibrium_rotation

__all__ = ["Pull", "pulls_on"]

_ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)  # AdamW is an Adam


@dataclass(frozen=True)
class Pull:
    """One thing that decays a parameter.

    Attributes:
        source: "weight_decay" (of the optimizer), or the name of a rule and its coefficient.
        coefficient: λ of ``weight_decay``; None for a rule.
        coupling: "coupled" (through the gradient), "decoupled", or "unknown" (it cannot be measured).
        divided: Whether the optimizer divides the coupled decay by the size of the gradient, as Adam does.
        rotation: By what angle a scale-invariant unit turns in a step once it has settled, in radians; None
            where the theory gives no number that is free of the gradient.
        settling: After about how many steps it has settled, 1/(lr·λ); None as above.
    """

    source: str
    coefficient: float | None
    coupling: str
    divided: bool = False
    rotation: float | None = None
    settling: float | None = None

    def __str__(self) -> str:
        if self.coefficient is None:
            return self.source
        return f"{self.source} {self.coefficient:g}, {self.coupling}"


def pulls_on(optimizer: Optimizer) -> dict[int, list[Pull]]:
    """Return {id of a parameter: what decays it}, for every parameter that something decays."""
    found: dict[int, list[Pull]] = {}
    for k, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay", 0)
        if decay and float(decay) > 0:
            pull = _of_group(optimizer, k, float(decay))
            for parameter in group["params"]:
                found.setdefault(id(parameter), []).append(pull)
    groups = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for decay in attached(optimizer):
        coupling = "coupled" if decay.mode == "coupled" else "decoupled"
        for unit in decay.units:
            for parameter in unit.params:
                rate = decay.rule.constant_rate if isinstance(decay.rule, L2) else None
                angle, steps = None, None
                if rate and decay.clock == "lr" and id(parameter) in groups:
                    angle, steps = _settled(optimizer, groups[id(parameter)], rate, decay.mode)
                pull = Pull(_spoken(decay.rule), None, coupling, rotation=angle, settling=steps)
                found.setdefault(id(parameter), []).append(pull)
    return found


def _spoken(rule: Rule) -> str:
    settings = rule.settings()
    coefficient = settings.get("coefficient")
    return f"{settings['name']} {coefficient:.3g}" if isinstance(coefficient, float) else settings["name"]


def _of_group(optimizer: Optimizer, k: int, decay: float) -> Pull:
    coupling = decay_coupling(optimizer, k) or "unknown"
    divided = coupling == "coupled" and step_grows_with_gradient(optimizer, k) is False
    angle, steps = None, None
    if coupling != "unknown" and not divided:
        mode = "explicit" if coupling == "decoupled" else "coupled"
        angle, steps = _settled(optimizer, k, decay, mode)
    return Pull("weight_decay", decay, coupling, divided, angle, steps)


def _settled(optimizer: Optimizer, k: int, rate: float, mode: str) -> tuple[float | None, float | None]:
    """Return the rotation at equilibrium under L2, and the steps until then."""
    group = optimizer.param_groups[k]
    lr = max(float(group.get("lr", 0.0)), float(group.get("initial_lr", 0.0)))
    if lr <= 0:
        return None, None
    if isinstance(optimizer, torch.optim.SGD) and not group["dampening"]:
        degree, momentum = 2, float(group["momentum"])
    elif isinstance(optimizer, _ADAMS) and mode != "coupled":
        degree, momentum = 1, float(group["betas"][0])
    else:
        return None, None
    try:  # γ cancels for L2: any positive number gives the same angle
        angle: Tensor = equilibrium_rotation(L2(rate), lr, 1.0, momentum, mode, degree)
    except ValueError:  # lr·λ ≥ 1: no equilibrium
        return None, None
    coupled_speedup = 1 - momentum if mode == "coupled" and degree == 2 else 1.0
    return float(angle), coupled_speedup / (lr * rate)
