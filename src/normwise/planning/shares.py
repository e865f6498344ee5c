"""From a plan to what each optimizer is to decay: its weights, and the groups that can be scaled together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.targets import group_of
from normwise.planning.attach import Weight
from normwise.planning.treatment import Cause, Symmetry, Treatment, Verdict, is_group
from normwise.units import Unit

__all__ = ["Group", "Share", "share_out"]

Group = tuple[Mapping[str, float], Sequence[tuple[Tensor, float]]]
Share = tuple[list[Weight], list[Group]]


def share_out(
    treatments: Sequence[Treatment],
    symmetries: Sequence[Symmetry],
    named: Mapping[str, tuple[str, Tensor]],
    optimizers: Sequence[Optimizer],
) -> list[Share]:
    """Return for each optimizer the weights that it holds, and their jointly scale-invariant groups.

    A group whose weights lie in several optimizers, or that contains a part of a packed parameter, is left
    out: its weights cannot be scaled together in one step.

    Args:
        treatments: Those of the plan.
        symmetries: Those of the plan.
        named: {name in the plan: (name in the model, parameter)}.
        optimizers: The optimizers.

    Raises:
        ValueError: The plan has no units, or one of them is in no optimizer.
    """
    shrunk = [t for t in treatments if t.verdict == Verdict.SHRINK]
    if not shrunk:
        raise ValueError(
            "the plan has no units: nothing in this model is scale-invariant, alone or jointly, so there is "
            "nothing for a rule to shrink; use plan.param_groups(weight_decay=...) for plain L2"
        )
    holders = {id_: k for k, optimizer in enumerate(optimizers) for id_ in group_of(optimizer)}
    shares: list[Share] = [([], []) for _ in optimizers]
    where: dict[str, int] = {}
    for t in shrunk:
        parameter = named[t.name][1]
        if id(parameter) not in holders:
            raise ValueError(
                f"{t.name!r} of the plan is not in the optimizer: construct the optimizer from "
                "plan.param_groups(), or apply the plan to the wrapped model (plan.apply_to)"
            )
        where[t.name] = holders[id(parameter)]
        unit = Unit(parameter, t.dim, t.mask)
        movable = {Cause.ALONE: "alone", Cause.JOINT: "with its group"}.get(t.cause, "no")
        shares[where[t.name]][0].append(Weight(t.name, unit, movable, t.in_blocks, t.smallest_rms))
    for symmetry in filter(is_group, symmetries):
        units = {name: float(e) for name, e in symmetry.items() if name in where}
        others = [
            (named[name][1], float(e)) for name, e in symmetry.items() if name not in where and name in named
        ]
        in_one = len({where[name] for name in units}) == 1
        if in_one and len(units) + len(others) == len(symmetry):
            shares[where[next(iter(units))]][1].append((units, others))
    return shares
