"""Two published methods that act on weights and are not functions of the norm, for faithful comparison.

Each is a rule, with the class that says what it does before and after a step. A rank must hold whole units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.decay.modes import Coupled, Flow
from normwise.decay.rules import EpsilonShiftedL2, Rule, Sphere
from normwise.decay.targets import ActiveParam
from normwise.sharding import local_tensor
from normwise.units import Unit

__all__ = ["WEIGHT_RULES", "PublishedEpsilonShift", "RotatingSphere"]


class _PublishedPull(Coupled):
    """Adds λ((1 − ε/s)(w − m) + m) to the gradient, with the unbiased deviation s and mean m of each unit."""

    needs_whole_units = True
    reads_measure = False

    def pull(self, rule: Rule, entry: ActiveParam, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        unit = entry.unit
        wide = [param.to(torch.promote_types(param.dtype, torch.float32)) for param in unit.params]
        mean = torch.stack([_sums(param, unit) for param in wide]).sum(0) / unit.numel
        centered = [param - unit.broadcast(mean, param) for param in wide]
        deviation = Unit(centered, unit.dim).norms() / max(1, unit.numel - 1) ** 0.5
        pulled = centered[entry.place]
        rates = rule.rate(deviation).to(pulled)  # infinite where the deviation is almost 0
        pulled.mul_(unit.broadcast(torch.where(rates.isfinite(), rates, torch.zeros_like(rates)), pulled))
        pulled.add_(unit.broadcast(rule.strength * mean, pulled))
        return pulled, torch.ones_like(magnitudes)


@dataclass(frozen=True)
class PublishedEpsilonShift(EpsilonShiftedL2):
    r"""The ε-shift as its authors' training code has it: the optimizer sees ∇ + λ((1 − ε/s)(w − m) + m).

    In place of the norm of a unit stands its unbiased standard deviation s, and its mean m is decayed by
    plain L2. This turns w, so it is not a function of the norm; only ``mode="coupled"`` applies it. As a
    function of s, :meth:`rate`, :meth:`flow` and :meth:`penalty` are those of
    :class:`~normwise.decay.rules.EpsilonShiftedL2`. Source: the code of Li, Chen & Yang, arXiv 1911.05920.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        epsilon: ε, the standard deviation at rest, zero or positive.
    """

    function_of_norm = False
    modes = ("coupled",)
    applied_by = {"coupled": _PublishedPull}  # noqa: RUF012


class _Rotation(Flow):
    """Copies the weights before the step, and turns them towards where the step has moved them."""

    needs_whole_units = True
    scales = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._before: dict[int, Tensor] = {}

    def before_step(self, step: int) -> None:
        # all parameters, as a closure may give gradients to those that have none yet
        params = [param for unit in self.targets.units for param in unit.params]
        self._before = {id(param): local_tensor(param).detach().clone() for param in params}

    def apply(self, rule: Rule, active: list[ActiveParam], times: list[float | Tensor]) -> None:
        found_inf = self.targets.found_inf
        for entry, time in zip(active, times, strict=True):
            unit, owners = entry.unit, self.targets.units[entry.which].params
            if entry.place != len(owners) - 1 or any(param.grad is None for param in owners):
                continue  # a joint unit turns as a whole, when its last tensor is reached, or not at all
            before = [self._before[id(param)] for param in owners]
            (magnitudes,) = self.targets.magnitudes([entry])
            size = unit.numel**0.5 if self.targets.measure == "rms" else 1.0
            radii = self.targets.bind(rule, [entry]).flow(magnitudes, time) * size
            for param, value in zip(unit.params, rotated(unit, before, radii, time), strict=True):
                if unit.mask is not None:
                    value = torch.where(unit.broadcast(unit.mask, param), value, param)
                if found_inf is not None:
                    value = torch.where(found_inf.to(param.device) > 0, param, value)
                param.copy_(value)
        self._before = {}


@dataclass(frozen=True)
class RotatingSphere(Sphere):
    """A sphere on which every unit turns by the same angle in a step: t radians for a step of time t.

    With ``clock="lr"`` the angle is the learning rate. The unit turns towards the tangential part of the
    optimizer's update, so the optimizer gives a direction only; a unit whose update has no tangential part
    does not turn. Costs a copy of the parameters. Sources: Kosson et al., "Rotational Equilibrium", arXiv
    2305.17212, section 5 (rotational variants, which hold the average angle); Wen et al., "Hyperball
    Optimization", arXiv 2606.16899 (updates of norm ηR, whole matrices: ``dim=None``; the angle there is η up
    to the part of the update along w).

    Args:
        radius: The norm, positive. None: the norm that each unit had when the rule was attached.
    """

    function_of_norm = False
    applied_by = {"flow": _Rotation}  # noqa: RUF012


def rotated(unit: Unit, before: list[Tensor], norms: Tensor, angle: float | Tensor) -> list[Tensor]:
    """Return the tensors of a Unit turned by an angle towards where a step has moved them.

    With ŵ the direction before the step and û⊥ that of the tangential part of the update, the unit becomes
    n·(cos(angle)·ŵ + sin(angle)·û⊥).

    Args:
        unit: The unit, after the step.
        before: The tensors as they were before the step; they are overwritten.
        norms: n, the norm that each unit is given, of shape (count,).
        angle: In radians.

    Returns:
        Tensors of the shapes and types of ``before``. A unit whose update has no tangential part beyond
        rounding keeps its direction; one that had no direction is left as the step made it.

    Example:
        >>> before, after = torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 0.5]])
        >>> rotated(Unit(after), [before], torch.tensor([2.0]), torch.pi / 6)
        [tensor([[1.7321, 1.0000]])]
    """
    lengths = Unit(before, unit.dim).norms()
    rays, tangents, along = [], [], torch.zeros_like(lengths)
    for param, start in zip(unit.params, before, strict=True):
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        update = param.detach() - start
        ray = start.div_(unit.broadcast(lengths.masked_fill(~(lengths > 0), 1.0).to(start), start))
        along += _sums(ray * update, unit)
        rays.append(ray)
        tangents.append(update)
    steps = Unit(tangents, unit.dim).norms()
    for ray, tangent in zip(rays, tangents, strict=True):
        tangent.addcmul_(ray, unit.broadcast(along.to(ray), ray), value=-1)
    arcs = Unit(tangents, unit.dim).norms()
    rounding = 4 * max(torch.finfo(param.dtype).eps for param in unit.params)
    turns = arcs > rounding * torch.maximum(lengths, steps)  # what is shorter has no direction to trust
    full = angle.to(arcs).expand_as(arcs) if isinstance(angle, Tensor) else torch.full_like(arcs, angle)
    cosine, sine = full.cos().masked_fill(~turns, 1.0), full.sin().masked_fill(~turns, 0.0)
    types = [torch.finfo(param.dtype) for param in unit.params]
    smallest, largest = max(t.tiny for t in types) * unit.numel**0.5, min(t.max for t in types)
    is_representable = (norms >= smallest) & (norms <= largest)
    had_direction = (lengths > 0) & lengths.isfinite() & arcs.isfinite() & is_representable
    results = []
    for param, ray, tangent in zip(unit.params, rays, tangents, strict=True):
        ray.mul_(unit.broadcast((norms * cosine).to(ray), ray))
        ray.addcmul_(tangent, unit.broadcast((norms * sine / arcs.masked_fill(~turns, 1.0)).to(ray), ray))
        results.append(torch.where(unit.broadcast(had_direction, ray), ray.to(param.dtype), param.detach()))
    return results


def _sums(values: Tensor, unit: Unit) -> Tensor:
    reduced = [k for k in range(values.ndim) if k != unit.dim]
    return (values.sum(reduced) if reduced else values).reshape(-1)


WEIGHT_RULES: tuple[type[Rule], ...] = (PublishedEpsilonShift, RotatingSphere)
