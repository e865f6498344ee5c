"""The network of the experiments: convolutions of the weight-normalisation family and a plain linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normwise as nw

__all__ = ["INITIALISERS", "MEMBERS", "ConvNet", "directions", "initialise", "scale_directions"]

MEMBERS = ("weight_norm", "centered_weight_norm", "weight_standardization", "plain")
INITIALISERS = ("units", "layers", "torch", "kaiming_normal", "xavier_uniform", "orthogonal", "normal_0.02")
SPREAD = 3.0  # "layers" draws scales from this many decades on either side of 1


class ConvNet(nn.Module):
    """Three 3×3 convolutions (strides 1, 2, 2), each with ReLU, global average pooling, and a linear head.

    Args:
        member: How the convolutions are normalised: one of :data:`MEMBERS`. ``"plain"`` does not normalise
            them, so they are scale-invariant only with batch norm.
        batch_norm: Whether a batch norm follows each convolution. Without it, the convolutions have a gain
            and a bias.
        width: Channels of the first convolution; the others have two and four times as many.
        classes: Outputs of the head.

    Shapes:
        Images (N, 1, H, W) to logits (N, classes).

    Example:
        >>> ConvNet("weight_norm")(torch.zeros(2, 1, 14, 14)).shape
        torch.Size([2, 10])
    """

    def __init__(self, member: str, batch_norm: bool = True, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        if member not in MEMBERS:
            raise ValueError(f"member={member!r} is not known: choose from {', '.join(MEMBERS)}")
        if member == "plain" and not batch_norm:
            raise ValueError(
                'member="plain" without batch norm is not normalised at all: use batch_norm=True'
            )
        blocks: list[nn.Module] = []
        inputs = 1
        for stride, factor in ((1, 1), (2, 2), (2, 4)):
            outputs = factor * width
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not batch_norm)
            blocks += [_normalized(conv, member, batch_norm)]
            blocks += [nn.BatchNorm2d(outputs)] if batch_norm else []
            blocks += [nn.ReLU()]
            inputs = outputs
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(images))
        return logits


def _normalized(conv: nn.Conv2d, member: str, batch_norm: bool) -> nn.Conv2d:
    if member == "weight_norm":
        return nw.weight_norm(conv)
    if member == "centered_weight_norm":
        return nw.centered_weight_norm(conv, gain=not batch_norm)
    if member == "weight_standardization":
        return nw.weight_standardization(conv, gain=not batch_norm)
    return conv


def directions(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by layer the weights of which only the direction matters: all but those of ``model.head``.

    The rules under test decay these.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != "head":
            originals = dict(module.named_parameters())
            for key in (
                "parametrizations.weight.original1",
                "parametrizations.weight.original",
                "weight",
            ):
                if key in originals:
                    found[name] = originals[key]
                    break
    return found


@torch.no_grad()
def scale_directions(model: nn.Module, scale: float) -> None:
    """Rescale every unit of :func:`directions` to the norm ``scale``. The model's outputs do not change."""
    for weight in directions(model).values():
        unit = nw.Unit(weight)
        weight.mul_(unit.broadcast((scale / unit.norms()).to(weight.dtype), weight))


@torch.no_grad()
def initialise(model: nn.Module, initialiser: str, scale: float) -> None:
    """Initialise the weights of :func:`directions` from torch's global random state.

    Args:
        model: The newly constructed network.
        initialiser: "units": torch's directions, with every unit at norm ``scale``. "layers": the same, but
            each layer is multiplied by a random power of ten from 10⁻³ to 10³. "torch": torch's default,
            times ``scale``. Otherwise a function of ``torch.nn.init``, or "normal_0.02" with that standard
            deviation, times ``scale``.
        scale: Positive.

    Raises:
        ValueError: The initialiser is unknown.
    """
    if initialiser not in INITIALISERS:
        raise ValueError(f"initialiser={initialiser!r} is not known: choose from {', '.join(INITIALISERS)}")
    if initialiser in ("units", "layers"):
        scale_directions(model, scale)
    for weight in directions(model).values():
        if initialiser == "layers":
            weight.mul_(10 ** float(torch.empty(()).uniform_(-SPREAD, SPREAD)))
        elif initialiser == "normal_0.02":
            nn.init.normal_(weight, std=0.02)
        elif initialiser not in ("units", "torch"):
            getattr(nn.init, f"{initialiser}_")(weight)
        if initialiser not in ("units", "layers"):
            weight.mul_(scale)
