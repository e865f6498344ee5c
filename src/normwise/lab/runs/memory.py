"""How much memory a training step takes, from a forward pass without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Footprint", "footprint"]

_SLACK = 1.3  # gradients of activations, workspaces, what the allocator keeps


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Attributes:
        fixed: Of weights, gradients and the state of the optimizer.
        per_image: Of what each image, or sequence, adds.
    """

    fixed: float
    per_image: float

    def bytes_for(self, batch: int) -> float:
        """Return the bytes of a step with this many images."""
        return self.fixed + batch * self.per_image

    def largest_batch(self, batch: int, room: float) -> int:
        """Return ``batch`` halved until it fits into ``room`` bytes; 0 if one image does not fit.

        Example:
            >>> Footprint(100.0, 10.0).largest_batch(128, 500.0)
            32
        """
        while batch and self.bytes_for(batch) > room:
            batch //= 2
        return batch


def footprint(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    buffers: int = 1,
    precision: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> Footprint:
    """Estimate the memory of a training step.

    Args:
        network: The network on the device "meta", so that nothing is computed.
        shape: Channels, height and width of an image; or (length,) of a sequence.
        buffers: Tensors that the optimizer keeps for each parameter (SGD with momentum 1, Adam 2).
        precision: "float32" or "bf16".
        dtype: Of the input: torch.long for a sequence of characters.
    """
    counted: dict[int, int] = {}
    keep: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        keep.append(tensor)  # so that no storage takes the place of one that was counted
        counted[tensor.untyped_storage()._cdata] = tensor.nbytes
        return tensor

    parameters = list(network.parameters())
    own = {p.untyped_storage()._cdata for p in parameters}
    sizes = []
    for images in (2, 4):
        counted.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(torch.empty(images, *shape, dtype=dtype, device="meta"))
        sizes.append(sum(size for key, size in counted.items() if key not in own))
    held = sum(p.nbytes for p in parameters)
    per_image = (sizes[1] - sizes[0]) / 2 * (0.5 if precision == "bf16" else 1.0)
    return Footprint(held * (2.0 + buffers), per_image * _SLACK)
