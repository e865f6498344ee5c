"""Replacing a converted weight in an existing optimizer, with its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normwise.normalization._exact import exact_backward, unit_and_slope
from normwise.normalization.parametrizations import NormalizedWeight

__all__ = ["check_takes_gains", "groups_in_order", "move", "put_in_order"]

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

    In its group the weight takes the position of the old parameter. The gain goes to the same group if that
    has no weight decay; otherwise to one with the same options and no decay, added if there is none. An
    optimizer that does not hold ``old`` stays unchanged.

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
                key = ""
                group["params"][position] = weight
                if "param_names" in group:
                    prefix, _, last = group["param_names"][position].rpartition(".")
                    key = f"{prefix}.parametrizations.{last}.original".lstrip(".")
                    group["param_names"][position] = f"{key}1" if gains else key
                for gain in gains:
                    _add_without_decay(optimizer, group, gain, f"{key}0")
                state = optimizer.state.pop(old, None)
                if state:
                    _move_state(optimizer, state, old, weight, gains[0] if gains else None, parametrization)
                return


def check_takes_gains(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """Raise if ``optimizer`` holds one of ``weights`` but cannot take a gain for it.

    Raises:
        ValueError: The optimizer is Muon, which would orthogonalise the gains, or it needs a new group for
            them but already has a learning rate scheduler.
    """
    converted = set(weights)
    groups = [group for group in optimizer.param_groups if not converted.isdisjoint(group["params"])]
    if groups and "muon" in type(optimizer).__name__.lower():
        raise ValueError(
            f"{type(optimizer).__name__} would orthogonalise the gains: convert with gain=False, or convert "
            "first and give the gains to another optimizer"
        )
    if any("initial_lr" in g and _group_without_decay(optimizer, g) is None for g in groups):
        raise ValueError(
            "the gains need a parameter group without weight decay, but the optimizer's learning rate "
            "scheduler cannot follow a new group: convert before building the scheduler, or give the "
            "optimizer a group with the same options and weight_decay=0"
        )


def _group_without_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``group`` or a group that differs from it in weight decay only, and has none."""
    if not group.get("weight_decay"):
        return group
    ignored = {"params", "param_names", "weight_decay"}
    options = {key: value for key, value in group.items() if key not in ignored}
    for other in optimizer.param_groups:
        same = all(key in other and bool(other[key] == value) for key, value in options.items())
        if same and not other["weight_decay"]:
            return other
    return None


def _add_without_decay(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], gain: nn.Parameter, name: str
) -> None:
    """Add a gain to ``group`` or, if that has weight decay, to one that has none."""
    target = _group_without_decay(optimizer, group)
    if target is None:
        options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
        named = options.pop("param_names", None) is not None
        options |= {"params": [(name, gain)] if named else [gain], "weight_decay": 0.0}
        optimizer.add_param_group(options)
        return
    target["params"].append(gain)
    if "param_names" in target:
        target["param_names"].append(name)


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
