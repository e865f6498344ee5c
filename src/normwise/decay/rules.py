r"""Decay rules: pure functions of the norm of a unit.

Decay can only move a unit w along its own ray, so a rule is a scalar field on norms n = ‖w‖,

    dn/dt = −c(n)·n,

where the time t that passes in a step is the learning rate. Each rule is three functions: its rate c(n),
the exact solution of the equation, its flow φ(n, t), and the penalty R(n) with R′(n) = c(n)·n, whose
gradient flow it is. Every flow obeys φ(n, 0) = n and φ(φ(n, s), t) = φ(n, s + t).

| rule | rate c(n) | flow φ(n, t) | penalty R(n) |
|---|---|---|---|
| L2 | λ | n·exp(−λt) | λn²/2 |
| AdaptiveWeightShrink | λn | n/(1 + λnt) | λn³/3 |
| PowerShrink, p > 0 | λnᵖ | n·(1 + pλnᵖt)^(−1/p) | λn^(p+2)/(p+2) |
| EpsilonShiftedL2 | λ(1 − ε/n) | ε + (n − ε)·exp(−λt) | λ(n − ε)²/2 |
| Sphere | – | a projection, n → r | – |

A new rule is one class with the three functions ``_rate``, ``_flow`` and ``_penalty``. They see float64
(on MPS float32) and positive norms, so the plain formula is exact from 1e-30 to 1e30.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from normwise.units import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "L2",
    "RULES",
    "AdaptiveWeightShrink",
    "EpsilonShiftedL2",
    "PowerShrink",
    "Rule",
    "Sphere",
]

Coefficient: TypeAlias = float | Callable[[int], float]


def _checked(name: str, value: object, *, positive: bool = False) -> float:
    """Return ``value`` as a float, or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "positive" if positive else "zero or positive"
        raise ValueError(f"{name}={value} is not allowed: give a finite number that is {allowed}")
    return value


class Rule(ABC):
    """A decay rule: a scalar field on norms. The subclasses are values: frozen, comparable, printable."""

    @abstractmethod
    def _rate(self, norm: Tensor) -> Tensor: ...

    @abstractmethod
    def _flow(self, norm: Tensor, time: Tensor) -> Tensor: ...

    @abstractmethod
    def _penalty(self, norm: Tensor) -> Tensor: ...

    def rate(self, norm: Tensor | float) -> Tensor:
        """Return c(n), the rate at which units of this norm shrink: dn/dt = −c(n)·n.

        Args:
            norm: Norms of units, zero or positive, of any shape.

        Returns:
            A tensor of the shape and type of ``norm``. Negative where the rule pushes outwards. A zero unit
            has no ray to move on: its rate is the limit where that is finite, else 0.

        Example:
            >>> AdaptiveWeightShrink(0.1).rate(torch.tensor([1.0, 2.0]))
            tensor([0.1000, 0.2000])
        """
        norm, wide = _widened(norm)
        return self._rate(wide).to(norm.dtype)

    def flow(self, norm: Tensor | float, time: Tensor | float) -> Tensor:
        """Return φ(n, t), the norm after a time t: the exact solution of dn/dt = −c(n)·n.

        Args:
            norm: Norms of units, zero or positive, of any shape.
            time: The time that passes, zero or positive: a number, or a tensor that broadcasts.

        Returns:
            A tensor of the shape and type of ``norm``; 0 where the norm is 0.

        Raises:
            ValueError: ``time`` is a number that is negative or not finite.

        Example:
            >>> AdaptiveWeightShrink(1.0).flow(torch.tensor([1.0, 1e30]), time=1.0)
            tensor([0.5000, 1.0000])
        """
        norm, wide = _widened(norm)
        if isinstance(time, Tensor):
            time = time.to(device=wide.device, dtype=wide.dtype)
        else:  # a fill, as a copy from the host would make CUDA wait
            time = torch.full((), _checked("time", time), dtype=wide.dtype, device=wide.device)
        moved = self._flow(wide, time)
        return torch.where(wide > 0, moved, wide).to(norm.dtype)

    def penalty(self, norm: Tensor | float) -> Tensor:
        """Return R(n), the regularizer whose gradient is c(n)·n along the ray; differentiable.

        Args:
            norm: Norms of units, zero or positive, of any shape.

        Returns:
            A tensor of the shape and type of ``norm``.

        Example:
            >>> L2(0.1).penalty(torch.tensor(2.0))
            tensor(0.2000)
        """
        norm, wide = _widened(norm)
        return self._penalty(wide).to(norm.dtype)

    @property
    def constant_rate(self) -> float | None:
        """The rate where it is the same for every norm, else None."""
        return None

    @property
    def scheduled(self) -> bool:
        """Whether the coefficient is a function of the step."""
        return callable(getattr(self, "coefficient", None))

    def at(self, step: int) -> Self:
        """Return the rule with the coefficient that it has at this step (itself where it is a number).

        Example:
            >>> L2(lambda step: 0.1 / (1 + step)).at(1)
            L2(coefficient=0.05)
        """
        return self._replace(coefficient=self.coefficient(step)) if self.scheduled else self  # type: ignore[attr-defined]

    def bound_to(self, norms: Tensor) -> Rule:
        """Return the rule for units that had these norms when it was attached: itself, but for Sphere."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the name of the rule and what it was given, as plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {
            "name": type(self).__name__,
            **{k: "scheduled" if callable(v) else v for k, v in fields.items()},
        }

    def _replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return "scheduled" if callable(value) else value


def _widened(norm: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the norm as a tensor, and in the widest type that its device computes in."""
    norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
    if not norm.is_floating_point():
        raise TypeError(f"norm must be a floating-point tensor, not {norm.dtype}")
    return norm, norm.to(wide_dtype(norm.device))


