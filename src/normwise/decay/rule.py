"""What a decay rule is: a scalar field on norms. The rules themselves are in rules.py."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from normwise.norms import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Coefficient", "Rule", "Shrink", "checked"]

Coefficient: TypeAlias = float | Callable[[int], float]


def checked(name: str, value: object, *, positive: bool = False) -> float:
    """Return ``value`` as a float, or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "positive" if positive else "zero or positive"
        raise ValueError(f"{name}={value} is not allowed: give a finite number that is {allowed}")
    return value


class Rule(ABC):
    """A decay rule: a scalar field on norms. The subclasses are values: frozen, comparable, printable.

    Attributes:
        projects: Whether it is a projection and no flow: then it has no rate and no penalty.
    """

    projects: ClassVar[bool] = False

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of Decay that can apply it."""
        return ("flow",) if self.projects else ("flow", "explicit", "coupled")

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
            >>> from normwise.decay.rules import AdaptiveWeightShrink
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
            >>> from normwise.decay.rules import AdaptiveWeightShrink
            >>> AdaptiveWeightShrink(1.0).flow(torch.tensor([1.0, 1e30]), time=1.0)
            tensor([0.5000, 1.0000])
        """
        norm, wide = _widened(norm)
        if not isinstance(time, Tensor):  # stays on the CPU: a copy would make CUDA wait, a scalar does not
            time = torch.tensor(checked("time", time), dtype=wide.dtype, device="cpu")
        elif time.ndim or time.device.type != "cpu":
            time = time.to(wide.device)
        time = time.to(wide.dtype)
        moved = self._flow(wide, time)
        return torch.where(wide > 0, moved, wide).to(norm.dtype)

    def penalty(self, norm: Tensor | float) -> Tensor:
        """Return R(n), the regularizer whose gradient is c(n)·n along the ray; differentiable.

        Args:
            norm: Norms of units, zero or positive, of any shape.

        Returns:
            A tensor of the shape and type of ``norm``.

        Example:
            >>> from normwise.decay.rules import L2
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
            >>> from normwise.decay.rules import L2
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


def _widened(norm: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the norm as a tensor, and in the widest type that its device computes in."""
    norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
    if not norm.is_floating_point():
        raise TypeError(f"norm must be a floating-point tensor, not {norm.dtype}")
    return norm, norm.to(wide_dtype(norm.device))


@dataclass(frozen=True)
class Shrink(Rule):
    """A rule with a coefficient λ."""

    coefficient: Coefficient

    def __post_init__(self) -> None:
        if not callable(self.coefficient):
            object.__setattr__(self, "coefficient", checked("coefficient", self.coefficient))

    @property
    def strength(self) -> float:
        """λ as a number."""
        if callable(self.coefficient):
            raise ValueError(
                f"the coefficient of this {type(self).__name__} is a function of the step: "
                "call .at(step) first, as Decay does"
            )
        return self.coefficient
