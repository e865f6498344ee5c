"""Decay rules of equal strength."""

from __future__ import annotations

import dataclasses
import math

from normwise.decay.rules import Rule
from normwise.theory._arguments import check_mode, check_momentum, check_rule, constant, wide

__all__ = ["match"]


def match(
    rule: Rule,
    to: type[Rule] | Rule,
    norm: float = 1.0,
    momentum: float = 0.0,
    mode: str = "flow",
    to_mode: str = "flow",
) -> Rule:
    """Return the rule of class ``to`` that pulls as strongly as ``rule`` on units of this norm.

    A decoupled rule shrinks a unit by lr·c(n) per step. A coupled rule adds c(n)·w to the gradient, which
    enters the momentum buffer; the buffer multiplies a constant input by 1/(1−μ), and lr multiplies the
    buffer. So the two match where c_decoupled(n) = c_coupled(n)/(1−μ), whatever the learning rate. Matched
    rules have the same equilibrium if ``norm`` is the equilibrium norm. Rules of the same class match at all
    norms.

    The match is valid for ``clock="lr"``, to first order in lr·c(n)/(1−μ). Adam-like optimizers divide a
    coupled rule by the size of the gradient, so for them match decoupled rules only.

    Args:
        rule: The rule to match, with a constant coefficient.
        to: A class of rules, or an instance where more than a coefficient is needed, as in
            ``PowerShrink(1.0, power=2.0)``, whose coefficient is replaced.
        norm: The norm at which the rules match, positive. With ``measure="rms"``: an RMS.
        momentum: μ of SGD (no dampening). It matters if exactly one of the modes is "coupled".
        mode: How ``rule`` is applied: "flow", "explicit" or "coupled".
        to_mode: How the result will be applied.

    Returns:
        A rule of the class of ``to``.

    Raises:
        TypeError: ``rule`` is not a rule; ``to`` is neither a rule nor a class of rules, or needs more than a
            coefficient; or another argument is not a number.
        ValueError: A number is out of range; a rule is a Sphere, has a scheduled coefficient, or does not
            pull inwards at ``norm``.

    Example:
        >>> from normwise import L2, AdaptiveWeightShrink
        >>> match(L2(0.01), AdaptiveWeightShrink, norm=2.0)
        AdaptiveWeightShrink(coefficient=0.005)
        >>> match(L2(0.0005), L2, momentum=0.75, mode="coupled", to_mode="flow")
        L2(coefficient=0.002)
    """
    mode, to_mode = check_mode(mode), check_mode(to_mode, "to_mode")
    momentum, norm = check_momentum(momentum), _number("norm", norm)
    pull = _pull(_with_rate(rule, mode, "rule"), norm, "rule")
    unit_rule = _with_rate(_with_coefficient_one(to), to_mode, "to")
    if mode == "coupled":
        pull /= 1 - momentum
    if to_mode == "coupled":
        pull *= 1 - momentum
    coefficient = pull / _pull(unit_rule, norm, "to")
    return dataclasses.replace(unit_rule, coefficient=coefficient)  # type: ignore[type-var]


def _number(name: str, value: float) -> float:
    tensor = wide(name, value)
    if tensor.numel() != 1:
        raise TypeError(f"{name} must be one number, not a tensor of shape {tuple(tensor.shape)}")
    return tensor.item()


def _with_coefficient_one(to: type[Rule] | Rule) -> Rule:
    """Return the rule of this class whose coefficient is 1."""
    if not isinstance(to, Rule) and not (isinstance(to, type) and issubclass(to, Rule)):
        raise TypeError(f"to must be a decay rule or a class of rules, such as L2, not {to!r}")
    if isinstance(to, Rule):
        refused = to.scheduled or to.projects
        return to if refused else dataclasses.replace(to, coefficient=1.0)  # type: ignore[type-var]
    try:
        return to(1.0)  # type: ignore[call-arg]
    except TypeError as error:
        raise TypeError(
            f"to={to.__name__} needs more than a coefficient ({error}): "
            f"give an instance, {to.__name__}(1.0, ...), whose coefficient is replaced"
        ) from None


def _with_rate(rule: Rule, mode: str, name: str) -> Rule:
    if isinstance(rule, Rule) and rule.projects:
        raise ValueError(f"{name}={rule} is a projection and has no rate to match: give another rule")
    return constant(check_rule(rule, mode), name)


def _pull(rule: Rule, norm: float, name: str) -> float:
    rate = rule.rate(norm).item()
    if not 0 < rate < math.inf:
        raise ValueError(
            f"{name}={rule} has the rate {rate:g} at norm={norm:g}, which cannot be matched: "
            "give a norm at which it pulls inwards"
        )
    return rate