@dataclass(frozen=True)
class _Shrink(Rule):
    """A rule with a coefficient λ."""

    coefficient: Coefficient

    def __post_init__(self) -> None:
        if not callable(self.coefficient):
            object.__setattr__(self, "coefficient", _checked("coefficient", self.coefficient))

    @property
    def _lambda(self) -> float:
        if callable(self.coefficient):
            raise ValueError(
                f"the coefficient of this {type(self).__name__} is a function of the step: "
                "call .at(step) first, as Decay does"
            )
        return self.coefficient


@dataclass(frozen=True)
class L2(_Shrink):
    r"""L2: c(n) = λ, the usual weight decay.

    Leaves the fraction exp(−λΣlr) of the initial norm.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.

    Example:
        >>> L2(0.1).rate(torch.tensor([0.5, 4.0]))
        tensor([0.1000, 0.1000])
    """

    @property
    def constant_rate(self) -> float | None:
        """λ."""
        return self._lambda

    def _rate(self, norm: Tensor) -> Tensor:
        return torch.full_like(norm, self._lambda)

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        return norm * torch.exp(-self._lambda * time)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self._lambda * norm**2 / 2


@dataclass(frozen=True)
class PowerShrink(_Shrink):
    r"""Power shrink: c(n) = λ·nᵖ. A power of 1 is AdaptiveWeightShrink, a power near 0 is near L2.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        power: p, positive.

    Example:
        >>> PowerShrink(1.0, power=2.0).flow(torch.tensor(1.0), time=1.5)
        tensor(0.5000)
    """

    power: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", _checked("power", self.power, positive=True))

    def _rate(self, norm: Tensor) -> Tensor:
        return self._lambda * norm**self.power

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        # φ = n·exp(−log(1 + pλtnᵖ)/p), with the logarithm of the sum taken of its logarithms: nᵖ may overflow
        exponent = torch.log(self.power * self._lambda * time) + self.power * torch.log(norm)
        return norm * torch.exp(-torch.logaddexp(exponent, torch.zeros_like(exponent)) / self.power)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self._lambda * norm ** (self.power + 2) / (self.power + 2)


