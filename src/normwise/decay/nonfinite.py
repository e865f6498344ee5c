"""What happens to a unit whose norm is or would be out of range: the policies "skip", "warn" and "raise"."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from normwise.collectives import together
from normwise.decay.targets import ActiveParam, Targets
from normwise.units import local_indices, meshes_with_distributed_units

__all__ = ["POLICIES", "report_non_finite", "report_unrepresentable"]

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
    spoiled = [~norms.isfinite() for norms in targets.magnitudes(active, "norm")]
    fault = "the norm of {where} is not finite"
    _report(targets, active, spoiled, policy, fault, "lower the learning rate or initialise smaller")


def report_unrepresentable(
    targets: Targets, active: list[ActiveParam], unfit: list[Tensor], policy: str
) -> None:
    """Warn or raise, as the policy says, if the type of the weights cannot represent what a rule asks for.

    Args:
        targets: The units of a Decay.
        active: The parameters.
        unfit: For each which of its units are left alone for this reason.
        policy: "skip", "warn" or "raise".

    Raises:
        RuntimeError: With ``policy="raise"``.
    """
    if policy != "skip":
        fault = "the norm that the rule gives {where} is too large or too small for {dtype}"
        _report(targets, active, unfit, policy, fault, "use another coefficient or radius, or a wider type")


def _report(
    targets: Targets,
    active: list[ActiveParam],
    spoiled: list[Tensor],
    policy: str,
    fault: str,
    remedy: str,
) -> None:
    masks = [entry.unit.mask for entry in active]
    spoiled = [wrong if mask is None else wrong & mask for wrong, mask in zip(spoiled, masks, strict=True)]
    message = _message(targets, active, spoiled, fault, remedy)
    if policy == "raise":
        with together(meshes_with_distributed_units(targets.local)):  # a rank sees its own units only
            if message is not None:
                raise RuntimeError(message)
    elif message is not None:
        warnings.warn(message, stacklevel=2)


def _message(
    targets: Targets, active: list[ActiveParam], spoiled: list[Tensor], fault: str, remedy: str
) -> str | None:
    """Return the message, or None; reads from an accelerator once where no unit is spoiled."""
    if not active or not bool(torch.stack([wrong.any().to(spoiled[0].device) for wrong in spoiled]).any()):
        return None
    entry, wrong = next((entry, wrong) for entry, wrong in zip(active, spoiled, strict=True) if wrong.any())
    others = sum(int(wrong.sum()) for wrong in spoiled) - 1
    where = f"its unit {int(local_indices(entry.unit)[wrong][0])} along dim={entry.unit.dim}"
    found = fault.format(where=where, dtype=str(entry.param.dtype).removeprefix("torch."))
    return (
        f"{targets.name(entry.owner)}: {found}, and so for {others} other unit(s): {remedy}; "
        'nonfinite="skip" leaves such units alone'
    )
