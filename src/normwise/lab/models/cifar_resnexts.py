"""ResNeXts in the form for CIFAR: Xie et al., "Aggregated Residual Transformations" (arXiv 1611.05431)."""

from __future__ import annotations

from torch import nn

from normwise.lab.models.residual import Bottleneck, ResidualNetwork, convolution

__all__ = ["CifarResNeXt"]


class CifarResNeXt(ResidualNetwork):
    """A 3×3 stem, three stages of (depth − 2)/9 bottlenecks with groups, a linear head (section 5.3).

    Args:
        depth: Number of layers with weights: 29, or any 9n + 2.
        classes: Outputs of the head.
        channels: Channels of the images.
        batch_norm: Whether a batch norm follows each convolution.
        groups: Groups of the 3×3 convolutions ("cardinality").
        width: Channels of a group in the first stage, and of the stem.

    Shapes:
        Images (N, channels, H, W) to logits (N, classes).

    Raises:
        ValueError: ``depth`` is not 9n + 2.

    Example:
        >>> import torch
        >>> CifarResNeXt(11, classes=10, groups=2, width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        channels: int = 3,
        batch_norm: bool = True,
        groups: int = 8,
        width: int = 64,
    ) -> None:
        if depth < 11 or depth % 9 != 2:
            raise ValueError(f"depth={depth} is not possible: give 9n + 2, such as 29")
        stem = nn.Sequential(convolution(channels, width, 3, batch_norm=batch_norm), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            middle, outputs = groups * width << stage, 4 * width << stage
            for k in range((depth - 2) // 9):
                stride = 2 if stage > 0 and k == 0 else 1
                blocks.append(Bottleneck(inputs, middle, outputs, stride, groups, batch_norm))
                inputs = outputs
        super().__init__(stem, blocks, inputs, classes)
