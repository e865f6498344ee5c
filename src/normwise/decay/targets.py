"""The units that a Decay acts on: which parameters a step concerns, and the norms of their units."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.kahan import KahanScale
from normwise.decay.rules import Rule
from normwise.decay.scaling import has_direction, scale_units
from normwise.decay.second_copies import second_copies
from normwise.norms import concatenated_norms, of_shape, wide_dtype
from normwise.sharding import local_tensor
from normwise.units import LocalUnit, Unit, global_norms, local_units, local_values, needs_reduction

__all__ = ["ActiveParam", "Targets", "check_gradients", "group_of", "name_of"]


class ActiveParam(NamedTuple):
    """A parameter that a step concerns, and the part of it that this rank holds."""

    which: int  # the index of its Unit
    place: int  # its index in the Unit
    unit: Unit  # this rank's part of the Unit
    param: Tensor  # this rank's part of the parameter
    group: int  # the index of its param_group
    owner: Tensor  # the parameter as the optimizer knows it


class Targets:
    """The units of a Decay, beside the optimizer that steps them.

    Args:
        optimizer: The optimizer.
        units: The Units.
        measure: The magnitude that the rule sees: "norm", "rms" or "relative".

    Attributes:
        local: This rank's part of each Unit, as :func:`normwise.units.local_units` returns it.
        kahan: The decay that the weights' precision could not represent yet, or None.
        has_second_copies: Whether the optimizer may keep further copies of the weights in its state.
        initial: The magnitudes of each Unit when the rule was attached, for a rule that needs them; with the
            measure "relative", the norms to which magnitudes are relative; else empty.
    """

    def __init__(self, optimizer: Optimizer, units: Sequence[Unit], measure: str) -> None:
        self.optimizer = optimizer
        self.units = tuple(units)
        self.measure = measure
        self.local = [local_units(unit, functools.partial(name_of, optimizer)) for unit in self.units]
        self.kahan: KahanScale | None = None
        self.initial: list[Tensor] = []
        self.has_second_copies = False
        self._limits: dict[int, Tensor] = {}
        self._with_gradient: set[int] = set()  # ids of parameters, in this step

    @property
    def found_inf(self) -> Tensor | None:
        """What a GradScaler leaves with a fused optimizer during a step: 1 where the step is skipped."""
        return getattr(self.optimizer, "found_inf", None)

    def name(self, param: Tensor) -> str:
        """Return the name of a parameter for an error."""
        return name_of(self.optimizer, param)

    def note_gradients(self) -> None:
        """Note which parameters have a gradient now; some optimizers end their step with ``grad = None``."""
        params = (param for unit in self.units for param in unit.params)
        self._with_gradient = {id(param) for param in params if param.grad is not None}

    @property
    def noted_gradients(self) -> bool:
        """Whether a parameter was seen to have a gradient in this step."""
        return bool(self._with_gradient)

    def with_gradient(self) -> list[ActiveParam]:
        """Return the parameters that have or had a gradient in this step, with their groups as they are now.

        Raises:
            RuntimeError: A parameter is no longer in the optimizer.
        """
        return [
            active
            for active in self._all()
            if active.owner.grad is not None or id(active.owner) in self._with_gradient
        ]

    def at_places(self, places: Callable[[tuple[int, int]], bool]) -> list[ActiveParam]:
        """Return the parameters for whose (index of the Unit, index in the Unit) ``places`` is true."""
        return [active for active in self._all() if places((active.which, active.place))]

    def _all(self) -> Iterator[ActiveParam]:
        groups = group_of(self.optimizer)
        for which, parts in enumerate(self.local):
            for place, unit in enumerate(parts):
                if isinstance(unit, LocalUnit):
                    unit.refresh()
                owner = self.units[which].params[place]
                if id(owner) not in groups:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(owner.shape)} that this Decay was attached to is no "
                        "longer in the optimizer (was it replaced, as fully_shard does?): remove() this "
                        "Decay and construct it anew"
                    )
                yield ActiveParam(which, place, unit, unit.params[place], groups[id(owner)], owner)

    def magnitudes(self, active: Sequence[ActiveParam], measure: str | None = None) -> list[Tensor]:
        """Return for each parameter the magnitudes of those of its units that this rank holds a part of.

        All ranks must call this together, with any parameters: the norms of units that lie on several ranks
        take one reduction, of all such Units of the Decay, so that all ranks communicate alike.

        Args:
            active: The parameters.
            measure: "norm", "rms" or "relative"; None for the measure of the Decay.
        """
        split = [which for which, parts in enumerate(self.local) if needs_reduction(parts[0])]
        whole = dict(zip(split, global_norms([self.local[which] for which in split]), strict=True))
        norms: dict[int, Tensor] = {}
        single: dict[object, list[ActiveParam]] = {}
        for entry in active:
            if entry.which in whole or entry.which in norms:
                continue
            if self.kahan is not None:
                norms[entry.which] = self.kahan.norms(entry.which)
            elif len(entry.unit.params) > 1:
                norms[entry.which] = entry.unit.norms()
            else:
                single.setdefault((entry.param.device, entry.param.dtype, entry.unit.dim), []).append(entry)
        # All norms first and then all products: after a pass over memory every Python step is slow, which
        # costs more than finding a weight in the cache again would gain.
        for some in single.values():
            together, _ = concatenated_norms([entry.param for entry in some], some[0].unit.dim)
            split_norms = together.split([entry.unit.count for entry in some])
            norms.update(zip((entry.which for entry in some), split_norms, strict=True))
        found = [
            local_values(entry.unit, whole[entry.which]) if entry.which in whole else norms[entry.which]
            for entry in active
        ]
        if (measure or self.measure) == "norm":
            return found
        sizes = [self.norm_of_magnitude_one(entry, measure) for entry in active]
        return [norm / size for norm, size in zip(found, sizes, strict=True)]

    def norm_of_magnitude_one(self, entry: ActiveParam, measure: str | None = None) -> float | Tensor:
        """Return the norm that the units of a parameter have where their magnitude is 1."""
        measure = measure or self.measure
        if measure == "relative":
            return local_values(entry.unit, self.initial[entry.which])
        return 1.0 if measure == "norm" else float(entry.unit.numel**0.5)

    def bind(self, rule: Rule, active: Sequence[ActiveParam]) -> Rule:
        """Return the rule for the units of these parameters, bound to their initial magnitudes."""
        if not rule.needs_initial_norms:
            return rule
        return rule.bound_to(
            torch.cat([local_values(entry.unit, self.initial[entry.which]) for entry in active])
        )

    def limits(self, active: Sequence[ActiveParam]) -> Tensor:
        """Return the smallest and the largest magnitude that each unit of these parameters may get.

        The largest is the largest number of the type. The smallest is that of a unit whose elements are the
        smallest number with full precision. The result has the shape (2, units).
        """
        return torch.cat([local_values(entry.unit, self._limits_of(entry)) for entry in active]).T

    def _limits_of(self, entry: ActiveParam) -> Tensor:
        kept = self._limits.get(entry.which)
        if kept is None or kept.device != entry.param.device:  # or it was moved since
            unit = self.units[entry.which]
            types = [torch.finfo(param.dtype) for param in unit.params]
            device = entry.param.device
            bounds = max(t.tiny for t in types) * unit.numel**0.5, min(t.max for t in types)
            shape, wide = (unit.count,), wide_dtype(device)
            kept = torch.stack([torch.full(shape, b, dtype=wide, device=device) for b in bounds], 1)
            if self.measure == "relative":
                kept = kept / self.initial[entry.which].to(device)[:, None]
            elif self.measure == "rms":
                kept = kept / unit.numel**0.5
            self._limits[entry.which] = kept
        return kept

    def keep_initial_magnitudes(self) -> None:
        """Store the present magnitudes, for a rule or a measure that refers to them.

        Raises:
            ValueError: The norm of a unit is zero or not finite, and a rule needs it.
        """
        norms = global_norms(self.local)
        if self.measure == "relative":
            self.initial = norms
            for which, norm in enumerate(norms):
                self.refer_to(which, norm)
            return
        rms = self.measure == "rms"
        self.initial = [n / u.numel**0.5 if rms else n for n, u in zip(norms, self.units, strict=True)]
        for unit, initial in zip(self.units, self.initial, strict=True):
            acting = initial if unit.mask is None else initial[unit.mask]
            if not bool(((acting > 0) & acting.isfinite()).all()):
                raise ValueError(
                    f"{self.name(unit.params[0])} has units whose norm is zero or not finite, through which "
                    "no Sphere goes: give Sphere(radius=...), or initialise it first"
                )

    def refer_to(self, which: int, norms: Tensor) -> None:
        """With the measure "relative", let the magnitudes of a Unit be relative to these norms from now on.

        Units without a direction refer to the root mean square of the others.
        """
        if self.measure != "relative":
            return
        usable = has_direction(norms)
        others = norms[usable].square().mean().sqrt() if bool(usable.any()) else torch.ones_like(norms[:1])
        self.initial[which] = torch.where(usable, norms, others)
        self._limits.pop(which, None)

    def forget_limits(self) -> None:
        """Compute limits anew when they are needed, as the norms that they depend on have changed."""
        self._limits.clear()

    def scale(self, active: Sequence[ActiveParam], factors: Sequence[float | Tensor]) -> None:
        """Scale the units of parameters in place, unless a GradScaler skips the step.

        Args:
            active: The parameters.
            factors: For each a number, or a tensor with one value per unit.
        """
        if self.has_second_copies:
            for entry, factor in zip(active, factors, strict=True):
                copies = [local_tensor(copy) for copy in second_copies(self.optimizer, entry.owner)]
                scale_units(copies, [factor] * len(copies), [entry.unit] * len(copies), self.found_inf)
        if self.kahan is None:
            units = [entry.unit for entry in active]
            scale_units([entry.param for entry in active], factors, units, self.found_inf)
            return
        for entry, factor in zip(active, factors, strict=True):
            self.kahan.scale(entry.which, entry.place, entry.unit, factor, self.found_inf)


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
                return f"parameter {where}{of_shape(param)}"
    return f"a parameter{of_shape(param)}"


def check_gradients(optimizer: Optimizer) -> None:
    """Raise if no parameter of an optimizer has a gradient while several processes train together.

    Raises:
        RuntimeError: No parameter has one. Most likely the model's parameters have been replaced.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if any(param.grad is not None for param in params):
            return
        raise RuntimeError(
            f"{name_of(optimizer, params[0])} and all others of {type(optimizer).__name__} have no gradient "
            "in the first step: if fully_shard or parallelize_module has replaced the model's parameters, "
            "construct the optimizer, and then the Decay, after it"
        )
