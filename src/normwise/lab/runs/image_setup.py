"""How a run on images begins: the network, and the optimizer with the rule at work beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.models.convnet import ConvNet, directions, initialise
from normwise.lab.runs.settings import ImageSettings, TrainSettings, rule_from

__all__ = ["build", "optimizer_for", "peer_is_installed"]


def build(settings: ImageSettings, classes: int) -> ConvNet:
    """Return the network as it is at the start; the same for all rules and, but for norms, all scales."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ConvNet(settings.member, settings.batch_norm, settings.width, classes)
        initialise(model, getattr(settings, "initialiser", "units"), settings.init_scale)
    return model


def optimizer_for(settings: TrainSettings, model: ConvNet) -> Optimizer:
    """Return the optimizer over all parameters, with the rule at work on the directions and on nothing else.

    Its first group holds all that is no direction, each further one the directions of a layer.

    Raises:
        ValueError: The optimizer is not known, or a package that it needs is not installed.
    """
    weights = directions(model)
    own = {id(weight) for weight in weights.values()}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in own]}]
    groups += [{"params": [weight], "weight_decay": settings.weight_decay} for weight in weights.values()]
    optimizer = _optimizer(settings, groups)
    rule = rule_from(settings.rule)
    if rule is not None:
        nw.Decay(
            optimizer,
            rule,
            weights.values(),
            dim=settings.dim,
            mode=settings.mode,
            clock=settings.clock,
            measure=settings.measure,
        )
    return optimizer


def _optimizer(settings: TrainSettings, groups: list[dict[str, Any]]) -> Optimizer:
    lr, momentum = settings.lr, settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum, fused=True)
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, lr, (momentum, 0.999), weight_decay=0.0, fused=True)
    if settings.optimizer == "sgdp":
        if not peer_is_installed():
            raise ValueError('optimizer="sgdp" needs a peer package: pip install normwise[peers]')
        from pytorch_optimizer import SGDP

        peer: Optimizer = SGDP(groups, lr, momentum=momentum)
        return peer
    raise ValueError(f"optimizer={settings.optimizer!r} is not known: choose from sgd, adam, sgdp")


def peer_is_installed() -> bool:
    """Whether pytorch_optimizer is there, of which SGDP is one."""
    import importlib.util

    return importlib.util.find_spec("pytorch_optimizer") is not None
