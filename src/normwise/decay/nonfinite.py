"""What happens to a unit whose norm is not finite: the policies "skip", "warn" and "raise"."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from normwise.collectives import together
from normwise.decay.targets import ActiveParam, Targets
from normwise.units import local_indices, meshes_with_distributed_units

__all__ = ["POLICIES", "report_non_finite"]

POLICIES = ("skip", "warn", "raise")


@torch.no_grad()
def report_non_finite(targets: Targets, active: list[ActiveParam], policy: str) -> None:
    """Warn or raise, as the policy says, if the norm of a unit is not finite; "skip" looks at nothing.

    Looking takes the norms of all weights and waits for an accelerator once. For sharded parameters all ranks
    raise together, and the ranks that hold the unit warn.

    Raises:
        RuntimeError: With ``policy="raise"``.
    """
    if policy == "skip":
        return
    active = list({entry.which: entry for entry in active}.values())
    spoiled = []
    for entry, norms in zip(active, targets.magnitudes(active, "norm"), strict=True):
        wrong = ~norms.isfinite()
        spoiled.append(wrong if entry.unit.mask is None else wrong & entry.unit.mask)
    message = _message(targets, active, spoiled)
    if policy == "raise":
        with together(meshes_with_distributed_units(targets.local)):  # a rank sees its own units only
            if message is not None:
                raise RuntimeError(message)
    elif message is not None:
        warnings.warn(message, stacklevel=2)


def _message(targets: Targets, active: list[ActiveParam], spoiled: list[Tensor]) -> str | None:
    """Return the message, or None; reads from an accelerator once where all norms are finite."""
    if not active or not bool(torch.stack([wrong.any().to(spoiled[0].device) for wrong in spoiled]).any()):
        return None
    entry, wrong = next((entry, wrong) for entry, wrong in zip(active, spoiled, strict=True) if wrong.any())
    others = sum(int(wrong.sum()) for wrong in spoiled) - 1
    index = int(local_indices(entry.unit)[wrong][0])
    where = f"its unit {index} along dim={entry.unit.dim}"
    return (
        f"{targets.name(entry.owner)}: the norm of {where} is not finite, and so for {others} other unit(s): "
        'lower the learning rate or initialise smaller; nonfinite="skip" leaves such units alone'
    )
