"""Checks of the arguments that the theory's functions share."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from normwise.decay.rules import MODES, Rule
from normwise.norms import wide_dtype

__all__ = ["check_degree", "check_mode", "check_momentum", "check_rule", "constant", "wide"]


def wide(name: str, value: Any, *, zero: bool = False) -> Tensor:
    """Return ``value`` as a tensor of the widest type, or raise an error that names it.

    Args:
        name: The name of the user's argument.
        value: A number, a real tensor, or a sequence of numbers.
        zero: Whether 0 is allowed.

    Raises:
        TypeError: ``value`` is not made of real numbers.
        ValueError: A number in ``value`` is not finite, or not positive.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex() or tensor.dtype == torch.bool:
        given = type(value).__name__ if tensor is None or tensor.ndim else repr(value)
        raise TypeError(f"{name} must be a real number or a tensor of real numbers, not {given}")
    if not isinstance(value, Tensor):  # Python's numbers are float64, whatever torch's default type is
        tensor = torch.as_tensor(value, dtype=torch.float64)
    tensor = tensor.detach().to(wide_dtype(tensor.device))
    wrong = ~torch.isfinite(tensor) | (tensor < 0 if zero else tensor <= 0)
    if bool(wrong.any()):
        allowed = "zero or positive" if zero else "positive"
        raise ValueError(f"{name}={tensor[wrong][0].item():g} is not allowed: give finite, {allowed} numbers")
    return tensor


def check_degree(degree: object) -> int:
    """Return ``degree`` if it is 1 or 2, or raise an error."""
    if not isinstance(degree, int) or isinstance(degree, bool) or degree not in (1, 2):
        raise ValueError(f"degree={degree!r} is not allowed: give 2 for SGD, 1 for Adam-like optimizers")
    return degree


def check_momentum(momentum: object) -> float:
    """Return ``momentum`` as a float in [0, 1), or raise an error."""
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number, not {momentum!r}")
    momentum = float(momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} is not allowed: give a number from 0 to below 1")
    return momentum


def check_mode(mode: object, name: str = "mode") -> str:
    """Return ``mode`` if it is a mode of Decay, or raise an error."""
    if mode not in MODES:
        raise ValueError(f"{name}={mode!r} is not a mode: give one of {', '.join(map(repr, MODES))}")
    return str(mode)


def check_rule(rule: object, mode: str, degree: int = 2) -> Rule:
    """Return ``rule`` if it is a function of the norm that this mode can apply, or raise an error."""
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a decay rule such as L2(0.1), not {rule!r}")
    if "flow" not in rule.modes:
        raise ValueError(f"rule={rule} is not a function of the norm, and has no theory: give one that is")
    if mode not in rule.modes:
        allowed = " or ".join(f"mode={known!r}" for known in rule.modes)
        raise ValueError(f"mode={mode!r} cannot apply {rule}: give {allowed}")
    if mode == "coupled" and degree == 1:
        raise ValueError(
            'mode="coupled" with degree=1 has no theory: an Adam-like optimizer divides the decay by the '
            'size of the gradient; use mode="flow" or mode="explicit"'
        )
    return rule


def constant(rule: Rule, name: str = "rule") -> Rule:
    """Return ``rule`` if its coefficient is a number, or raise an error."""
    if rule.scheduled:
        raise ValueError(
            f"{name}={type(rule).__name__} has a coefficient that is a function of the step: "
            "give the rule of one step, rule.at(step)"
        )
    return rule
