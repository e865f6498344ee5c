"""From invariances to treatments: the verdict on each parameter."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from normwise.invariance import Invariances, parameter_of
from normwise.norms import slice_norms
from normwise.planning.parameters import parameter_aliases, role_of
from normwise.planning.symmetry_basis import readable_symmetries
from normwise.planning.treatment import Cause, Symmetry, Treatment, Verdict, is_group, keys_of

__all__ = ["check_overrides", "decide"]

_EPS_EFFECT = 0.01


def decide(
    model: nn.Module, inv: Invariances, overrides: Mapping[str, str] | None
) -> tuple[list[Treatment], list[Symmetry]]:
    """Return a treatment for every parameter, and the joint symmetries in a readable basis.

    Args:
        model: The model that ``inv`` belongs to.
        inv: The model's invariances.
        overrides: {pattern: verdict}; the last pattern that matches a name decides.
    """
    parameters = dict(model.named_parameters())
    known = set(inv.names)
    expected = [name for name, p in parameters.items() if name in known or p.is_floating_point()]
    if expected != inv.names:
        stray = sorted(set(expected) ^ known)
        raise ValueError(
            "invariances are those of another model (different parameters: "
            f"{', '.join(stray[:3]) or 'the order'}): find them for this one"
        )
    aliases = parameter_aliases(model)
    roles = {name: role_of(model, name, parameter) for name, parameter in parameters.items()}
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    fixed = {name for name, p in parameters.items() if name in frozen or not p.is_floating_point()}
    symmetries = readable_symmetries(inv, lambda name: roles[name] == "weight", fixed)
    treatments = []
    for name, parameter in parameters.items():
        blank = Treatment(name, tuple(parameter.shape), role=roles[name], aliases=aliases[name])
        if name in frozen:
            treatments.append(replace(blank, cause=Cause.FROZEN))
        elif not parameter.is_floating_point():
            treatments.append(replace(blank, cause=Cause.NOT_REAL))
        elif getattr(parameter, "_no_weight_decay", False):
            treatments.append(replace(blank, cause=Cause.MARKED))
        else:
            decided = _decided(blank, inv, symmetries)
            if decided.verdict == Verdict.SHRINK:
                decided = replace(decided, smallest_rms=_smallest_rms(name, parameter, inv))
            treatments.append(decided)
    return _overridden(treatments, inv, overrides or {}), symmetries


def _smallest_rms(name: str, parameter: Tensor, inv: Invariances) -> float:
    """Return the RMS at which the eps of the norm layers changes the scale gradient by ``_EPS_EFFECT``.

    The residual at the model's eps, of the parameter or of the groups that it is in, is this change at the
    present norm; it grows with 1/norm² as the weight shrinks.
    """
    if name in inv.scale_invariant or name in inv.partial:
        residual = inv.evidence[name].residual_real_eps
    else:
        of_groups = zip(inv.groups, inv.group_residuals, strict=False)  # unknown where groups were made up
        residual = max((r for group, r in of_groups if name in map(parameter_of, group)), default=0.0)
    if not math.isfinite(residual):
        return 0.0
    rms = float(slice_norms(parameter.detach(), None)) / max(1, parameter.numel()) ** 0.5
    smallest = rms * math.sqrt(residual / _EPS_EFFECT)
    return smallest if math.isfinite(smallest) else 0.0


def _decided(blank: Treatment, inv: Invariances, symmetries: list[Symmetry]) -> Treatment:
    name = blank.name
    if name in inv.no_effect:
        return replace(blank, cause=Cause.NO_EFFECT)
    if name in inv.undetermined:
        return replace(blank, cause=Cause.UNDETERMINED, note=inv.undetermined[name])
    containing = [s for s in symmetries if keys_of(name, s)]  # the parameter or a part of it
    groups = [s for s in containing if is_group(s)]
    whole_groups = [s for s in groups if name in s]
    if blank.role != "weight":
        if name in inv.scale_invariant:
            return replace(blank, cause=Cause.SIGNS_ONLY)
        return replace(blank, cause=Cause.NOT_A_WEIGHT, symmetry=next(iter(whole_groups), {}))
    if name in inv.scale_invariant:
        return replace(blank, verdict=Verdict.SHRINK, cause=Cause.ALONE, dim=inv.scale_invariant[name])
    if name in inv.partial:
        dim, mask = inv.partial[name]
        rest = min((s for s in containing if name in s), key=len, default={})
        shrunk = replace(blank, verdict=Verdict.SHRINK, cause=Cause.ALONE, symmetry=rest)
        return replace(shrunk, dim=dim, mask=tuple(mask.tolist()), in_blocks=bool(inv.evidence[name].blocks))
    if whole_groups:
        return replace(blank, verdict=Verdict.SHRINK, cause=Cause.JOINT, symmetry=whole_groups[0])
    if pairs := [s for s in containing if not is_group(s)]:
        return _balanced(blank, pairs)
    if groups:  # a rule would pull on the rest of the tensor too
        return replace(blank, verdict=Verdict.PLAIN_L2, cause=Cause.JOINT, symmetry=groups[0])
    return replace(blank, verdict=Verdict.PLAIN_L2, cause=Cause.NO_SYMMETRY)


def _balanced(blank: Treatment, pairs: list[Symmetry]) -> Treatment:
    name = blank.name
    simplest = min(pairs, key=lambda s: (name not in s, len(s)))
    opposite = [
        parameter_of(key)
        for s in pairs
        for mine in keys_of(name, s)
        for key, exponent in s.items()
        if exponent * s[mine] < 0
    ]
    return replace(
        blank,
        verdict=Verdict.BALANCE,
        cause=Cause.PAIR,
        symmetry=simplest,
        against=tuple(other for other in dict.fromkeys(opposite) if other != name),
        parts_paired=name in simplest and not all(name in s for s in pairs),
    )


def check_overrides(overrides: Mapping[str, str] | None) -> None:
    """Raise an error that names the first override that is not a pattern with a verdict."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a mapping of name pattern to verdict, not {overrides!r}")
    for pattern, verdict in (overrides or {}).items():
        if verdict not in list(Verdict):
            allowed = ", ".join(repr(known.value) for known in Verdict)
            raise ValueError(f"overrides[{pattern!r}]={verdict!r} is not a verdict: choose from {allowed}")


def _overridden(
    treatments: list[Treatment], inv: Invariances, overrides: Mapping[str, str]
) -> list[Treatment]:
    for pattern in overrides:
        if not any(_matches(t, pattern) for t in treatments):
            raise ValueError(
                f"overrides: {pattern!r} matches no parameter: the first are "
                f"{', '.join(t.name for t in treatments[:3])} (patterns as for file names: *, ?, [abc])"
            )
    return [_override(treatment, inv, overrides) for treatment in treatments]


def _matches(treatment: Treatment, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (treatment.name, *treatment.aliases))


def _override(before: Treatment, inv: Invariances, overrides: Mapping[str, str]) -> Treatment:
    matching = [pattern for pattern in overrides if _matches(before, pattern)]
    fixed = before.cause in (Cause.FROZEN, Cause.NOT_REAL)
    if fixed or not matching or overrides[matching[-1]] == before.verdict:
        return before
    verdict = Verdict(overrides[matching[-1]])
    dim = inv.scale_invariant.get(before.name) if verdict == Verdict.SHRINK else None
    changed = replace(before, verdict=verdict, cause=Cause.OVERRIDDEN, dim=dim, mask=None)
    return replace(changed, note=matching[-1], overridden=before)
