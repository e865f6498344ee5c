"""Normalising the weights of a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from normwise.normalization._attachment import chains
from normwise.normalization._optimizers import check_takes_gains, groups_in_order, move, put_in_order
from normwise.normalization.parametrizations import build, install

__all__ = ["Conversion", "convert"]

Skip = Collection[str] | Callable[..., bool]

_GAIN_BY_DEFAULT = {"weight_norm": True, "centered_weight_norm": True, "weight_standardization": False}


class Conversion(list[str]):
    """The qualified names of the converted weights.

    Attributes:
        not_preserved: The converted weights whose values, and with them the outputs, changed by more than
            rounding.
    """

    not_preserved: tuple[str, ...] = ()


class _Target(NamedTuple):
    label: str  # the qualified name
    module: nn.Module
    name: str
    dim: int


def convert(
    model: nn.Module,
    kind: str,
    skip: Skip = (),
    gain: bool | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    preserve: bool = False,
    eps: float = 0.0,
    fan_in_scale: bool = False,
    variant: str | None = None,
) -> Conversion:
    """Normalise the weights of every layer of ``model``, in place.

    This covers Linear, Bilinear, convolutions (units along dim 0), transposed convolutions (units along
    dim 1), embeddings, the input and recurrent weights of RNN, LSTM, GRU and their cells, and the projections
    of MultiheadAttention. Heads are the user's choice: name them in ``skip``. An error leaves the model
    unchanged.

    Convert before you build the optimizer, an EMA copy, DDP or FSDP: conversion makes new parameters. To
    convert later, pass the existing optimizer as ``optimizer``: the weight then replaces the old parameter in
    its group, the gain goes to a group without weight decay (a new one, if need be), and both take over the
    state. First-order state (momentum, ``exp_avg``) transforms as a gradient does, squared gradients as their
    squares. State under other names stays with the weight.

    Args:
        model: Any module, also a single layer.
        kind: "weight_norm", "centered_weight_norm" or "weight_standardization".
        skip: Weights to leave plain: names of modules (with everything in them) or of weights; or a
            predicate, called with the qualified name of the weight, such as "encoder.0.weight", and, if it
            takes two arguments, the module.
        gain: Whether units have a trainable gain. None: weight norms do, standardised weights do not.
        optimizer: An optimizer that holds parameters of ``model`` and shall hold the new ones.
        preserve: Raise instead of changing the outputs; the error names the weights that would change.
        eps: For "weight_standardization", see there.
        fan_in_scale: For "weight_standardization", see there.
        variant: "pytorch_insight": the model holds the plain weights of a checkpoint that was trained with
            weight standardisation as PytorchInsight and its many copies compute it,
            (v − mean)/(s + 1e-5) with s the unbiased standard deviation. A gain, which the conversion then
            needs, starts at the value for which each weight equals this one. None: as in the paper.

    Returns:
        The qualified names of the converted weights, as a list. Its attribute ``not_preserved`` names those
        whose values changed: weight norm with a gain preserves every weight, the centered members with a gain
        preserve weights of mean zero.

    Raises:
        ValueError: A layer is parametrized already, shares its weight with another layer (which conversion
            would split), has units without a direction, or would change its outputs although ``preserve``
            forbids it; the optimizer cannot take the gains; or ``kind``, ``variant`` or a name in ``skip`` is
            unknown.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
        >>> convert(model, "weight_norm", skip=["3"])
        ['0.weight']
    """
    if kind not in _GAIN_BY_DEFAULT:
        raise ValueError(f"kind={kind!r} is unknown: give one of {', '.join(_GAIN_BY_DEFAULT)}")
    if kind != "weight_standardization" and (eps or fan_in_scale):
        raise ValueError(
            f"eps and fan_in_scale are options of weight_standardization, not of {kind}: omit them"
        )
    if variant is not None:
        if variant != "pytorch_insight":
            raise ValueError(f"variant={variant!r} is unknown: give 'pytorch_insight' or None")
        if kind != "weight_standardization" or gain is False or preserve or eps or fan_in_scale:
            raise ValueError(
                f"variant={variant!r} is weight_standardization with a gain: omit gain, preserve, eps and "
                "fan_in_scale"
            )
    gain = _GAIN_BY_DEFAULT[kind] or variant is not None if gain is None else gain
    targets = _select(model, skip)
    _refuse_shared(model, targets)
    built = [build(t.module, t.name, kind, t.dim, gain, eps, fan_in_scale, t.label) for t in targets]
    weights = [getattr(target.module, target.name) for target in targets]
    changed = tuple(
        target.label
        for target, parametrization, weight in zip(targets, built, weights, strict=True)
        if variant is not None or not parametrization.preserves(weight)
    )
    if preserve and changed:
        raise ValueError(
            f"{kind} with gain={gain} would change the outputs of {', '.join(changed)}: "
            "skip them, use weight_norm with a gain, or omit preserve"
        )
    in_order, groups = [], 0
    if optimizer is not None:
        if gain:
            check_takes_gains(optimizer, weights)
        in_order, groups = groups_in_order(optimizer, model), len(optimizer.param_groups)
    for target, parametrization, old in zip(targets, built, weights, strict=True):
        install(target.module, target.name, parametrization)
        if variant is not None:
            _set_gain_of_pytorch_insight(chains(target.module)[target.name])
        if optimizer is not None:
            move(optimizer, old, list(chains(target.module)[target.name].parameters()), parametrization)
    if optimizer is not None:
        put_in_order(optimizer, model, [*in_order, *range(groups, len(optimizer.param_groups))])
    result = Conversion(target.label for target in targets)
    result.not_preserved = changed
    return result


def _select(model: nn.Module, skip: Skip) -> list[_Target]:
    """Return the weights to convert, in the order of the modules."""
    skipped: Callable[..., bool] = skip if callable(skip) else _by_names(model, skip)
    takes_module = len(inspect.signature(skipped).parameters) >= 2
    targets = []
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, dim in _weights_of(module):
            label = f"{prefix}.{name}" if prefix else name
            if not (skipped(label, module) if takes_module else skipped(label)):
                targets.append(_Target(label, module, name, dim))
    return targets


def _by_names(model: nn.Module, names: Collection[str]) -> Callable[[str], bool]:
    if isinstance(names, str):
        raise TypeError(f"skip must be a collection of names or a predicate, not a string: give [{names!r}]")
    known = {name for name, _ in model.named_modules()}
    known |= {
        f"{prefix}.{name}" if prefix else name
        for prefix, m in model.named_modules()
        for name, _ in _weights_of(m)
    }
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"skip contains {unknown}, which the model does not have: give names of modules or weights"
        )
    return lambda label: any(label == name or label.startswith(f"{name}.") for name in names)


def _weights_of(module: nn.Module) -> list[tuple[str, int]]:
    """Return (name, dim of the units) of the weights of a layer, plain or parametrized."""
    if isinstance(module, nn.Linear | nn.Bilinear | nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return [("weight", 1 if getattr(module, "transposed", False) else 0)]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        plain = [name for name, value in module._parameters.items() if value is not None]
        # weight_ih_l0, weight_hh_l0_reverse, in_proj_weight, q_proj_weight; not bias_k, in_proj_bias
        return [(name, 0) for name in [*plain, *chains(module)] if "weight" in name]
    return []


def _refuse_shared(model: nn.Module, targets: list[_Target]) -> None:
    """Raise if another layer uses the same parameter as a weight that is to be converted."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, value in module._parameters.items():
            owners.setdefault(id(value), []).append(f"{prefix}.{name}" if prefix else name)
    for target in targets:
        value = target.module._parameters.get(target.name)
        if value is not None and len(owners[id(value)]) > 1:
            raise ValueError(
                f"{target.label} is shared: {' and '.join(owners[id(value)])} are one parameter, "
                "which conversion would split: skip all of them"
            )


def _set_gain_of_pytorch_insight(originals: nn.Module) -> None:
    """Turn the gain that preserves a weight, its biased standard deviation s′, into s′/(s + 1e-5)."""
    gain, weight = originals.get_parameter("original0"), originals.get_parameter("original1")
    size = weight.numel() // gain.numel()
    with torch.no_grad():
        std = gain.double()
        gain.copy_(std / (std * (size / (size - 1)) ** 0.5 + 1e-5))
