"""VGG-16: Simonyan & Zisserman, "Very Deep Convolutional Networks" (arXiv 1409.1556), configuration D."""

from __future__ import annotations

from torch import Tensor, nn

from normwise.lab.models.residual import convolution

__all__ = ["VGG16"]

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels over those of the first stage, convolutions


class VGG16(nn.Module):
    """Thirteen 3×3 convolutions in five stages, each ended by max pooling, and the head.

    Args:
        classes: Outputs of the head.
        channels: Channels of the images.
        batch_norm: Whether a batch norm follows each convolution. The published network has none.
        hidden: Units of the two hidden layers before the head, with dropout: 4096 in the published network.
            0: no hidden layers, but global average pooling, for images as small as CIFAR's.
        width: Channels of the first stage.

    Shapes:
        Images (N, channels, H, W), H and W at least 32, to logits (N, classes).

    Example:
        >>> import torch
        >>> VGG16(classes=10, hidden=0, width=2)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        batch_norm: bool = False,
        hidden: int = 4096,
        width: int = 64,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for factor, count in _STAGES:
            for _ in range(count):
                layers += [convolution(inputs, factor * width, 3, batch_norm=batch_norm), nn.ReLU()]
                inputs = factor * width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7 if hidden else 1), nn.Flatten())
        self.hidden = nn.Sequential()
        if hidden:
            for size in (inputs * 7 * 7, hidden):
                self.hidden.extend([nn.Linear(size, hidden), nn.ReLU(), nn.Dropout()])
            inputs = hidden
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.hidden(self.body(images)))
        return logits
