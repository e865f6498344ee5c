"""What to do about a unit whose norm is not finite."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from normwise.decay.checks import name_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from normwise.decay.live import Live

__all__ = ["report_non_finite"]


@torch.no_grad()
def report_non_finite(optimizer: Optimizer, live: list[Live], policy: str) -> None:
    """Raise, or warn, if the norm of a unit is not finite, and name it; with "skip" look at nothing.

    Takes the norms of all weights, and waits for an accelerator once.

    Raises:
        RuntimeError: With ``policy="raise"``.
    """
    if policy == "skip" or not live:
        return
    live = list({one.which: one for one in live}.values())
    spoiled = []
    for one in live:
        wrong = ~one.unit.norms().isfinite()
        spoiled.append(wrong if one.unit.mask is None else wrong & one.unit.mask)
    if not bool(torch.stack([wrong.any().to(spoiled[0].device) for wrong in spoiled]).any()):
        return
    one, wrong = next((one, wrong) for one, wrong in zip(live, spoiled, strict=True) if wrong.any())
    others = sum(int(wrong.sum()) for wrong in spoiled) - 1
    message = (
        f"{name_of(optimizer, one.param)}: the norm of its unit {int(wrong.nonzero()[0])} along dim="
        f"{one.unit.dim} is not finite, and so for {others} other unit(s): lower the learning rate or "
        'initialise smaller; nonfinite="skip" leaves such units alone'
    )
    if policy == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
