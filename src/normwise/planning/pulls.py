"""What decays each parameter of a model now, and where that leads: the data behind an audit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from normwise.decay.copying import attached
from normwise.decay.rules import L2, Rule
from normwise.planning.optimizer_probe import decay_coupling, step_grows_with_gradient
from normwise.planning.parameters import parameter_aliases, role_of
from normwise.planning.treatment import Cause, Treatment, Verdict
from normwise.theory import equilibrium_rotation

__all__ = ["AuditedParameter", "Pull", "audited_parameters", "pulls_of"]

# from torch 2.7 on AdamW is an Adam
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


@dataclass(frozen=True)
class Pull:
    """One thing that decays a parameter.

    Attributes:
        source: "weight_decay" (of the optimizer), or the name of a rule and its coefficient.
        coefficient: λ of ``weight_decay``; None for a rule.
        coupling: "coupled" (through the gradient), "decoupled", or "unknown" (it cannot be measured).
        divided: Whether the optimizer divides the coupled decay by the size of the gradient, as Adam does.
        rotation: The angle by which a scale-invariant unit turns per step at equilibrium, in radians; None
            where it depends on the gradient or no formula applies.
        settling: The number of steps until equilibrium, about 1/(lr·λ); None where rotation is.
    """

    source: str
    coefficient: float | None
    coupling: str
    divided: bool = False
    rotation: float | None = None
    settling: float | None = None

    def __str__(self) -> str:
        return (
            self.source
            if self.coefficient is None
            else (f"{self.source} {self.coefficient:g}, {self.coupling}")
        )


@dataclass(frozen=True)
class AuditedParameter:
    """What happens to one parameter of a model.

    Attributes:
        name: The first of the parameter's names.
        numel: The number of values.
        role: "weight", "bias", "gain" or "vector".
        pulls: What decays it.
        in_optimizer: Whether the optimizer holds it.
        trainable: Whether it gets gradients. The optimizer neither steps nor decays other parameters.
        treatment: The treatment that a plan gives it; None if the audit had neither batches nor a plan.
    """

    name: str
    numel: int
    role: str
    pulls: tuple[Pull, ...]
    in_optimizer: bool
    trainable: bool
    treatment: Treatment | None = None

    @property
    def stepped(self) -> bool:
        """Whether the optimizer steps it."""
        return self.in_optimizer and self.trainable

    @property
    def verdict(self) -> Verdict | None:
        """The verdict of the plan, if there is one."""
        return None if self.treatment is None else self.treatment.verdict

    @property
    def against(self) -> tuple[str, ...]:
        """The parameters that balance this one, according to the plan."""
        return () if self.treatment is None else self.treatment.against

    @property
    def without_effect(self) -> bool:
        """Whether the plan says that any values of the parameter give the same outputs."""
        return self.treatment is not None and self.treatment.cause == Cause.NO_EFFECT

    @property
    def is_what(self) -> str:
        """The parameter in a word or two."""
        if self.without_effect:
            return "no effect"
        if self.role != "weight" or self.verdict in (None, Verdict.NONE):
            return self.role
        return {Verdict.SHRINK: "invariant", Verdict.BALANCE: "balanced"}.get(self.verdict, "no symmetry")

    @property
    def decayed_by(self) -> str:
        """What decays the parameter, in words."""
        if not self.trainable:
            return "frozen"
        if not self.in_optimizer:
            return "not in the optimizer"
        return " and ".join(map(str, self.pulls)) or "–"

    @property
    def effect(self) -> str:
        """What the decay, or its absence, does."""
        if not self.stepped:
            return "–"
        if self.without_effect:
            return "changes nothing"
        if self.role == "weight" and self.verdict == Verdict.SHRINK:
            return self._effect_on_invariant()
        if not self.pulls:
            return "–"
        if self.role != "weight":
            return "pulls its values to zero"
        return {
            Verdict.BALANCE: "balances, regularises the product",
            Verdict.PLAIN_L2: "regularises",
            None: "?: give batches to find out",
        }.get(self.verdict, "undetermined")

    def _effect_on_invariant(self) -> str:
        if not self.pulls:
            return "only grows: effective learning rate falls"
        angles = [pull.rotation for pull in self.pulls if pull.rotation]
        settles = f": {math.degrees(angles[0]):.2g}° a step" if len(angles) == 1 else ""
        return f"effective learning rate only{settles}"


def audited_parameters(
    model: nn.Module, optimizer: Optimizer, treatments: dict[str, Treatment]
) -> list[AuditedParameter]:
    """Return what happens to each parameter of ``model``, tied ones once.

    Args:
        model: The model.
        optimizer: The model's optimizer.
        treatments: {name: treatment} of a plan for the model, or nothing.
    """
    named = dict(model.named_parameters())
    pulls = pulls_of(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    audited = []
    for name in parameter_aliases(model):
        parameter = named[name]
        in_optimizer = id(parameter) in held
        stale_gradient = in_optimizer and parameter.grad is not None
        trainable = parameter.requires_grad or stale_gradient
        acting = pulls.get(id(parameter), ()) if trainable else ()
        audited.append(
            AuditedParameter(
                name=name,
                numel=parameter.numel(),
                role=role_of(model, name, parameter),
                pulls=tuple(dict.fromkeys(acting)),
                in_optimizer=in_optimizer,
                trainable=trainable,
                treatment=treatments.get(name),
            )
        )
    return audited


def pulls_of(optimizer: Optimizer) -> dict[int, list[Pull]]:
    """Return {id of a parameter: what decays it}, for every parameter that something decays."""
    pulls: dict[int, list[Pull]] = {}
    for k, group in enumerate(optimizer.param_groups):
        coefficient = float(group.get("weight_decay", 0) or 0)
        if coefficient > 0:
            pull = _pull_of_group(optimizer, k, coefficient)
            for parameter in group["params"]:
                pulls.setdefault(id(parameter), []).append(pull)
    groups = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for decay in attached(optimizer):
        coupling = "coupled" if decay.mode == "coupled" else "decoupled"
        rate = decay.rule.constant_rate
        for parameter in (p for unit in decay.units for p in unit.params):
            angle, steps = None, None
            if rate and decay.clock == "lr" and id(parameter) in groups:
                angle, steps = _equilibrium(optimizer, groups[id(parameter)], rate, decay.mode)
            pull = Pull(_name_of(decay.rule), None, coupling, rotation=angle, settling=steps)
            pulls.setdefault(id(parameter), []).append(pull)
    return pulls


def _name_of(rule: Rule) -> str:
    settings = rule.settings()
    coefficient = settings.get("coefficient")
    return f"{settings['name']} {coefficient:.3g}" if isinstance(coefficient, float) else settings["name"]


def _pull_of_group(optimizer: Optimizer, k: int, coefficient: float) -> Pull:
    coupling = decay_coupling(optimizer, k) or "unknown"
    divided = coupling == "coupled" and step_grows_with_gradient(optimizer, k) is False
    angle, steps = None, None
    if coupling != "unknown" and not divided:
        mode = "explicit" if coupling == "decoupled" else "coupled"
        angle, steps = _equilibrium(optimizer, k, coefficient, mode)
    return Pull("weight_decay", coefficient, coupling, divided, angle, steps)


def _equilibrium(
    optimizer: Optimizer, k: int, coefficient: float, mode: str
) -> tuple[float | None, float | None]:
    """Return the rotation at equilibrium under L2, and the number of steps until then."""
    group = optimizer.param_groups[k]
    lr = max(float(group.get("lr") or 0.0), float(group.get("initial_lr") or 0.0))
    if lr <= 0:
        return None, None
    if isinstance(optimizer, torch.optim.SGD) and not group["dampening"]:
        degree, momentum = 2, float(group["momentum"])
    elif isinstance(optimizer, _ADAMS) and mode != "coupled":
        degree, momentum = 1, float(group["betas"][0])
    else:
        return None, None
    try:  # γ cancels for L2: any positive number gives the same angle
        angle = equilibrium_rotation(L2(coefficient), lr, 1.0, momentum, mode, degree)
    except ValueError:  # lr·λ ≥ 1: no equilibrium
        return None, None
    coupled_speedup = 1 - momentum if mode == "coupled" and degree == 2 else 1.0
    return float(angle), coupled_speedup / (lr * coefficient)
