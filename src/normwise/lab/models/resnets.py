"""ResNets in the form for ImageNet, and ResNeXt-50, which is a ResNet-50 with groups.

He et al., "Deep Residual Learning" (arXiv 1512.03385), table 1; Xie et al., "Aggregated Residual
Transformations" (arXiv 1611.05431), table 1. The stride is on the 3×3 convolution of a bottleneck, as in
torchvision, whose published counts these networks have.
"""

from __future__ import annotations

from torch import nn

from normwise.lab.models.residual import BasicBlock, Bottleneck, ResidualNetwork, convolution, projection

__all__ = ["ResNet"]

_EXPANSION = 4  # outputs of a bottleneck over its width


class ResNet(ResidualNetwork):
    """A 7×7 stem with max pooling, four stages of blocks, global average pooling, a linear head.

    Args:
        blocks: Number of blocks in each stage.
        classes: Outputs of the head.
        channels: Channels of the images.
        batch_norm: Whether a batch norm follows each convolution.
        bottleneck: Whether the blocks are bottlenecks.
        groups: Groups of the 3×3 convolutions of bottlenecks.
        group_width: Channels of a group in the first stage; None: ``width``, without groups.
        width: Channels of the stem.

    Shapes:
        Images (N, channels, H, W) to logits (N, classes).

    Example:
        >>> import torch
        >>> ResNet((1, 1, 1, 1), classes=10, width=4)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        classes: int,
        channels: int = 3,
        batch_norm: bool = True,
        *,
        bottleneck: bool = False,
        groups: int = 1,
        group_width: int | None = None,
        width: int = 64,
    ) -> None:
        stem = nn.Sequential(
            convolution(channels, width, 7, stride=2, batch_norm=batch_norm),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        built: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for k in range(count):
                stride = 2 if stage > 0 and k == 0 else 1
                planes = width << stage
                if bottleneck:
                    middle = planes if group_width is None else (group_width * groups) << stage
                    outputs = _EXPANSION * planes
                    built.append(Bottleneck(inputs, middle, outputs, stride, groups, batch_norm))
                else:
                    outputs = planes
                    shortcut = projection(inputs, outputs, stride, batch_norm)
                    built.append(BasicBlock(inputs, outputs, stride, shortcut, batch_norm))
                inputs = outputs
        super().__init__(stem, built, inputs, classes)
