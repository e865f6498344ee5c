"""From a plan to what each optimizer is to decay: its weights, and the groups that can be scaled together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.decay import Decay
from normwise.decay.start import JointGroup
from normwise.decay.targets import group_of
from normwise.planning.attach import Weight
from normwise.planning.treatment import Cause, Symmetry, Treatment, Verdict, is_group
from normwise.units import Unit

__all__ = ["Group", "Share", "link", "share_out"]

Group = tuple[Mapping[str, float], Sequence[tuple[Tensor, float]]]
Share = tuple[list[Weight], list[Group]]


def share_out(
    treatments: Sequence[Treatment],
    symmetries: Sequence[Symmetry],
    named: Mapping[str, tuple[str, Tensor]],
    optimizers: Sequence[Optimizer],
) -> tuple[list[Share], list[Symmetry]]:
    """Return what each optimizer holds, weights and jointly scale-invariant groups, and the other groups.

    The other groups have weights in several optimizers (:func:`link`). A group that contains a part of a
    packed parameter is left out.

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
    spanning: list[Symmetry] = []
    where: dict[str, int] = {}
    for t in shrunk:
        parameter = named[t.name][1]
        if id(parameter) not in holders:
            raise ValueError(
                f"{t.name!r} of the plan is not in the optimizer: construct the optimizer from "
                "plan.param_groups(), give all optimizers as a list, or apply the plan to the wrapped model "
                "(plan.apply_to)"
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
        owners = {where[name] for name in units}
        if not owners or len(units) + len(others) < len(symmetry):
            continue
        if len(owners) == 1:
            shares[owners.pop()][1].append((units, others))
        else:
            spanning.append(symmetry)
    names = {name for symmetry in spanning for name in symmetry}
    marked = [
        ([replace(w, movable="linked") if w.name in names else w for w in weights], groups)
        for weights, groups in shares
    ]
    return marked, spanning


def link(
    spanning: Sequence[Symmetry], named: Mapping[str, tuple[str, Tensor]], decays: Sequence[Decay]
) -> list[str]:
    """Let the starts of several Decays move groups that have weights in more than one of them.

    This needs norms that are known before any gradient, so no optimizer of a group may have steps that grow
    with the gradient.

    Returns:
        The names of weights that start as they are, because it is not so.
    """
    places = {
        id(param): (decay, which)
        for decay in decays
        for which, unit in enumerate(decay.units)
        for param in unit.params
    }
    unmoved: list[str] = []
    for symmetry in spanning:
        members = {name: places[id(named[name][1])] for name in symmetry if id(named[name][1]) in places}
        others = [(named[name][1], float(e)) for name, e in symmetry.items() if name not in members]
        starts = [(decay.start, which) for decay, which in members.values()]
        if any(start is None or start.grows_with_gradient[which] for start, which in starts):
            unmoved += members
            continue
        solved: dict[str, float] = {}
        for decay in {id(decay): decay for decay, _ in members.values()}.values():
            own: dict[int, float] = {}
            elsewhere: list[tuple[Unit, float, float]] = []
            for name, (holder, which) in members.items():
                exponent = float(symmetry[name])
                if holder is decay:
                    own[which] = exponent
                else:
                    assert holder.start is not None
                    norm = holder.start.norms[which]
                    elsewhere.append((holder.units[which], norm or 0.0, exponent))
            assert decay.start is not None
            decay.start.joint = [*decay.start.joint, JointGroup(own, others, elsewhere, solved)]
    for decay in decays:
        if decay.start is not None:
            decay.start.keep_still(
                which for which, unit in enumerate(decay.units) if _is_named(unit, unmoved, named)
            )
    return unmoved


def _is_named(unit: Unit, names: Sequence[str], named: Mapping[str, tuple[str, Tensor]]) -> bool:
    return any(param is named[name][1] for name in names for param in unit.params)
