r"""Decay rules: pure functions of the norm of a unit.

Decay moves a unit w along its own ray only, so a rule is a scalar field on norms n = ‖w‖:

    dn/dt = −c(n)·n.

The time t of a step is the learning rate. A rule is three functions: the rate c(n); the flow φ(n, t), which
is the exact solution of the equation; and the penalty R(n) with R′(n) = c(n)·n, whose gradient flow it is.
Every flow obeys φ(n, 0) = n and φ(φ(n, s), t) = φ(n, s + t).

| rule | rate c(n) | flow φ(n, t) | penalty R(n) |
|---|---|---|---|
| L2 | λ | n·exp(−λt) | λn²/2 |
| AdaptiveWeightShrink | λn | n/(1 + λnt) | λn³/3 |
| PowerShrink, p > 0 | λnᵖ | n·(1 + pλnᵖt)^(−1/p) | λn^(p+2)/(p+2) |
| EpsilonShiftedL2 | λ(1 − ε/n) | ε + (n − ε)·exp(−λt) | λ(n − ε)²/2 |
| Sphere | – | a projection, n → r | – |

To write another rule, subclass :class:`Rule`. Two published methods that are not functions of the norm are in
:mod:`normwise.decay.weight_rules`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from normwise.norms import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "L2",
    "MODES",
    "RULES",
    "AdaptiveWeightShrink",
    "Coefficient",
    "EpsilonShiftedL2",
    "PowerShrink",
    "Rule",
    "Sphere",
    "checked",
]

MODES = ("flow", "explicit", "coupled")
Coefficient: TypeAlias = float | Callable[[int], float]


def checked(name: str, value: object, *, positive: bool = False) -> float:
    """Return ``value`` as a float, or raise an error that names it.

    Args:
        name: What the user calls the value.
        value: A number.
        positive: Whether to refuse zero.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is not finite or has the wrong sign.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "positive" if positive else "zero or positive"
        raise ValueError(f"{name}={value} is not allowed: give a finite number that is {allowed}")
    return value