@dataclass(frozen=True)
class AdaptiveWeightShrink(_Shrink):
    r"""Adaptive Weight Shrink (AWS): c(n) = λn, a coefficient proportional to the magnitude of the weight.

    After a total time s it leaves a norm of at most 1/(λs), whatever the initial norm was: training forgets
    its initial scale. Source: Li, Chen & Yang, "Understanding the Disharmony between Weight Normalization
    Family and Weight Decay", AAAI 2020, doi 10.1609/aaai.v34i04.5904, which gives the rule in words; the
    reading of "magnitude" as the norm of the unit that is normalised, with the learning rate as time, is
    ours.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.

    Example:
        >>> AdaptiveWeightShrink(1.0).flow(torch.tensor([1.0, 1e6]), time=3.0)
        tensor([0.2500, 0.3333])
    """

    @classmethod
    def for_budget(cls, total_time: float, norm: float = 1.0, strength: float = 3.0) -> Self:
        """Return the rule with λ = strength/(norm·total_time): nothing is left to tune.

        With it an undisturbed unit of norm n₀ ends at norm/(strength + norm/n₀) < norm/strength.

        Args:
            total_time: Σ lr over all steps of the schedule (with ``clock="step"``: the number of steps).
            norm: The reference norm. 1 suits SGD with filters of about unit norm; for Adam-like
                optimizers use ``measure="rms"`` and √Σ lr², the RMS that an undecayed weight reaches.
            strength: How many times the budget suffices to shrink the reference norm by half.

        Raises:
            TypeError: An argument is not a number.
            ValueError: An argument is not finite and positive.

        For ``mode="coupled"`` with momentum μ, multiply the coefficient by 1 − μ
        (:func:`normwise.theory.match` does).

        Example:
            >>> AdaptiveWeightShrink.for_budget(total_time=60.0)
            AdaptiveWeightShrink(coefficient=0.05)
        """
        total_time = _checked("total_time", total_time, positive=True)
        norm = _checked("norm", norm, positive=True)
        return cls(_checked("strength", strength, positive=True) / (norm * total_time))

    def _rate(self, norm: Tensor) -> Tensor:
        return self._lambda * norm

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        return norm / (1 + self._lambda * time * norm)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self._lambda * norm**3 / 3


@dataclass(frozen=True)
class EpsilonShiftedL2(_Shrink):
    r"""ε-shifted L2: c(n) = λ(1 − ε/n). Pulls every norm towards ε instead of 0.

    Source: Li, Chen & Yang, arXiv 1911.05920, which proposes the regularizer ½λ(‖w‖ − ε)². It has a
    global minimum, at n = ε. A zero unit, which has no direction to grow in, stays zero.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        epsilon: ε, the norm at rest, zero or positive.

    Example:
        >>> EpsilonShiftedL2(1.0, epsilon=0.5).flow(torch.tensor([0.1, 0.5, 9.0]), time=100.0)
        tensor([0.5000, 0.5000, 0.5000])
    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "epsilon", _checked("epsilon", self.epsilon))

    def _rate(self, norm: Tensor) -> Tensor:
        return torch.where(norm > 0, self._lambda * (1 - self.epsilon / norm), torch.zeros_like(norm))

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        # not ε + (n − ε)·e^(−λt), which loses all digits of a small n
        elapsed = -self._lambda * time
        return norm * torch.exp(elapsed) - self.epsilon * torch.expm1(elapsed)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self._lambda * (norm - self.epsilon) ** 2 / 2


@dataclass(frozen=True, eq=False)
class Sphere(Rule):
    """Projection to a sphere: every unit has the norm ``radius`` after each step, whatever time passed.

    Not a flow (no rate leads there in finite time), so :meth:`rate` and :meth:`penalty` raise, and only
    ``mode="flow"`` applies it.

    Args:
        radius: The norm, positive. None: the norm that each unit had when the rule was attached.

    Example:
        >>> Sphere(radius=2.0).flow(torch.tensor([0.1, 5.0]), time=0.1)
        tensor([2., 2.])
    """

    radius: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.radius is not None and not isinstance(self.radius, Tensor):
            object.__setattr__(self, "radius", _checked("radius", self.radius, positive=True))

    def bound_to(self, norms: Tensor) -> Rule:
        """Return the sphere through these norms, where no radius was given."""
        return Sphere(norms) if self.radius is None else self

    def _rate(self, norm: Tensor) -> Tensor:
        raise ValueError('a Sphere is a projection and has no rate: use mode="flow", or another rule')

    def _penalty(self, norm: Tensor) -> Tensor:
        raise ValueError("a Sphere is a projection and has no penalty: use another rule")

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        if self.radius is None:
            raise ValueError(
                "this Sphere takes its radius from the units it is attached to: give radius=, or use Decay"
            )
        radius = self.radius if isinstance(self.radius, Tensor) else torch.full_like(norm, self.radius)
        return radius.to(norm).expand_as(norm)


RULES: tuple[type[Rule], ...] = (L2, AdaptiveWeightShrink, PowerShrink, EpsilonShiftedL2, Sphere)
