"""The paper's networks by name, with any member of the weight-normalisation family in every convolution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import normwise as nw
from normwise.lab.models.cifar_resnets import CifarResNet
from normwise.lab.models.cifar_resnexts import CifarResNeXt
from normwise.lab.models.convnet import MEMBERS
from normwise.lab.models.residual import BasicBlock, Bottleneck
from normwise.lab.models.resnets import ResNet
from normwise.lab.models.vgg import VGG16

__all__ = ["NETWORKS", "build_network", "filters", "scale_filters"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(CifarResNet, 20),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "resnext29_8x64": partial(CifarResNeXt, 29),
    "vgg16_small": partial(VGG16, hidden=0),
    "resnet18": partial(ResNet, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, (3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, (3, 4, 23, 3), bottleneck=True),
    "resnext50_32x4": partial(ResNet, (3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "vgg16": VGG16,
}
"""Name → constructor, called with classes, channels, batch_norm and further arguments of the class."""

_KEYS = ("parametrizations.weight.original1", "parametrizations.weight.original", "weight")


def build_network(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    member: str = "plain",
    batch_norm: bool = True,
    **arguments: int,
) -> nn.Module:
    """Return a network with initial weights drawn from torch's global random state.

    Convolutions start from N(0, 2/fan-out) (He et al. 2015, as in torchvision), hidden linear layers of VGG
    from N(0, 0.01²), heads from torch's default, biases from 0. Without batch norm the last convolution of
    each of the L residual branches is divided by √L: without it the stream would double its variance with
    each block. Then ``member`` takes the place of each convolution's weight, with a gain as
    :class:`normwise.lab.models.convnet.ConvNet` gives it: always for weight norm, for the other members
    where no batch norm follows.

    Args:
        name: One of :data:`NETWORKS`.
        classes: Outputs of the head.
        channels: Channels of the images.
        member: How the convolutions are normalised: one of ``normwise.lab.models.convnet.MEMBERS``.
        batch_norm: Whether a batch norm follows each convolution.
        arguments: Further arguments of the network's class, such as ``width``.

    Raises:
        ValueError: The name or the member is not known.

    Example:
        >>> network = build_network("resnet20", classes=10, member="weight_norm")
        >>> sum(p.numel() for p in network.parameters())  # 269,722 and a gain for each of 688 filters
        270410
    """
    if name not in NETWORKS:
        raise ValueError(f"network={name!r} is not known: choose from {', '.join(NETWORKS)}")
    if member not in MEMBERS:
        raise ValueError(f"member={member!r} is not known: choose from {', '.join(MEMBERS)}")
    network = NETWORKS[name](classes=classes, channels=channels, batch_norm=batch_norm, **arguments)
    _initialise(network, batch_norm)
    if member != "plain":
        linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
        gain = member == "weight_norm" or not batch_norm
        nw.convert(network, member, skip=linear, gain=gain)
    return network


@torch.no_grad()
def _initialise(network: nn.Module, batch_norm: bool) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and name != "head":
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None and name != "head":
            nn.init.zeros_(module.bias)
    branches = [block.branch for block in network.modules() if isinstance(block, BasicBlock | Bottleneck)]
    if not batch_norm:
        for branch in branches:
            for parameter in branch[-1].parameters():
                parameter.mul_(len(branches) ** -0.5)


def filters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return by layer the weight of every convolution: of each filter only the direction matters.

    That holds where the network has a member of the family or batch norm.
    """
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            own = dict(module.named_parameters())
            found[name] = next(own[key] for key in _KEYS if key in own)
    return found


@torch.no_grad()
def scale_filters(network: nn.Module, scale: float) -> None:
    """Multiply the weight of every convolution by ``scale``. A normalised network's outputs do not change."""
    for weight in filters(network).values():
        weight.mul_(scale)
