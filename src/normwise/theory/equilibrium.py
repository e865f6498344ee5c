r"""The norms at which decay and growth balance, and how fast directions turn there.

For a unit w of norm n whose loss is scale-invariant, the gradient is orthogonal to w and of norm γ/n, where
γ depends on the direction alone. Gradient steps therefore only lengthen w, and decay only shortens it. The
two balance where

    n⁴·c(n) = ηγ²/2 · k      (SGD),        n²·c(n) = ηu²/2 · k      (Adam-like, update norm u),

with learning rate η, decay rate c and a factor k for momentum (1 without). Sources: van Laarhoven, "L2
Regularization versus Batch and Weight Normalization" (arXiv 1706.05350); Wan et al., "Spherical Motion
Dynamics" (arXiv 2006.08419); Kosson et al., "Rotational Equilibrium" (arXiv 2305.17212), all for
c(n) = λ. docs/theory.md derives the equations for any rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.decay.rules import Rule
from normwise.theory._arguments import check_degree, check_mode, check_momentum, check_rule, constant, wide

__all__ = ["effective_lr", "equilibrium_norm", "equilibrium_rotation"]


def effective_lr(lr: Tensor | float, norm: Tensor | float, degree: int = 2) -> Tensor:
    """Return the effective learning rate of a scale-invariant unit: lr/norm².

    The effective learning rate is the learning rate that gives the same change of direction at norm 1. A
    scale-invariant weight that is α times as long has a gradient 1/α times as long, and needs a step α times
    as long to turn as far. Source: van Laarhoven, arXiv 1706.05350. For Adam-like optimizers, whose update
    does not depend on the scale of the gradient, it is lr/norm.

    Args:
        lr: Learning rate, zero or positive: a number or a tensor.
        norm: Norms of units, positive: a number or a tensor that broadcasts against ``lr``.
        degree: 2 for SGD with or without momentum; 1 for Adam-like optimizers.

    Returns:
        A float64 tensor (float32 on MPS) of the broadcast shape; 0-dimensional for two numbers.

    Raises:
        TypeError: An argument is not made of real numbers.
        ValueError: ``lr`` or ``norm`` is negative or not finite, ``norm`` is 0 (a zero unit has no
            direction), or ``degree`` is neither 1 nor 2.

    Example:
        >>> effective_lr(0.1, torch.tensor([1.0, 10.0]))
        tensor([0.1000, 0.0010], dtype=torch.float64)
    """
    return _effective_lr(wide("lr", lr, zero=True), wide("norm", norm), check_degree(degree))


def _effective_lr(lr: Tensor, norm: Tensor, degree: int) -> Tensor:
    return lr / norm**degree


def equilibrium_norm(
    rule: Rule,
    lr: Tensor | float,
    gradient_scale: Tensor | float,
    momentum: float = 0.0,
    mode: str = "flow",
    degree: int = 2,
) -> Tensor:
    """Return the norm at which growth by gradient steps and decay by ``rule`` balance.

    The norm solves n⁴·c(n) = k·lr·γ²/2, with k = 1/(1−μ)² where the rule is decoupled (``mode`` "flow" or
    "explicit") and k = 1/(1−μ) where it is coupled. For ``degree=1`` it solves n²·c(n) = k·lr·u²/2 with
    k = (1+μ)/(1−μ), because updates that are exponential averages with factor μ = β₁ correlate.
    For L2(λ) without momentum, n = (lr·γ²/2λ)^¼. A Sphere gives its radius. A rule that never pulls inwards
    gives an infinite norm.

    The result is valid

    - for a constant learning rate, after about 1/(lr·c(n)) steps;
    - to first order in lr·c(n)/(1−μ). At this order the modes "flow" and "explicit" agree. Without momentum,
      L2 "explicit" settles a fraction lr·c/8 above the result, and "flow" a fraction lr·c/4 below;
    - for gradients that do not correlate from step to step. Real gradients do: with momentum, expect norms up
      to 20 % off;
    - for ``clock="lr"``. For ``clock="step"`` divide the coefficient by lr.

    For ``measure="rms"`` give γ/numel (or u/√numel with ``degree=1``); the result is then the RMS.

    Args:
        rule: A rule with a constant coefficient.
        lr: Learning rate, positive: a number or a tensor.
        gradient_scale: γ = (norm of the gradient) · (norm of the unit), which does not depend on the unit's
            scale. With ``degree=1``: u, the norm of the update before the multiplication by lr. A positive
            number or tensor (one entry per unit).
        momentum: μ of SGD (no dampening); with ``degree=1``: β₁.
        mode: "flow", "explicit" or "coupled", as in Decay.
        degree: 2 for SGD, 1 for Adam-like optimizers.

    Returns:
        Norms, a float64 tensor of the broadcast shape of ``lr`` and ``gradient_scale``.

    Raises:
        TypeError: ``rule`` is not a rule, or another argument is not a number.
        ValueError: A number is out of range; the coefficient is scheduled; the rule is a Sphere without
            radius or in a mode other than "flow"; ``mode="coupled"`` with ``degree=1``; or, in mode
            "explicit", lr·c(n) ≥ 1 at the solution, where a step would flip the weight.

    Example:
        >>> from normwise import L2, AdaptiveWeightShrink
        >>> equilibrium_norm(L2(0.5), lr=0.1, gradient_scale=torch.tensor([1.0, 16.0]))
        tensor([0.5623, 2.2494], dtype=torch.float64)
        >>> equilibrium_norm(AdaptiveWeightShrink(0.5), lr=0.1, gradient_scale=torch.tensor([1.0, 16.0]))
        tensor([0.6310, 1.9127], dtype=torch.float64)
    """
    mode, degree, momentum = check_mode(mode), check_degree(degree), check_momentum(momentum)
    rule = constant(check_rule(rule, mode, degree))
    lr, gradient_scale = wide("lr", lr), wide("gradient_scale", gradient_scale)
    growth = lr * gradient_scale**2 / 2 * _correlation(momentum, mode, degree)
    if rule.projects:
        return rule.flow(torch.ones_like(growth), 0.0)
    norm = _balance(rule, growth, 2 * degree)
    coefficient = (lr * growth / norm ** (2 * degree)).max() if norm.numel() else norm.sum()
    if mode == "explicit" and coefficient >= 1:
        raise ValueError(
            f'mode="explicit" has no equilibrium here: lr·c(norm)={coefficient.item():g} must stay below 1; '
            'use mode="flow", a smaller lr or a smaller coefficient'
        )
    return norm


def equilibrium_rotation(
    rule: Rule,
    lr: Tensor | float,
    gradient_scale: Tensor | float,
    momentum: float = 0.0,
    mode: str = "flow",
    degree: int = 2,
) -> Tensor:
    """Return the angle by which the direction of a unit turns per step at equilibrium, in radians.

    θ = lr·γ/(n²·√(1−μ²)) at n = :func:`equilibrium_norm`, or lr·u/n with ``degree=1``. With the equation for
    the norm this is θ = √(2·lr·c(n)·κ), where κ = (1−μ)/(1+μ) for decoupled rules (both degrees) and
    κ = 1/(1+μ) for coupled rules (Kosson et al., arXiv 2305.17212, for L2). Hence θ ∝ γ⁰ for L2: all units
    turn equally fast whatever their gradients. θ ∝ γ^(1/5) for AdaptiveWeightShrink, and θ ∝ γ on a Sphere,
    where n is the radius.

    The result is valid where :func:`equilibrium_norm` is, and for small angles, θ ≪ 1−μ. Without momentum a
    step turns by the arctangent of the result. On a Sphere with momentum the projection slows the turn by a
    fraction of about θ²·(μ/(1−μ) + μ²/2(1−μ)²). Measured at μ = 0.9: 2 % at θ = 0.02, 7 % at 0.04, 17 % at
    0.08.
    A ``RotatingSphere`` turns by lr.

    Args:
        rule: A rule with a constant coefficient.
        lr: Learning rate, positive: a number or a tensor.
        gradient_scale: γ, or u with ``degree=1``; see :func:`equilibrium_norm`.
        momentum: μ of SGD (no dampening); with ``degree=1``: β₁.
        mode: "flow", "explicit" or "coupled", as in Decay.
        degree: 2 for SGD, 1 for Adam-like optimizers.

    Returns:
        Angles, a float64 tensor of the broadcast shape of ``lr`` and ``gradient_scale``; 0 where the norm
        is infinite.

    Raises:
        TypeError: As for :func:`equilibrium_norm`.
        ValueError: As for :func:`equilibrium_norm`.

    Example:
        >>> from normwise import L2, Sphere
        >>> equilibrium_rotation(L2(0.05), lr=0.1, gradient_scale=torch.tensor([1.0, 16.0]))
        tensor([0.1000, 0.1000], dtype=torch.float64)
        >>> equilibrium_rotation(Sphere(2.0), lr=0.1, gradient_scale=torch.tensor([1.0, 16.0]))
        tensor([0.0250, 0.4000], dtype=torch.float64)
    """
    norm = equilibrium_norm(rule, lr, gradient_scale, momentum, mode, degree)
    if not rule.function_of_norm:  # a sphere that prescribes the angle
        return wide("lr", lr).expand_as(norm).clone()
    # The momentum buffer is √(1/(1−μ²)) times as long as a gradient; u is already the norm of an average.
    update = wide("gradient_scale", gradient_scale) / (math.sqrt(1 - momentum**2) if degree == 2 else 1)
    return _effective_lr(wide("lr", lr), norm, degree) * update


def _correlation(momentum: float, mode: str, degree: int) -> float:
    """Return k, the factor by which momentum changes the balance of growth and decay."""
    if degree == 1:
        return (1 + momentum) / (1 - momentum)
    return 1 / (1 - momentum) ** (1 if mode == "coupled" else 2)


def _balance(rule: Rule, growth: Tensor, exponent: int) -> Tensor:
    """Solve n^exponent·c(n) = growth by bisection in log n; the left side must grow with n."""
    limits = torch.finfo(growth.dtype)
    low = torch.full_like(growth, math.log(limits.tiny))
    top = math.log(limits.max)
    high = torch.full_like(growth, top)
    for _ in range(80):  # 1400/2⁸⁰ is below the rounding of a logarithm
        middle = (low + high) / 2
        pull = rule.rate(torch.exp(middle)).clamp(min=0).log() + exponent * middle
        outside = pull > growth.log()
        low, high = torch.where(outside, low, middle), torch.where(outside, middle, high)
    return torch.where(high < top, torch.exp(high), torch.inf)
