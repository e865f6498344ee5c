"""A plan as JSON, and whether it fits a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normwise.invariance import parameter_of
from normwise.planning.parameters import ROLES, bare, parameter_aliases
from normwise.planning.treatment import Cause, Symmetry, Treatment, Verdict, keys_of

__all__ = ["bind", "from_json", "read", "to_json"]

_FORMAT = 2


def to_json(treatments: Sequence[Treatment], symmetries: Sequence[Symmetry]) -> str:
    """Return the plan as JSON. Names, shapes and ties are the fingerprint of the model."""
    parameters = []
    for t in treatments:
        entry: dict[str, Any] = {"name": t.name, "shape": list(t.shape), "role": t.role}
        if t.aliases:
            entry["aliases"] = list(t.aliases)
        parameters.append(entry | _decision(t) | {"reason": t.reason})  # the last for readers only
    whole = {"format": _FORMAT, "what": "normwise plan", "parameters": parameters}
    whole["symmetries"] = [dict(s) for s in symmetries]
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _decision(t: Treatment) -> dict[str, Any]:
    entry: dict[str, Any] = {"verdict": t.verdict.value, "cause": t.cause.value}
    if t.verdict == Verdict.SHRINK:
        entry |= {"dim": t.dim, "units": _count_units(t.shape, t.dim)}
    if t.mask is not None:
        entry["mask"] = _ranges(t.mask)
    if t.symmetry:
        entry["symmetry"] = dict(t.symmetry)
    if t.against:
        entry["against"] = list(t.against)
    if t.parts_paired:
        entry["parts_paired"] = True
    if t.note:
        entry["note"] = t.note
    if t.overridden is not None:
        entry["overridden"] = _decision(t.overridden)
    return entry


def _count_units(shape: tuple[int, ...], dim: int | None) -> int:
    return 1 if dim is None else shape[dim]


def _ranges(mask: tuple[bool, ...]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for k, selected in enumerate(mask):
        if selected and ranges and ranges[-1][1] == k:
            ranges[-1][1] = k + 1
        elif selected:
            ranges.append([k, k + 1])
    return ranges


def read(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the plan {path} cannot be read: {error}") from error


def from_json(text: str, model: nn.Module) -> tuple[list[Treatment], list[Symmetry]]:
    """Return what :func:`to_json` wrote.

    Names and shapes are compared with those of ``model`` first, so that a damaged file cannot ask for masks
    of any size.

    Raises:
        ValueError: The text is no plan or does not fit the model; the message says where.
    """
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"this is no JSON ({error}): give a file that Plan.save wrote") from error
    if not isinstance(whole, dict) or whole.get("what") != "normwise plan":
        raise ValueError("this is no plan: give a file that Plan.save wrote")
    if whole.get("format") != _FORMAT:
        raise ValueError(
            f"the plan has format {whole.get('format')!r}, and this version reads {_FORMAT}: plan anew"
        )
    entries, symmetries = whole.get("parameters"), whole.get("symmetries")
    if not isinstance(entries, list) or not isinstance(symmetries, list):
        raise ValueError("the plan lacks its parameters or symmetries: plan anew")
    fingerprints = [_checked(_fingerprint, entry) for entry in entries]
    bind(fingerprints, model)
    names = {t.name for t in fingerprints}
    treatments = [
        _checked(_treatment, entry, blank, names) for entry, blank in zip(entries, fingerprints, strict=True)
    ]
    return treatments, [_checked(_symmetry, symmetry, names) for symmetry in symmetries]


def _checked(parse: Any, entry: Any, *arguments: Any) -> Any:
    """Return ``parse(entry, ...)``; whatever it raises becomes one line that shows the entry."""
    try:
        return parse(entry, *arguments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the plan has a damaged entry ({missing}): {str(entry)[:80]}") from error


def _fingerprint(entry: dict[str, Any]) -> Treatment:
    """Return a treatment with the name, shape, role and aliases of an entry, and no decision."""
    sizes = entry["shape"]
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"shape {sizes!r}")
    if entry["role"] not in ROLES:
        raise ValueError(f"role {entry['role']!r}")
    aliases = _strings(entry, "aliases")
    if not isinstance(entry["name"], str):
        raise ValueError(f"name {entry['name']!r}")
    return Treatment(entry["name"], tuple(sizes), role=entry["role"], aliases=aliases)


def _treatment(entry: dict[str, Any], blank: Treatment, names: set[str]) -> Treatment:
    """Return the treatment of an entry whose fingerprint is ``blank``."""
    verdict, cause = Verdict(entry["verdict"]), Cause(entry["cause"])
    dim, mask = None, None
    if verdict == Verdict.SHRINK:
        dim = entry["dim"]
        if not (dim is None or (type(dim) is int and 0 <= dim < len(blank.shape))):
            raise ValueError(f"dim {dim!r} of shape {blank.shape}")
        if entry["units"] != _count_units(blank.shape, dim):
            raise ValueError(f"{entry['units']!r} units with dim {dim!r} of shape {blank.shape}")
    if "mask" in entry:
        if dim is None:
            raise ValueError("a mask without dim")
        mask = _mask(entry["mask"], blank.shape[dim])
    against, before = _strings(entry, "against"), entry.get("overridden")
    if unknown := [name for name in against if name not in names]:
        raise ValueError(f"against the unknown {unknown[0]!r}")
    if (before is None) == (cause == Cause.OVERRIDDEN):
        raise ValueError(f"cause {cause.value!r} with overridden {before!r}")
    symmetry = _symmetry(entry["symmetry"], names) if "symmetry" in entry else {}
    if (symmetry or cause in (Cause.JOINT, Cause.PAIR)) and not keys_of(blank.name, symmetry):
        raise ValueError("the symmetry lacks the parameter")
    return Treatment(
        name=blank.name,
        shape=blank.shape,
        verdict=verdict,
        cause=cause,
        role=blank.role,
        dim=dim,
        mask=mask,
        symmetry=symmetry,
        against=against,
        parts_paired=bool(entry.get("parts_paired", False)),
        note=str(entry.get("note", "")),
        overridden=None if before is None else _treatment(before, blank, names),
        aliases=blank.aliases,
    )


def _strings(entry: dict[str, Any], key: str) -> tuple[str, ...]:
    values = entry.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} {values!r}")
    return tuple(values)


def _symmetry(symmetry: Any, names: set[str]) -> Symmetry:
    if not isinstance(symmetry, dict) or not all(type(e) is int and e for e in symmetry.values()):
        raise ValueError("a symmetry is {name: exponent}, with exponents that are whole numbers and not 0")
    if unknown := [key for key in symmetry if parameter_of(key) not in names]:
        raise ValueError(f"the symmetry has the unknown member {unknown[0]!r}")
    return symmetry


def _mask(ranges: Any, size: int) -> tuple[bool, ...]:
    mask = [False] * size
    end = 0
    for start, stop in ranges:
        if not (type(start) is int and type(stop) is int and end <= start < stop <= size):
            raise ValueError(f"mask {ranges} of {size}")
        mask[start:stop] = [True] * (stop - start)
        end = stop
    if not end:
        raise ValueError("an empty mask")
    return tuple(mask)


def bind(treatments: Sequence[Treatment], model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return {name in the plan: (name in the model, parameter)}; names are compared without wrappers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has other parameters, shapes or ties than the plan; the message names the
            first difference.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named: Mapping[str, Tensor] = dict(model.named_parameters())
    in_model = {bare(name): name for name in named}
    ties = {
        bare(name): {bare(other) for other in others} for name, others in parameter_aliases(model).items()
    }
    planned: dict[str, Treatment] = {}
    for t in treatments:
        name = bare(t.name)
        if name in planned:
            raise _misfit(f"{t.name!r} is in the plan twice")
        planned[name] = t
        if name not in in_model:
            raise _misfit(f"{t.name!r} is not in the model")
        shape = tuple(named[in_model[name]].shape)
        if shape != t.shape:
            raise _misfit(f"{t.name!r} has shape {t.shape} in the plan and {shape} in the model")
        if {bare(alias) for alias in t.aliases} != ties[name]:
            raise _misfit(
                f"{t.name!r} is shared with {', '.join(sorted(t.aliases)) or 'nothing'} in the plan and with "
                f"{', '.join(sorted(ties[name])) or 'nothing'} in the model"
            )
    for name, full in in_model.items():
        if name not in planned:
            raise _misfit(f"{full!r} is in the model and not in the plan")
    return {t.name: (in_model[name], named[in_model[name]]) for name, t in planned.items()}


def _misfit(difference: str) -> ValueError:
    return ValueError(f"the plan does not fit the model: {difference}; plan anew")
