"""Replacing a converted weight in an existing optimizer, with its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normwise.normalization._exact import exact_backward, unit_and_slope
from normwise.normalization.parametrizations import NormalizedWeight

__all__ = ["groups_in_order", "move", "put_in_order"]

# Per-element state of optimizers: sums of gradients, which transform as gradients do, and of their squares.
_FIRST_ORDER = {"momentum_buffer", "exp_avg", "grad_avg", "mu", "ax"}
_SECOND_ORDER = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def move(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: list[nn.Parameter],
    parametrization: NormalizedWeight,
) -> None:
    """Replace ``old`` in ``optimizer`` by ``new``, the originals of the converted weight.

    In its group the weight takes the position of the old parameter and the gain follows. An optimizer that
    does not hold ``old`` stays unchanged.

    Args:
        optimizer: Any torch optimizer.
        old: The parameter that was converted, with its value from before.
        new: (gain, weight), or (weight,).
        parametrization: The parametrization that was put on it.
    """
    *gains, weight = new
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][position : position + 1] = [weight, *gains]
                if "param_names" in group:
                    name = group["param_names"][position]
                    prefix, _, last = name.rpartition(".")
                    key = f"{prefix}.parametrizations.{last}.original".lstrip(".")
                    names = [f"{key}1", f"{key}0"] if gains else [key]
                    group["param_names"][position : position + 1] = names
                state = optimizer.state.pop(old, None)
                if state:
                    _move_state(optimizer, state, old, weight, gains[0] if gains else None, parametrization)
                return


def groups_in_order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[int]:
    """Return the indices of the groups that list their parameters in the model's order."""
    order = {p: k for k, p in enumerate(model.parameters())}
    positions = [[order.get(p, -1) for p in group["params"]] for group in optimizer.param_groups]
    return [k for k, ordered in enumerate(positions) if -1 not in ordered and ordered == sorted(ordered)]


def put_in_order(optimizer: torch.optim.Optimizer, model: nn.Module, groups: list[int]) -> None:
    """Sort the parameters of ``groups`` as the model lists them.

    A saved optimizer knows parameters by their position. One that is built for the converted model must
    therefore have the same order.
    """
    order = {p: k for k, p in enumerate(model.parameters())}
    for group in (optimizer.param_groups[k] for k in groups):
        params = group["params"]
        permutation = sorted(range(len(params)), key=lambda k: order[params[k]])
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][k] for k in permutation]


def _move_state(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    old: nn.Parameter,
    weight: nn.Parameter,
    gain: nn.Parameter | None,
    parametrization: NormalizedWeight,
) -> None:
    formula = parametrization.formula
    of_weight, of_gain, complete = {}, {}, True
    with torch.no_grad():
        unit, slope = unit_and_slope(old, gain, formula)
        for key, value in state.items():
            per_element = isinstance(value, Tensor) and value.shape == old.shape and value.ndim > 0
            if per_element and key in _FIRST_ORDER:
                of_weight[key], of_gain[key] = exact_backward(value, old, gain, formula)
            elif per_element and key in _SECOND_ORDER:
                # E[(Σ aᵢgᵢ)²] = Σ aᵢ²·E[gᵢ²] for uncorrelated gradients.
                of_weight[key] = (value * slope**2).to(value.dtype)
                if gain is not None:
                    along = (value * (unit * formula.factor) ** 2).sum_to_size(gain.shape or (1,) * old.ndim)
                    of_gain[key] = along.reshape(gain.shape).to(value.dtype)
            elif per_element:
                of_weight[key], complete = value, False
            else:
                of_weight[key] = value
                of_gain[key] = value.clone() if isinstance(value, Tensor) else value
        optimizer.state[weight] = of_weight
        if gain is not None and complete:
            optimizer.state[gain] = of_gain
