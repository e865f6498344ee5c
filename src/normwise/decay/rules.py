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

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normwise.decay.rule import Rule, Shrink, checked

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


@dataclass(frozen=True)
class L2(Shrink):
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
        return self.strength

    def _rate(self, norm: Tensor) -> Tensor:
        return torch.full_like(norm, self.strength)

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        return norm * torch.exp(-self.strength * time)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self.strength * norm**2 / 2


@dataclass(frozen=True)
class PowerShrink(Shrink):
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
        object.__setattr__(self, "power", checked("power", self.power, positive=True))

    def _rate(self, norm: Tensor) -> Tensor:
        return self.strength * norm**self.power

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        # x = pλtnᵖ may overflow, so small and large x have a form each; (n⁻ᵖ + pλt)^(−1/p) is the second
        power, pulled = self.power, self.power * self.strength * time
        x = torch.exp(torch.log(pulled) + power * torch.log(norm))
        decayed = norm * torch.exp(-torch.log1p(x) / power)
        saturated = pulled ** (-1 / power) * torch.exp(-torch.log1p(1 / x) / power)
        return torch.where(x < 1, decayed, saturated)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self.strength * norm ** (self.power + 2) / (self.power + 2)


@dataclass(frozen=True)
class AdaptiveWeightShrink(Shrink):
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
        total_time = checked("total_time", total_time, positive=True)
        norm = checked("norm", norm, positive=True)
        return cls(checked("strength", strength, positive=True) / (norm * total_time))

    def _rate(self, norm: Tensor) -> Tensor:
        return self.strength * norm

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        return norm / (1 + self.strength * time * norm)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self.strength * norm**3 / 3


@dataclass(frozen=True)
class EpsilonShiftedL2(Shrink):
    r"""ε-shifted L2: c(n) = λ(1 − ε/n). Pulls every norm towards ε instead of 0.

    Source: Li, Chen & Yang, arXiv 1911.05920, which proposes the regularizer ½λ(‖w‖ − ε)². It has a
    global minimum, at n = ε. A zero unit, which has no direction to grow in, stays zero.

    Args:
        coefficient: λ, zero or positive, or a function of the step that returns it.
        epsilon: ε, the norm at rest, zero or positive.
        form: ``"norm"``, the rule above. ``"std"``, the rule as the authors' own training code has it, for
            faithful comparison: n is the unbiased standard deviation s of the unit, and its mean m is decayed
            by plain L2, so that ∇ + λ((1 − ε/s)(w − m) + m) stands for ∇. It is no function of the norm and
            turns w: only ``mode="coupled"`` applies it.

    Example:
        >>> EpsilonShiftedL2(1.0, epsilon=0.5).flow(torch.tensor([0.1, 0.5, 9.0]), time=100.0)
        tensor([0.5000, 0.5000, 0.5000])
    """

    epsilon: float = 1e-3
    _: KW_ONLY
    form: str = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "epsilon", checked("epsilon", self.epsilon))
        if self.form not in ("norm", "std"):
            raise ValueError(f"form={self.form!r} is not known: choose from 'norm', 'std'")

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that can apply it."""
        return super().modes if self.form == "norm" else ("coupled",)

    def _rate(self, norm: Tensor) -> Tensor:
        return torch.where(norm > 0, self.strength * (1 - self.epsilon / norm), torch.zeros_like(norm))

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        # not ε + (n − ε)·e^(−λt), which loses all digits of a small n
        elapsed = -self.strength * time
        return norm * torch.exp(elapsed) - self.epsilon * torch.expm1(elapsed)

    def _penalty(self, norm: Tensor) -> Tensor:
        return self.strength * (norm - self.epsilon) ** 2 / 2


@dataclass(frozen=True)
class Sphere(Rule):
    """Projection to a sphere: every unit has the norm ``radius`` after each step, whatever time passed.

    Not a flow (no rate leads there in finite time), so :meth:`rate` and :meth:`penalty` raise, and only
    ``mode="flow"`` applies it.

    Args:
        radius: The norm, positive. None: the norm that each unit had when the rule was attached.
        rotate: Whether to scale the update too, so that every unit turns by the same angle in a step: t
            radians, t being the time that the clock gives (with ``clock="lr"`` the learning rate), in the
            direction of the tangential part of the optimizer's update. The optimizer is asked for a
            direction only. Costs a copy of the parameters. Sources: Kosson et al., "Rotational Equilibrium",
            arXiv 2305.17212, section 5 (rotational variants, which hold the average angle); Wen et al.,
            "Hyperball Optimization", arXiv 2606.16899 (updates of norm ηR, whole matrices: ``dim=None``;
            its angle is η up to the part of the update along w). A unit whose update has no tangential part
            does not turn.

    Example:
        >>> Sphere(radius=2.0).flow(torch.tensor([0.1, 5.0]), time=0.1)
        tensor([2., 2.])
    """

    radius: float | None = None
    _: KW_ONLY
    rotate: bool = False

    projects = True

    def __post_init__(self) -> None:
        if self.radius is not None:
            object.__setattr__(self, "radius", checked("radius", self.radius, positive=True))

    def bound_to(self, norms: Tensor) -> Rule:
        """Return the sphere through these norms, where no radius was given."""
        return self if self.radius is not None else _BoundSphere(self.radius, rotate=self.rotate, norms=norms)

    def _rate(self, norm: Tensor) -> Tensor:
        raise ValueError('a Sphere is a projection and has no rate: use mode="flow", or another rule')

    def _penalty(self, norm: Tensor) -> Tensor:
        raise ValueError("a Sphere is a projection and has no penalty: use another rule")

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        if self.radius is None:
            raise ValueError(
                "this Sphere takes its radius from the units it is attached to: give radius=, or use Decay"
            )
        return torch.full_like(norm, self.radius)


@dataclass(frozen=True, eq=False)
class _BoundSphere(Sphere):
    _: KW_ONLY
    norms: Tensor

    def _flow(self, norm: Tensor, time: Tensor) -> Tensor:
        return self.norms.to(norm)


RULES: tuple[type[Rule], ...] = (L2, AdaptiveWeightShrink, PowerShrink, EpsilonShiftedL2, Sphere)
