"""ResNets in the form for CIFAR: He et al., "Deep Residual Learning" (arXiv 1512.03385), section 4.2."""

from __future__ import annotations

from torch import nn

from normwise.lab.models.residual import BasicBlock, PaddedShortcut, ResidualNetwork, convolution

__all__ = ["CifarResNet"]


class CifarResNet(ResidualNetwork):
    """A stem, three stages of (depth − 2)/6 basic blocks with shortcuts without parameters, a linear head.

    Args:
        depth: Number of layers with weights: 20, 56, 110, or any 6n + 2.
        classes: Outputs of the head.
        channels: Channels of the images.
        batch_norm: Whether a batch norm follows each convolution.
        width: Channels of the first stage; the others have two and four times as many.

    Shapes:
        Images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: ``depth`` is not 6n + 2.

    Example:
        >>> import torch
        >>> CifarResNet(8, classes=10, channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int, classes: int, channels: int = 3, batch_norm: bool = True, width: int = 16
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth} is not possible: give 6n + 2, such as 20, 56 or 110")
        stem = nn.Sequential(convolution(channels, width, 3, batch_norm=batch_norm), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for factor in (1, 2, 4):
            outputs = factor * width
            for _ in range((depth - 2) // 6):
                stride = 1 if inputs == outputs else 2
                shortcut = nn.Identity() if stride == 1 else PaddedShortcut(inputs, outputs, stride)
                blocks.append(BasicBlock(inputs, outputs, stride, shortcut, batch_norm))
                inputs = outputs
        super().__init__(stem, blocks, inputs, classes)
