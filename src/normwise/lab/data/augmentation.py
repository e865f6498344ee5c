"""Random crops and flips of images that lie in memory, on whatever device they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PADDING", "CropsAndFlips"]

PADDING = 4  # He et al. (arXiv 1512.03385), section 4.2


@dataclass(frozen=True)
class CropsAndFlips:
    """For each of N images, where its crop begins and whether it is mirrored.

    The standard augmentation of CIFAR: 4 black pixels on each side, a random crop of the old size, a
    horizontal flip of every second image.

    Attributes:
        rows: Shape (N,), first row of the crop in the padded image, int64.
        columns: The same for columns.
        flips: Shape (N,), bool.
    """

    rows: Tensor
    columns: Tensor
    flips: Tensor

    @classmethod
    def draw(cls, number: int, generator: torch.Generator) -> CropsAndFlips:
        """Draw them on the CPU, so that they are the same for every device."""
        rows, columns = torch.randint(0, 2 * PADDING + 1, (2, number), generator=generator)
        return cls(rows, columns, torch.rand(number, generator=generator) < 0.5)

    def of(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Return augmented images.

        Args:
            images: Shape (B, C, H, W), any type and device.
            chosen: Shape (B,), int64, on the CPU: which of the N entries belongs to each image.

        Returns:
            Shape (B, C, H, W), channels last in memory.

        Example:
            >>> images = torch.arange(4).reshape(1, 1, 2, 2)
            >>> still = CropsAndFlips(torch.tensor([4]), torch.tensor([4]), torch.tensor([True]))
            >>> still.of(images, torch.tensor([0]))
            tensor([[[[1, 0],
                      [3, 2]]]])
        """
        device, (height, width) = images.device, images.shape[-2:]
        padded = F.pad(images, (PADDING,) * 4)
        rows = self.rows[chosen, None] + torch.arange(height)
        along = torch.arange(width)
        columns = self.columns[chosen, None] + torch.where(self.flips[chosen, None], along.flip(0), along)
        which = torch.arange(len(chosen), device=device)[:, None, None]
        crops = padded[which, :, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
        return crops.permute(0, 3, 1, 2)
