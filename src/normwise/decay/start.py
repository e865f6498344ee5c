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
            far. A unit is placed in the first of them, and again where its equilibrium norm, or that of a
            unit that moves with it, turns out to be another. That is needed where gradients are clipped:
            from a tiny norm the first gradient is huge and is clipped, and γ is too small; each placement
            about halves the error of the logarithm.
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
        seen = {w: (norm, gradient) for w, norm, gradient in zip(ready, norms, gradients, strict=True)}
        measured = self._wait_together(
            [which for which in ready if self._measure(which, targets.units[which], *seen[which])]
        )
        together = self._members_by_unit()
        placed = {which for which in measured if self._are_placed(together.get(which, {which}))}
        factors = {
            which: self._factors(which, targets.units[which], *seen[which])
            if which in placed
            else torch.ones_like(seen[which][0])
            for which in measured
        }
        others = self._solve_groups(targets, factors)
        self._scale(targets, factors, others)
        if any(bool((factor.log().abs() > _MOVED).any()) for factor in factors.values()):
            for module in self.statistics:
                _begin_anew(module)
        for which in placed:
            norm = seen[which][0] * factors[which]
            targets.refer_to(which, norm * self.reference_factors.get(which, 1.0))

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

    def _measure(self, which: int, unit: Unit, norms: Tensor, gradients: Tensor) -> bool:
        """Take down log γ of a Unit, or return False where it must wait for another gradient."""
        acting, scales = self._acting(unit, norms), norms * gradients
        alive = scales[acting & has_direction(scales)]
        grows = self.grows_with_gradient[which]
        if not bool(acting.any()) or (grows and not alive.numel()):
            return False
        self.readings[which].append(math.log(float(alive.square().mean().sqrt())) if grows else 0.0)
        return True

    def _wait_together(self, measured: Sequence[int]) -> list[int]:
        """Return the Units that can be placed: a group waits, all its members, until each is measured."""
        left = list(measured)
        while waiting := {
            which for group in self.joint if not group.units.keys() <= set(left) for which in group.units
        } & set(left):
            for which in waiting:
                self.readings[which].pop()
            left = [which for which in left if which not in waiting]
        return left

    def _members_by_unit(self) -> dict[int, set[int]]:
        """Return for each Unit of a group all Units that move with it, through groups that overlap too."""
        together: dict[int, set[int]] = {}
        for group in self.joint:
            members = set(group.units).union(*(together.get(which, ()) for which in group.units))
            together |= dict.fromkeys(members, members)
        return together

    def _are_placed(self, members: Iterable[int]) -> bool:
        """Return whether the last measurement places these Units, for the first time or again."""
        readings = {which: self.readings[which] for which in members}
        placed, revised = dict.fromkeys(readings, math.inf), False
        for count in range(1, max(map(len, readings.values())) + 1):
            means = {which: _mean_of_last_quarter(values[:count]) for which, values in readings.items()}
            revised = any(abs(means[which] - placed[which]) / 2 > _REVISED for which in readings)
            placed = means if revised else placed
        return revised

    @staticmethod
    def _acting(unit: Unit, norms: Tensor) -> Tensor:
        acting = has_direction(norms)
        return acting if unit.mask is None else acting & unit.mask.to(acting.device)

    def _factors(self, which: int, unit: Unit, norms: Tensor, gradients: Tensor) -> Tensor:
        """Return the factor that places each unit."""
        acting, norm = self._acting(unit, norms), self.norms[which]
        assert norm is not None  # or the Unit would not wait
        wanted = norm * math.exp(_mean_of_last_quarter(self.readings[which]) / 2)
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

    def _solve_groups(self, targets: Targets, factors: dict[int, Tensor]) -> dict[int, tuple[Tensor, float]]:
        """Replace the factors of grouped Units by powers of one α for each group.

        The α are those that come closest to the factors that the members need, in the mean square of
        logarithms over all elements.

        Returns:
            {id: (parameter, factor)} for the members that are no Units.
        """
        others: dict[int, tuple[Tensor, float]] = {}
        groups = [group for group in self.joint if all(which in factors for which in group.units)]
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
        later = {
            id(param)
            for group in self.joint
            if any(len(self.readings[which]) > 1 for which in group.units)
            for param, _ in group.others
        }
        for param, number in others.values():
            whole = Unit(param, None)
            (part,) = local_units(whole)
            device = local_tensor(param).device
            factor = torch.full((part.count,), number, dtype=wide_dtype(device), device=device)
            copies = second_copies(targets.optimizer, param) if targets.has_second_copies else []
            for one in (param, *copies):
                scale_units([local_tensor(one)], [factor], [part])
            entry = ActiveParam(-1, 0, part, local_tensor(param), 0, param)
            self._scale_companions(targets, entry, factor, again=id(param) in later)

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


def _mean_of_last_quarter(values: Sequence[float]) -> float:
    later = values[-max(1, len(values) // 4) :]
    return sum(later) / len(later)


def _fits(unit: Unit, norms: Tensor, gradients: Tensor) -> Tensor:
    """Return for which units the types of weights and gradients can represent these norms."""
    types = [torch.finfo(param.dtype) for param in unit.params]
    smallest = max(t.tiny for t in types) * unit.numel**0.5
    largest = min(t.max for t in types)
    fits: Tensor = (norms >= smallest) & (norms <= largest) & (gradients <= largest)
    return fits