class Rule(ABC):
    """Base class of decay rules: three functions of the norm of a unit.

    To write a rule, make a frozen dataclass that implements :meth:`rate`, :meth:`flow` and :meth:`penalty`.
    Each method is the plain formula. The base class calls it with norms and times in float64 (float32 on MPS)
    and returns the result in the caller's type, so that formulas hold from 1e-30 to 1e30 in float32 too. It
    also accepts Python numbers, keeps zero units at zero, and replaces an infinite rate at zero by 0.

    A field named ``coefficient`` is checked to be finite and not negative. It may be a function of the step;
    the formulas then see the number that the function returned.

    Attributes:
        modes: The modes of :class:`normwise.Decay` that can apply the rule.
        projects: Whether the rule is a projection. A projection has no rate and no penalty.
        function_of_norm: Whether the rule changes nothing but norms.
        applied_by: {mode: class}, for rules that are not functions of the norm and act on the weights
            themselves (:mod:`normwise.decay.weight_rules`).

    Example:
        >>> @dataclass(frozen=True)
        ... class ShiftedShrink(Rule):  # L2 and AdaptiveWeightShrink together
        ...     coefficient: float
        ...     def rate(self, norm):
        ...         return self.coefficient * (1 + norm)
        ...     def flow(self, norm, time):
        ...         elapsed = self.coefficient * time
        ...         return norm * torch.exp(-elapsed) / (1 - norm * torch.expm1(-elapsed))
        ...     def penalty(self, norm):
        ...         return self.coefficient * (norm**2 / 2 + norm**3 / 3)
        >>> ShiftedShrink(1.0).flow(torch.tensor([1.0, 1e30]), time=1.0)
        tensor([0.2254, 0.5820])
    """

    modes: ClassVar[tuple[str, ...]] = MODES
    projects: ClassVar[bool] = False
    function_of_norm: ClassVar[bool] = True
    applied_by: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the formulas of a subclass, so that they see wide types and checked arguments."""
        super().__init_subclass__(**options)
        for name, wrap in (("rate", _wrap_rate), ("flow", _wrap_flow), ("penalty", _wrap_penalty)):
            if name in vars(cls):
                setattr(cls, name, wrap(vars(cls)[name]))

    def __post_init__(self) -> None:
        """Check the coefficient, where the rule has one."""
        if hasattr(self, "coefficient") and not callable(self.coefficient):
            object.__setattr__(self, "coefficient", checked("coefficient", self.coefficient))

    @abstractmethod
    def rate(self, norm: Any) -> Tensor:
        """Return c(n), the rate at which units of this norm shrink: dn/dt = −c(n)·n.

        Args:
            norm: Norms of units, zero or positive: a floating-point tensor of any shape, or a number.

        Returns:
            A tensor of the shape and type of ``norm``. The rate is negative where the rule pushes outwards. A
            zero unit has no ray to move on: its rate is the limit where that is finite, else 0.

        Example:
            >>> AdaptiveWeightShrink(0.1).rate(torch.tensor([1.0, 2.0]))
            tensor([0.1000, 0.2000])
        """

    @abstractmethod
    def flow(self, norm: Any, time: Any) -> Tensor:
        """Return φ(n, t), the norm after a time t: the exact solution of dn/dt = −c(n)·n.

        Args:
            norm: Norms of units, zero or positive: a floating-point tensor of any shape, or a number.
            time: The time that passes, zero or positive: a number, or a tensor that broadcasts.

        Returns:
            A tensor of the shape and type of ``norm``; 0 where the norm is 0.

        Raises:
            ValueError: ``time`` is a number that is negative or not finite.

        Example:
            >>> AdaptiveWeightShrink(1.0).flow(torch.tensor([1.0, 1e30]), time=1.0)
            tensor([0.5000, 1.0000])
        """

    @abstractmethod
    def penalty(self, norm: Any) -> Tensor:
        """Return R(n), the regularizer whose gradient is c(n)·n along the ray; differentiable.

        Args:
            norm: Norms of units, zero or positive: a floating-point tensor of any shape, or a number.

        Returns:
            A tensor of the shape and type of ``norm``.

        Example:
            >>> L2(0.1).penalty(torch.tensor(2.0))
            tensor(0.2000)
        """

    @property
    def strength(self) -> float:
        """The coefficient λ as a number.

        Raises:
            ValueError: The coefficient is a function of the step.
        """
        coefficient: float = getattr(self, "coefficient", math.nan)
        self._check_not_scheduled()
        return coefficient

    @property
    def constant_rate(self) -> float | None:
        """The rate where it is the same for every norm, else None."""
        return None

    @property
    def scheduled(self) -> bool:
        """Whether the coefficient is a function of the step."""
        return callable(getattr(self, "coefficient", None))

    @property
    def needs_initial_norms(self) -> bool:
        """Whether the rule depends on the norms that the units had when it was attached."""
        return False

    def at(self, step: int) -> Self:
        """Return the rule with the coefficient that it has at this step (itself where it is a number).

        Example:
            >>> L2(lambda step: 0.1 / (1 + step)).at(1)
            L2(coefficient=0.05)
        """
        if not self.scheduled:
            return self
        return dataclasses.replace(self, coefficient=self.coefficient(step))  # type: ignore[attr-defined, type-var]

    def bound_to(self, norms: Tensor) -> Rule:
        """Return the rule for units that had these norms when it was attached."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the name of the rule and its arguments, as plain values."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain = {name: "scheduled" if callable(value) else value for name, value in arguments.items()}
        return {"name": type(self).__name__, **plain}

    def _check_not_scheduled(self) -> None:
        if self.scheduled:
            raise ValueError(
                f"the coefficient of this {type(self).__name__} is a function of the step: "
                "call .at(step) first, as Decay does"
            )


