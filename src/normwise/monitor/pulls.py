"""What decays a layer in the present step, and where that leads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.copying import attached
from normwise.decay.decay import Decay
from normwise.decay.rules import L2, Rule
from normwise.decay.scaling import flow_factors
from normwise.planning.optimizer_probe import decay_coupling, step_grows_with_gradient
from normwise.theory import equilibrium_norm, equilibrium_rotation
from normwise.units import Unit

__all__ = ["Group", "Groups", "LayerPull", "equilibria", "pulls_on"]


@dataclass
class Group:
    """How one param_group steps and decays.

    Attributes:
        degree: 2 where steps grow with the gradient, 1 where they do not, None where that is not known.
        momentum: μ of SGD, or β₁.
        coupling: How weight_decay acts: "coupled", "decoupled" or None.
    """

    degree: int | None
    momentum: float
    coupling: str | None


@dataclass
class Groups:
    """How the param_groups of an optimizer step, measured once for each setting."""

    optimizer: Optimizer
    known: dict[Any, Group] = field(default_factory=dict)

    def of(self, index: int) -> Group:
        """Return how the group with this index steps, with its present settings."""
        settings = self.optimizer.param_groups[index]
        changing = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "name", "lr_scale")
        key = repr([(k, v) for k, v in settings.items() if k not in changing])
        if key not in self.known:
            grows = step_grows_with_gradient(self.optimizer, index)
            self.known[key] = Group(
                degree=None if grows is None else 2 if grows else 1,
                momentum=_momentum(settings),
                coupling=decay_coupling(self.optimizer, index) if settings.get("weight_decay") else None,
            )
        return self.known[key]


def _momentum(settings: dict[str, Any]) -> float:
    if isinstance(settings.get("momentum"), (int, float)):
        return float(settings["momentum"])
    betas = settings.get("betas")
    return float(betas[0]) if isinstance(betas, (tuple, list)) and betas else 0.0


@dataclass(frozen=True)
class LayerPull:
    """One thing that decays a layer in the present step.

    Attributes:
        source: "weight_decay", or the rule.
        rule: The rule, as a function of the magnitude.
        mode: "flow", "explicit" or "coupled".
        time: The time of a step.
        size: The norm at which the rule sees the magnitude 1: a number, or one for each unit.
        known: Whether the theory has an equilibrium for it.
        every: After how many steps it is applied at once.
        exact: Whether decay finer than the precision of the weights is kept.
    """

    source: str
    rule: Rule
    mode: str
    time: float
    size: float | Tensor = 1.0
    known: bool = True
    every: int = 1
    exact: bool = False

    def of(self, select: Callable[[Tensor], Tensor]) -> LayerPull:
        """Return the same for some of the units."""
        return replace(self, size=select(self.size)) if isinstance(self.size, Tensor) else self

    def rates(self, norms: Tensor) -> Tensor:
        """Return by how much of itself each unit shrinks in a step, to first order: t·c(n)."""
        if self.rule.projects:
            return torch.full_like(norms, torch.nan)
        return self.time * self.rule.rate(norms / self._size(norms))

    def factors(self, norms: Tensor) -> Tensor | None:
        """Return what one application multiplies units by; None where that is not a product of its own."""
        if self.mode == "coupled" or self.exact or self.rule.projects:
            return None
        if self.mode == "explicit":
            return 1 - self.rates(norms)
        return flow_factors(self.rule, norms / self._size(norms), self.time * self.every)

    def _size(self, norms: Tensor) -> float | Tensor:
        return self.size.to(norms) if isinstance(self.size, Tensor) else self.size

    def settling(self, lr: float, scale: float, group: Group) -> _Settling | None:
        """Return what decides where a layer settles; None where no formula applies.

        Args:
            lr: The learning rate.
            scale: γ with degree 2, u with degree 1 (:func:`normwise.theory.equilibrium_norm`).
            group: How the parameter's group steps.
        """
        if not self.known or group.degree is None or not (lr > 0 and scale > 0 and self.time > 0):
            return None
        if group.degree == 1 and self.mode == "coupled":
            return None
        rule = self.rule
        size = float(self.size.mean()) if isinstance(self.size, Tensor) else self.size
        if hasattr(rule, "coefficient"):
            if rule.strength <= 0:
                return None
            rule = replace(rule, coefficient=rule.strength * self.time / lr)  # type: ignore[type-var]
        settings = (rule, lr, group.momentum, self.mode, group.degree)
        return _Settling(settings, scale / size**group.degree, size)


class _Settling(NamedTuple):
    """What decides where a layer settles, in magnitudes that the rule sees."""

    settings: tuple[Rule, float, float, str, int]  # rule, lr, momentum, mode, degree
    scale: float
    size: float


def equilibria(layers: Sequence[_Settling | None]) -> list[tuple[float, float] | None]:
    """Return the norm and the rotation per step at equilibrium of each layer; None where there is none.

    Layers with the same settings are solved together.
    """
    found: list[tuple[float, float] | None] = [None] * len(layers)
    alike: dict[Any, list[int]] = {}
    for k, layer in enumerate(layers):
        if layer is not None:
            alike.setdefault(layer.settings, []).append(k)
    for (rule, lr, momentum, mode, degree), members in alike.items():
        scales = torch.tensor([layer.scale for k in members if (layer := layers[k])], dtype=torch.float64)
        arguments: Any = (rule, lr, scales, momentum, mode, degree)
        try:
            norms = equilibrium_norm(*arguments).tolist()
            rotations = equilibrium_rotation(*arguments).tolist()
        except ValueError:  # mode "explicit" without an equilibrium: a step would flip a weight
            if len(members) > 1:
                for k in members:
                    (found[k],) = equilibria([layers[k]])
            continue
        for k, norm, rotation in zip(members, norms, rotations, strict=True):
            layer = layers[k]
            if layer is not None and math.isfinite(norm):
                found[k] = norm * layer.size, rotation
    return found


def pulls_on(unit: Unit, optimizer: Optimizer, index: int, groups: Groups) -> list[LayerPull]:
    """Return what decays the units of a layer, whose group has this index."""
    settings = optimizer.param_groups[index]
    lr = float(settings.get("lr") or 0.0)
    pulls = []
    if weight_decay := float(settings.get("weight_decay") or 0.0):
        coupling = groups.of(index).coupling
        mode = "coupled" if coupling == "coupled" else "explicit"
        pulls.append(
            LayerPull(
                f"weight_decay={weight_decay:g}", L2(weight_decay), mode, lr, known=coupling is not None
            )
        )
    mine = {id(param) for param in unit.params}
    for decay in attached(optimizer):
        for which, other in enumerate(decay.units):
            if any(id(param) in mine for param in other.params):
                pulls.append(_of_decay(decay, which, index, unit))
                break
    return pulls


def _of_decay(decay: Decay, which: int, index: int, unit: Unit) -> LayerPull:
    rule, targets, other = decay.rule.at(decay.steps), decay._targets, decay.units[which]
    if rule.needs_initial_norms:  # a sphere through the norms that the units had
        rule = replace(rule, radius=float(targets.initial[which].mean()))  # type: ignore[type-var]
    size: float | Tensor = other.numel**0.5 if decay.measure == "rms" else 1.0
    if decay.measure == "relative":
        size = targets.initial[which]
        if (other.dim, other.count) != (unit.dim, unit.count):  # the layer is watched in other units
            size = float(size.mean())
    # coupled decay adds to the gradient and has no clock; the others read it as the step did
    lr = float(decay.optimizer.param_groups[index].get("lr") or 0.0)
    time = lr if decay.mode == "coupled" else float(decay._clock.time(decay.optimizer, index))
    known = rule.function_of_norm
    return LayerPull(str(decay.rule), rule, decay.mode, time, size, known, decay.every, decay.compensated)
