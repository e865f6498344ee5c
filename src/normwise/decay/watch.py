"""What to do about a unit whose norm is not finite."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from normwise.collectives import together
from normwise.decay.checks import name_of
from normwise.decay.live import magnitudes_of
from normwise.units import local_indices, meshes_with_distributed_units

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from normwise.decay.live import Live
    from normwise.units import Unit

__all__ = ["report_non_finite"]


@torch.no_grad()
def report_non_finite(
    optimizer: Optimizer, live: list[Live], units: list[tuple[Unit, ...]], policy: str
) -> None:
    """Raise, or warn, if the norm of a unit is not finite, and name it; with "skip" look at nothing.

    Takes the norms of all weights, and waits for an accelerator once. Of sharded parameters all ranks raise
    together, and those that hold the unit warn.

    Raises:
        RuntimeError: With ``policy="raise"``.
    """
    if policy == "skip":
        return
    live = list({one.which: one for one in live}.values())
    spoiled = []
    for one, seen in zip(live, magnitudes_of(live, units, "norm"), strict=True):
        wrong = ~seen.isfinite()
        spoiled.append(wrong if one.unit.mask is None else wrong & one.unit.mask)
    message = _message(optimizer, live, spoiled)
    if policy == "raise":
        with together(meshes_with_distributed_units(units)):  # a rank does not see the units of another
            if message is not None:
                raise RuntimeError(message)
    elif message is not None:
        warnings.warn(message, stacklevel=2)


def _message(optimizer: Optimizer, live: list[Live], spoiled: list[Tensor]) -> str | None:
    """Return what there is to say, reading from an accelerator once where there is nothing."""
    if not live or not bool(torch.stack([wrong.any().to(spoiled[0].device) for wrong in spoiled]).any()):
        return None
    one, wrong = next((one, wrong) for one, wrong in zip(live, spoiled, strict=True) if wrong.any())
    others = sum(int(wrong.sum()) for wrong in spoiled) - 1
    index = int(local_indices(one.unit)[wrong][0])
    return (
        f"{name_of(optimizer, one.owner)}: the norm of its unit {index} along dim="
        f"{one.unit.dim} is not finite, and so for {others} other unit(s): lower the learning rate or "
        'initialise smaller; nonfinite="skip" leaves such units alone'
    )