def _widened(rule: Rule, norm: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the norm as a tensor, and in the widest type that its device computes in."""
    rule._check_not_scheduled()
    norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
    if not norm.is_floating_point():
        raise TypeError(f"norm must be a floating-point tensor, not {norm.dtype}")
    return norm, norm.to(wide_dtype(norm.device))


def _as_tensor(value: Tensor | float, norm: Tensor) -> Tensor:
    """Return the value of a formula as a tensor: a formula such as c(n) = λ may return a number."""
    return value if isinstance(value, Tensor) else torch.full_like(norm, value)


def _wrap_rate(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(formula)
    def rate(self: Rule, norm: Tensor | float) -> Tensor:
        norm, wide = _widened(self, norm)
        value = _as_tensor(formula(self, wide), wide)
        value = torch.where((wide == 0) & ~value.isfinite(), torch.zeros_like(value), value)
        return value.to(norm.dtype)

    return rate


def _wrap_flow(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(formula)
    def flow(self: Rule, norm: Tensor | float, time: Tensor | float) -> Tensor:
        norm, wide = _widened(self, norm)
        if not isinstance(time, Tensor):  # stays on the CPU: a copy would make CUDA wait, a scalar does not
            time = torch.tensor(checked("time", time), dtype=wide.dtype, device="cpu")
        elif time.ndim or time.device.type != "cpu":
            time = time.to(wide.device)
        value = _as_tensor(formula(self, wide, time.to(wide.dtype)), wide)
        return torch.where(wide > 0, value, wide).to(norm.dtype)

    return flow


def _wrap_penalty(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(formula)
    def penalty(self: Rule, norm: Tensor | float) -> Tensor:
        norm, wide = _widened(self, norm)
        return _as_tensor(formula(self, wide), wide).to(norm.dtype)

    return penalty


# A caller may pass numbers, hence Any; the formulas see tensors.


@dataclass(frozen=True)
class L2(Rule):
    r"""L2: c(n) = λ, the usual weight decay.

    Training leaves the fraction exp(−λΣlr) of the initial norm.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.

    Example:
        >>> L2(0.1).rate(torch.tensor([0.5, 4.0]))
        tensor([0.1000, 0.1000])
    """

    coefficient: Coefficient

    @property
    def constant_rate(self) -> float | None:
        """λ, where it is a number."""
        return None if self.scheduled else self.strength

    def rate(self, norm: Any) -> Tensor:
        return torch.full_like(norm, self.strength)

    def flow(self, norm: Any, time: Any) -> Tensor:
        return norm * torch.exp(-self.strength * time)

    def penalty(self, norm: Any) -> Tensor:
        return self.strength * norm**2 / 2


@dataclass(frozen=True)
class PowerShrink(Rule):
    r"""Power shrink: c(n) = λ·nᵖ. A power of 1 is AdaptiveWeightShrink, a power near 0 is near L2.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        power: p, positive.

    Example:
        >>> PowerShrink(1.0, power=2.0).flow(torch.tensor(1.0), time=1.5)
        tensor(0.5000)
    """

    coefficient: Coefficient
    power: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", checked("power", self.power, positive=True))

    def rate(self, norm: Any) -> Tensor:
        return self.strength * norm**self.power

    def flow(self, norm: Any, time: Any) -> Tensor:
        # x = pλtnᵖ may overflow, so small and large x have a form each; (n⁻ᵖ + pλt)^(−1/p) is the second
        power, pulled = self.power, self.power * self.strength * time
        x = torch.exp(torch.log(pulled) + power * torch.log(norm))
        decayed = norm * torch.exp(-torch.log1p(x) / power)
        saturated = pulled ** (-1 / power) * torch.exp(-torch.log1p(1 / x) / power)
        return torch.where(x < 1, decayed, saturated)

    def penalty(self, norm: Any) -> Tensor:
        return self.strength * norm ** (self.power + 2) / (self.power + 2)


@dataclass(frozen=True)
class AdaptiveWeightShrink(Rule):
    r"""Adaptive Weight Shrink (AWS): c(n) = λn, a coefficient proportional to the magnitude of the weight.

    After a total time s it leaves a norm of at most 1/(λs), whatever the initial norm was: training forgets
    its initial scale. Source: Li, Chen & Yang, "Understanding the Disharmony between Weight Normalization
    Family and Weight Decay", AAAI 2020, doi 10.1609/aaai.v34i04.5904, which describes the rule in words. We
    read "magnitude" as the norm of the unit that is normalised, and take the learning rate as time.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.

    Example:
        >>> AdaptiveWeightShrink(1.0).flow(torch.tensor([1.0, 1e6]), time=3.0)
        tensor([0.2500, 0.3333])
    """

    coefficient: Coefficient

    @classmethod
    def for_budget(cls, total_time: float, norm: float = 1.0, strength: float = 3.0) -> Self:
        """Return the rule with λ = strength/(norm·total_time), which leaves nothing to tune.

        With this λ, a unit of norm n₀ that gradients leave alone ends at norm/(strength + norm/n₀), which is
        below norm/strength.

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
        total_time = checked("total_time", total_time, positive=True)
        norm = checked("norm", norm, positive=True)
        return cls(checked("strength", strength, positive=True) / (norm * total_time))

    def rate(self, norm: Any) -> Tensor:
        return self.strength * norm

    def flow(self, norm: Any, time: Any) -> Tensor:
        return norm / (1 + self.strength * time * norm)

    def penalty(self, norm: Any) -> Tensor:
        return self.strength * norm**3 / 3


@dataclass(frozen=True)
class EpsilonShiftedL2(Rule):
    r"""ε-shifted L2: c(n) = λ(1 − ε/n). Pulls every norm towards ε instead of 0.

    Source: Li, Chen & Yang, arXiv 1911.05920, which proposes the regularizer ½λ(‖w‖ − ε)². It has a
    global minimum, at n = ε. A zero unit, which has no direction to grow in, stays zero. The form that the
    authors train with is :class:`~normwise.decay.weight_rules.PublishedEpsilonShift`.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        epsilon: ε, the norm at rest, zero or positive.

    Example:
        >>> EpsilonShiftedL2(1.0, epsilon=0.5).flow(torch.tensor([0.1, 0.5, 9.0]), time=100.0)
        tensor([0.5000, 0.5000, 0.5000])
    """

    coefficient: Coefficient
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "epsilon", checked("epsilon", self.epsilon))

    def rate(self, norm: Any) -> Tensor:
        return self.strength * (1 - self.epsilon / norm)

    def flow(self, norm: Any, time: Any) -> Tensor:
        # not ε + (n − ε)·e^(−λt), which loses all digits of a small n
        elapsed = -self.strength * time
        return norm * torch.exp(elapsed) - self.epsilon * torch.expm1(elapsed)

    def penalty(self, norm: Any) -> Tensor:
        return self.strength * (norm - self.epsilon) ** 2 / 2


