"""Small image networks beside :class:`~normwise.lab.models.convnet.ConvNet`, normalised by batch norm."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

__all__ = ["MLP", "ResidualNet"]


class ResidualNet(nn.Module):
    """A residual network: a stem and three blocks of two convolutions, each followed by a batch norm.

    Args:
        width: Channels of the stem and the first block; the others have two and four times as many.
        classes: Outputs of the head.

    Shapes:
        Images (N, 1, H, W) to logits (N, classes).

    Example:
        >>> import torch
        >>> ResidualNet()(torch.zeros(2, 1, 7, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        sizes = [width, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(*(_Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(sizes)))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.body(x) + self.shortcut(x)
        return added.relu()


class MLP(nn.Module):
    """A perceptron with two hidden layers, each followed by a batch norm.

    Args:
        inputs: Number of pixels.
        width: Hidden units of the first layer; the second has as many.
        classes: Outputs of the head.

    Shapes:
        Images (N, 1, H, W) with H·W = ``inputs`` to logits (N, classes).

    Example:
        >>> import torch
        >>> MLP(49)(torch.zeros(2, 1, 7, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, inputs: int, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for size in (inputs, width):
            layers += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(images))
        return logits
