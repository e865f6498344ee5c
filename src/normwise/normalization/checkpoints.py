"""Loading a checkpoint whose weights are stored in another form than the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.normalization._attachment import chains
from normwise.normalization._exact import Formula, natural_gain
from normwise.normalization._kernels import normalize
from normwise.normalization.fold import Member, members
from normwise.normalization.parametrizations import NormalizedWeight

__all__ = ["UpgradeReport", "upgrade_state_dict"]


@dataclass(frozen=True)
class UpgradeReport:
    """The changes that `upgrade_state_dict` made.

    Attributes:
        renamed: For each new key, the old keys from which it was renamed or computed.
        missing: Keys of the model that the state dict has no values for.
        unexpected: Keys of the state dict that the model does not have. They are passed on.
    """

    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{' + '.join(old)} -> {new}" for new, old in self.renamed.items()]
        lines += [f"missing: {key}" for key in self.missing]
        lines += [f"unexpected: {key}" for key in self.unexpected]
        return "\n".join(lines) or "nothing to do"


def upgrade_state_dict(
    state_dict: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], UpgradeReport]:
    """Convert the weights of a state dict to the form that ``model`` has.

    A weight has one of three forms, and each converts to each: plain (``weight``), torch's older hook-based
    weight norm (``weight_g``, ``weight_v``) and parametrizations (``parametrizations.weight.original``,
    ``.original0``, ``.original1``). Other entries of the state dict are passed on.

    A pair (gain, direction) that becomes one weight is evaluated as weight normalisation, because a
    checkpoint does not record the member. If it comes from another member, fold that model and save it again.

    Args:
        state_dict: From ``torch.load(..., weights_only=True)``, ``safetensors.torch.load_file``, ...; it is
            not changed.
        model: The model that will load the result. Its values are not read, so it may be on "meta".

    Returns:
        The new state dict, and a report of the keys that were renamed or computed, are missing or are
        unexpected.

    Example:
        >>> old = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).state_dict()
        >>> new, report = upgrade_state_dict(old, nn.Linear(4, 3))
        >>> print(report)
        parametrizations.weight.original0 + parametrizations.weight.original1 -> weight
    """
    wanted = list(model.state_dict())
    new = dict(state_dict)
    report = UpgradeReport()
    found = members(model)
    for slot in _slots(model):
        member = found.get(slot)
        targets = _keys(slot, member)
        if all(key in new for key in targets):
            continue
        sources = next((s for s in _sources(slot) if all(key in new for key in s)), None)
        values = None if sources is None else _values([new[key] for key in sources], member)
        if sources is None or values is None:
            continue
        for key in sources:
            del new[key]
        for key, value in zip(targets, values, strict=True):
            new[key] = value
            report.renamed[key] = sources
    report.missing.extend(key for key in wanted if key not in new)
    report.unexpected.extend(key for key in new if key not in wanted)
    return new, report


def _slots(model: nn.Module) -> list[str]:
    """Return the qualified names that the weights would have in a plain model."""
    slots = list(members(model))
    for prefix, module in model.named_modules():
        if not isinstance(module, parametrize.ParametrizationList):
            slots += [f"{prefix}.{name}" if prefix else name for name in module._parameters]
    return slots


def _sources(slot: str) -> list[tuple[str, ...]]:
    """Return the keys under which each form stores the weight ``slot``."""
    prefix, dot, name = slot.rpartition(".")
    original = f"{prefix}{dot}parametrizations.{name}.original"
    return [(f"{original}0", f"{original}1"), (f"{slot}_g", f"{slot}_v"), (slot,)]


def _keys(slot: str, member: Member | None) -> tuple[str, ...]:
    """Return the keys under which the model stores the weight ``slot``."""
    if member is None:
        return (slot,)
    prefix, dot, _ = slot.rpartition(".")
    return tuple(f"{prefix}{dot}{original}" for original in member.originals)


def _values(values: list[Tensor], member: Member | None) -> list[Tensor] | None:
    """Convert the stored tensors of a weight, (gain, weight) or (weight,), to those that the model stores."""
    with torch.no_grad():
        if member is not None and member.kind == "weight_norm" and len(values) == len(member.originals) == 2:
            return values  # renamed only
        if len(values) == 2:
            gain, weight = values
            weight = normalize(weight, gain, Formula(_dim_of(gain, weight), center=False, factor=1.0))
        else:
            weight = values[0]
        if member is None:
            return [weight]
        if member.kind in ("spectral_norm", "orthogonal"):
            return None  # more than the weight is needed
        if len(member.originals) == 1:
            return [weight]
        return [natural_gain(weight, _formula(member)), weight]


def _formula(member: Member) -> Formula:
    if member.form == "parametrization":
        first = next(chains(member.module)[member.name].children())
        if isinstance(first, NormalizedWeight):
            return first.formula
    return Formula(member.dim, center=False, factor=1.0)


def _dim_of(gain: Tensor, weight: Tensor) -> int | None:
    """Return the dim of the units that ``gain`` belongs to."""
    counted = [k for k, size in enumerate(gain.shape) if size != 1]
    if gain.ndim not in (0, weight.ndim) or len(counted) > 1:
        raise ValueError(
            f"a gain of shape {tuple(gain.shape)} does not fit a weight of shape {tuple(weight.shape)}: "
            "it must have one number for each unit, and size 1 in every other dimension"
        )
    return counted[0] if counted else None