@dataclass(frozen=True)
class Sphere(Rule):
    """Projection to a sphere: every unit has the norm ``radius`` after each step, whatever time passed.

    Not a flow (no rate leads there in finite time), so :meth:`rate` and :meth:`penalty` raise, and only
    ``mode="flow"`` applies it. :class:`~normwise.decay.weight_rules.RotatingSphere` also fixes how far a unit
    turns in a step.

    Args:
        radius: The norm, positive. None: the norm that each unit had when the rule was attached.

    Example:
        >>> Sphere(radius=2.0).flow(torch.tensor([0.1, 5.0]), time=0.1)
        tensor([2., 2.])
    """

    radius: float | None = None

    projects = True
    modes = ("flow",)

    def __post_init__(self) -> None:
        if self.radius is not None:
            object.__setattr__(self, "radius", checked("radius", self.radius, positive=True))

    @property
    def needs_initial_norms(self) -> bool:
        """Whether no radius was given."""
        return self.radius is None

    def bound_to(self, norms: Tensor) -> Rule:
        """Return the sphere through these norms, where no radius was given."""
        return self if self.radius is not None else _BoundSphere(norms=norms)

    def rate(self, norm: Any) -> Tensor:
        raise ValueError('a Sphere is a projection and has no rate: use mode="flow", or another rule')

    def flow(self, norm: Any, time: Any) -> Tensor:
        if self.radius is None:
            raise ValueError(
                "this Sphere takes its radius from the units it is attached to: give radius=, or use Decay"
            )
        return torch.full_like(norm, self.radius)

    def penalty(self, norm: Any) -> Tensor:
        raise ValueError("a Sphere is a projection and has no penalty: use another rule")


@dataclass(frozen=True, eq=False)
class _BoundSphere(Sphere):
    _: KW_ONLY
    norms: Tensor

    def flow(self, norm: Any, time: Any) -> Tensor:
        return self.norms.to(norm)


RULES: tuple[type[Rule], ...] = (L2, AdaptiveWeightShrink, PowerShrink, EpsilonShiftedL2, Sphere)
