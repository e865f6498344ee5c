"""Parts of residual networks: a convolution with its batch norm, two kinds of block, shortcuts, the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "Bottleneck", "PaddedShortcut", "ResidualNetwork", "convolution", "projection"]


def convolution(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, batch_norm: bool = True
) -> nn.Sequential:
    """Return a convolution that keeps the image size (divided by ``stride``), followed by a batch norm.

    Without batch norm the convolution has a bias.

    Example:
        >>> [type(layer).__name__ for layer in convolution(3, 8, 3)]
        ['Conv2d', 'BatchNorm2d']
    """
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if batch_norm else nn.Sequential(conv)


def projection(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Module:
    """Return the shortcut of a block: a 1×1 convolution where sizes change, otherwise the identity."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return convolution(inputs, outputs, 1, stride=stride, batch_norm=batch_norm)


class PaddedShortcut(nn.Module):
    """The shortcut without parameters (option A of He et al. 2016): every second pixel, new channels zero.

    Shapes:
        (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉). The new channels lie on either side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded images."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; ReLU after the first and after the sum."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: nn.Module, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            convolution(inputs, outputs, 3, stride=stride, batch_norm=batch_norm),
            nn.ReLU(),
            convolution(outputs, outputs, 3, batch_norm=batch_norm),
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the images after this block."""
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total.relu()


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a 1×1 convolution and a projected shortcut. The 3×3 one has the stride and groups."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        stride: int,
        groups: int = 1,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            convolution(inputs, middle, 1, batch_norm=batch_norm),
            nn.ReLU(),
            convolution(middle, middle, 3, stride=stride, groups=groups, batch_norm=batch_norm),
            nn.ReLU(),
            convolution(middle, outputs, 1, batch_norm=batch_norm),
        )
        self.shortcut = projection(inputs, outputs, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the images after this block."""
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total.relu()


class ResidualNetwork(nn.Module):
    """A stem, residual blocks one after the other, global average pooling, a linear head.

    Args:
        stem: Images to the inputs of the first block.
        blocks: The blocks.
        outputs: Channels of the last block.
        classes: Outputs of the head.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], outputs: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(outputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits
