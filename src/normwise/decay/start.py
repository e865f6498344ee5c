r"""Where a training starts: the norms at which a rule and the optimizer's steps are in balance.

The norm of a scale-invariant weight is free. If a unit is scaled by s and its gradient by 1/s before the
optimizer sees either, the step is exactly the one that the rescaled model would have taken. So the first step
can begin at any norm, and the best one is the norm at which the rule takes away what the steps add:

    n₀ = n₁·√γ   where steps grow with the gradient,      n₀ = n₁   where they do not,

with γ = ‖w‖·‖∇L‖, which does not depend on the scale of w, and n₁ the equilibrium norm for γ = 1
(:func:`normwise.theory.equilibrium_norm`). :mod:`normwise.planning.attach` computes n₁.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normwise.decay.scaling import has_direction, scale_units
from normwise.decay.second_copies import second_copies
from normwise.decay.targets import ActiveParam, Targets
from normwise.norms import wide_dtype
from normwise.sharding import local_tensor, placed_as
from normwise.units import Unit, global_norms, local_units, local_values

__all__ = ["JointGroup", "Start", "running_statistics"]

_MOVED = 0.1  # a placement that scales a unit by more than e^±0.1 outdates running statistics
_REVISED = 0.1  # a unit is placed again where its equilibrium norm turns out to differ by more than e^±0.1


def running_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose running statistics replace those of the batch in evaluation mode."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    ]


def _begin_anew(module: nn.Module) -> None:
    """Set running statistics to those of a new module, if the module is in training mode.

    If the optimizer steps inside the backward pass, this module's own backward pass may still be to come.
    Autograd has saved the running statistics for it and would refuse a change, although the backward pass in
    training mode does not read them. So the change goes through ``data``, which autograd does not watch.
    """
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        buffer = getattr(module, name, None)
        if module.training and isinstance(buffer, Tensor):
            buffer.data.fill_(value)


@dataclass(frozen=True, eq=False)  # compared by identity, as it holds tensors
class JointGroup:
    """Parameters that have one free scale: w_k → α^e_k·w_k for all of them changes no output.

    Attributes:
        units: {index of a Unit of the Decay: exponent}.
        others: Members that no Decay acts on, such as biases, with their exponents.
        elsewhere: Members that another optimizer's Decay acts on: the Unit, its n₁ and its exponent. Steps do
            not grow with the gradient in such a group, so that all n₀ are known before any gradient.
        solved: The logarithm of α under the key "log", once one of the optimizers has needed it. All groups
            of the same members share the dict.
    """

    units: Mapping[int, float]
    others: Sequence[tuple[Tensor, float]] = ()
    elsewhere: Sequence[tuple[Unit, float, float]] = ()
    solved: dict[str, float] = field(default_factory=dict)


@dataclass
class Start:
    """Places the units of a Decay in equilibrium, in the first steps of their optimizer.

    A unit waits until its gradient is there. Units without a direction (zero or not finite) stay as they are.

    Attributes:
        norms: For each Unit of the Decay n₁, the equilibrium norm for γ = 1. None leaves the Unit alone.
        grows_with_gradient: For each Unit, whether the optimizer's steps grow with the gradient, so that n₀
            depends on γ.
        joint: Groups of Units that can only be scaled together.
        rigid: The indices of Units whose slices are invariant in blocks only: one factor for all of them.
        smallest_norms: For each Unit the norm below which it does not shrink, as the eps of norm layers would
            no longer be negligible.
        steps: In how many steps γ is measured, as the geometric mean over the last quarter of the steps so
            far. A unit is placed in the first of them, and again where its equilibrium norm turns out to be
            another. That is needed where gradients are clipped: from a tiny norm the first gradient is huge
            and is clipped, and γ is too small; each placement about halves the error of the logarithm.
        buffers: {name: exponent}: how the optimizer's buffers scale with a unit (momentum: −1).
        reference_factors: For each Unit, the norm to which a Decay with ``measure="relative"`` refers, over
            the norm at which the unit is placed (1 by default).
        statistics: Batch norms whose running statistics begin anew with a placement. They average over
            outputs of the weights at their old norms, which do not fit the placed weights.
        readings: For each Unit the logarithms of γ so far; the part of the state that changes.
        bounded: The indices of Units that ``smallest_norms`` has kept from shrinking further.
    """

    norms: Sequence[float | None]
    grows_with_gradient: Sequence[bool]
    joint: Sequence[JointGroup] = ()
    rigid: frozenset[int] = frozenset()
    smallest_norms: Mapping[int, float] = field(default_factory=dict)
    steps: int = 1
    buffers: Mapping[str, float] = field(default_factory=dict)
    reference_factors: Mapping[int, float] = field(default_factory=dict)
    statistics: Sequence[nn.Module] = ()
    readings: list[list[float]] = field(default_factory=list)
    bounded: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with no measurements."""
        self.readings = self.readings or [[] for _ in self.norms]

    @property
    def waiting(self) -> bool:
        """Whether a unit is still to be placed."""
        return any(map(self._waits, range(len(self.norms))))

    def _waits(self, which: int) -> bool:
        steps = self.steps if self.grows_with_gradient[which] else 1
        return self.norms[which] is not None and len(self.readings[which]) < steps

    def keep_still(self, indices: Iterable[int]) -> None:
        """Leave these Units at their norms."""
        still = set(indices)
        self.norms = [None if which in still else norm for which, norm in enumerate(self.norms)]

    def state(self) -> list[list[float]]:
        """Return what a resumed run needs: the measurements so far of each Unit."""
        return [list(values) for values in self.readings]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Continue from what :meth:`state` returned."""
        self.readings = [list(values) for values in state]

    @torch.no_grad()
    def place(self, targets: Targets) -> None:
        """Measure γ, and scale the units that wait, their gradients and the optimizer's buffers.

        To be called when the gradients of a step are there and the optimizer has not used them.
        """
        found_inf = targets.found_inf
        if found_inf is not None and bool(found_inf):
            return
        ready = self._ready(targets)
        if not ready:
            return
        norms = global_norms([targets.local[which] for which in ready])
        gradients = self._gradient_norms(targets, ready)
        factors: dict[int, Tensor] = {}
        for which, norm, gradient in zip(ready, norms, gradients, strict=True):
            factor = self._factors(which, targets.units[which], norm, gradient)
            if factor is not None:
                factors[which] = factor
        others = self._solve_groups(targets, factors)
        self._scale(targets, factors, others)
        if any(map(_moves, factors.values())):
            for module in self.statistics:
                _begin_anew(module)
        for which, norm in zip(ready, norms, strict=True):
            if which in factors and (self._revised(which) is not None or _moves(factors[which])):
                targets.refer_to(which, norm * factors[which] * self.reference_factors.get(which, 1.0))

    def _ready(self, targets: Targets) -> list[int]:
        """Return the Units that wait and whose gradients are there, all members of a group or none."""
        ready = [
            which
            for which, unit in enumerate(targets.units)
            if self._waits(which) and all(p.grad is not None for p in unit.params)
        ]
        for group in self.joint:
            far = [param for unit, _, _ in group.elsewhere for param in unit.params]
            here = all(which in ready for which in group.units)
            if not here or (not group.solved and any(param.grad is None for param in far)):
                ready = [which for which in ready if which not in group.units]
        return ready

    def _gradient_norms(self, targets: Targets, ready: Sequence[int]) -> list[Tensor]:
        """Return ‖∇L‖ of every unit, without the factor of a GradScaler."""
        parts = []
        for which in ready:
            unit, gradients = targets.units[which], []
            for param in unit.params:
                assert param.grad is not None  # or the Unit would not be ready
                if param.grad.is_sparse:
                    raise ValueError(
                        f"{targets.name(param)} has a sparse gradient, which cannot be rescaled: give "
                        'plan.attach start="as is"'
                    )
                param.grad = placed_as(param, param.grad)
                gradients.append(param.grad)
            parts.append(local_units(Unit(gradients, unit.dim)))
        scale = getattr(targets.optimizer, "grad_scale", None)
        divisor = 1.0 if scale is None else float(scale)
        return [norm / divisor for norm in global_norms(parts)]

    def _factors(self, which: int, unit: Unit, norms: Tensor, gradients: Tensor) -> Tensor | None:
        """Return the factor of each unit, or None where the Unit must wait for another gradient."""
        acting = has_direction(norms)
        if unit.mask is not None:
            acting &= unit.mask.to(acting.device)
        scales = norms * gradients
        alive = scales[acting & has_direction(scales)]
        grows, readings, norm = self.grows_with_gradient[which], self.readings[which], self.norms[which]
        if not bool(acting.any()) or (grows and not alive.numel()):
            return None
        assert norm is not None  # or the Unit would not wait
        readings.append(math.log(float(alive.square().mean().sqrt())) if grows else 0.0)
        revised = self._revised(which)
        if revised is None:
            return torch.ones_like(norms)
        wanted = norm * math.exp(revised / 2)
        factors = wanted / norms
        if which in self.rigid:
            factors = torch.full_like(factors, wanted / float(norms[acting].log().mean().exp()))
        smallest = (self.smallest_norms.get(which, 0.0) / norms).clamp(max=1.0)
        if bool((factors < smallest)[acting].any()):
            self.bounded.add(which)
            factors = torch.maximum(factors, smallest)
        fits = acting & _fits(unit, norms * factors, gradients / factors)
        if (which in self.rigid and bool((acting & ~fits).any())) or not bool(fits.any()):
            return torch.ones_like(factors)
        return torch.where(fits, factors, torch.ones_like(factors))

    def _revised(self, which: int) -> float | None:
        """Return log γ if the last measurement places the Unit, alone or again; else None."""
        readings, placed, revised = self.readings[which], math.inf, False
        for k in range(1, len(readings) + 1):
            later = readings[k - max(1, k // 4) : k]
            mean = sum(later) / len(later)
            revised = abs(mean - placed) / 2 > _REVISED
            placed = mean if revised else placed
        return placed if revised else None

    def _solve_groups(self, targets: Targets, factors: dict[int, Tensor]) -> dict[int, tuple[Tensor, float]]:
        """Replace the factors of grouped Units by powers of one α for each group.

        The α are those that come closest to the factors that the members need, in the mean square of
        logarithms over all elements.

        Returns:
            {id: (parameter, factor)} for the members that are no Units.
        """
        others: dict[int, tuple[Tensor, float]] = {}
        groups = list(self.joint)
        while partial := [g for g in groups if not all(which in factors for which in g.units)]:
            groups = [group for group in groups if group not in partial]
            for which in {which for group in partial for which in group.units}:
                if factors.pop(which, None) is not None:  # waits with the others
                    self.readings[which].pop()
        for group in (group for group in groups if group.elsewhere):
            first = not group.solved
            if first:
                group.solved["log"] = self._log_of_shared_factor(group, targets, factors)
            for which, exponent in group.units.items():
                factors[which] = torch.full_like(factors[which], math.exp(exponent * group.solved["log"]))
            for param, exponent in group.others if first else ():
                others[id(param)] = param, math.exp(exponent * group.solved["log"])
        groups = [group for group in groups if not group.elsewhere]
        if not groups:
            return others
        members = sorted({which for group in groups for which in group.units})
        weights = torch.tensor([targets.units[which].numel for which in members], dtype=torch.float64).sqrt()
        exponents = torch.tensor(
            [[group.units.get(which, 0.0) for group in groups] for which in members], dtype=torch.float64
        )
        wanted = torch.tensor([math.log(float(factors[which])) for which in members], dtype=torch.float64)
        matrix, right = exponents * weights[:, None], (wanted * weights)[:, None]
        logs = torch.linalg.lstsq(matrix, right, driver="gelsd").solution[:, 0]
        for which, log in zip(members, (exponents @ logs).tolist(), strict=True):
            factors[which] = torch.full_like(factors[which], math.exp(log))
        for group, log in zip(groups, logs.tolist(), strict=True):
            for param, exponent in group.others:
                _, present = others.get(id(param), (param, 1.0))
                others[id(param)] = param, present * math.exp(exponent * log)
        return others

    def _log_of_shared_factor(
        self, group: JointGroup, targets: Targets, factors: Mapping[int, Tensor]
    ) -> float:
        """Return the mean over elements of what each member of a group needs, in and out of this Decay."""
        logs = [
            (targets.units[which].numel, math.log(float(factors[which])) / exponent)
            for which, exponent in group.units.items()
        ]
        norms = global_norms([local_units(unit) for unit, _, _ in group.elsewhere])
        for (unit, wanted, exponent), norm in zip(group.elsewhere, norms, strict=True):
            if bool(has_direction(norm).all()):
                logs.append((unit.numel, math.log(wanted / float(norm)) / exponent))
        return float(sum(numel * log for numel, log in logs) / sum(numel for numel, _ in logs))

    def _scale(
        self, targets: Targets, factors: Mapping[int, Tensor], others: Mapping[int, tuple[Tensor, float]]
    ) -> None:
        active = targets.at_places(lambda place: place[0] in factors)
        local = [local_values(entry.unit, factors[entry.which]).to(entry.param.device) for entry in active]
        targets.scale(active, local)
        for entry, factor in zip(active, local, strict=True):
            self._scale_companions(targets, entry, factor, again=len(self.readings[entry.which]) > 1)
        for param, number in others.values():
            whole = Unit(param, None)
            (part,) = local_units(whole)
            device = local_tensor(param).device
            factor = torch.full((part.count,), number, dtype=wide_dtype(device), device=device)
            copies = second_copies(targets.optimizer, param) if targets.has_second_copies else []
            for one in (param, *copies):
                scale_units([local_tensor(one)], [factor], [part])
            entry = ActiveParam(-1, 0, part, local_tensor(param), 0, param)
            again = any(len(self.readings[entry.which]) > 1 for entry in active)
            self._scale_companions(targets, entry, factor, again=again)

    def _scale_companions(self, targets: Targets, entry: ActiveParam, factor: Tensor, *, again: bool) -> None:
        """Scale the gradient by 1/s, and the buffers by their powers of s.

        Where a unit is placed again, s < 1 undoes growth that the momentum has caused. To divide the momentum
        by s too would enlarge the next step by 1/s² relative to the unit, and so on without bound. So it is
        multiplied by s there: past gradients go on to turn the unit by the same angle.
        """
        owner = entry.owner
        if owner.grad is not None:
            owner.grad = placed_as(owner, owner.grad)
            scale_units([local_tensor(owner.grad)], [1 / factor], [entry.unit])
        for name, value in targets.optimizer.state.get(owner, {}).items():
            if name in self.buffers and isinstance(value, Tensor) and value.shape == owner.shape:
                exponent = self.buffers[name]
                scaled = factor**exponent
                if again:
                    scaled = torch.where(factor < 1, factor ** abs(exponent), scaled)
                scale_units([local_tensor(value)], [scaled], [entry.unit])


def _moves(factors: Tensor) -> bool:
    return bool((factors.log().abs() > _MOVED).any())


def _fits(unit: Unit, norms: Tensor, gradients: Tensor) -> Tensor:
    """Return for which units the types of weights and gradients can represent these norms."""
    types = [torch.finfo(param.dtype) for param in unit.params]
    smallest = max(t.tiny for t in types) * unit.numel**0.5
    largest = min(t.max for t in types)
    fits: Tensor = (norms >= smallest) & (norms <= largest) & (gradients <= largest)
    return fits
