"""A plan as JSON, and whether it fits a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normwise.invariance import parameter_of
from normwise.planning.parameters import ROLES, bare, parameter_aliases
from normwise.planning.treatment import Cause, Symmetry, Treatment, Verdict, keys_of

__all__ = ["bind", "check_frozen", "from_json", "read", "to_json"]

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
        entry["units"] = 1 if t.dim is None else t.shape[t.dim]
    encoded = {
        "dim": t.dim,
        "mask": t.mask and _ranges(t.mask),
        "in_blocks": t.in_blocks or None,
        "smallest_rms": t.smallest_rms or None,
        "symmetry": dict(t.symmetry) or None,
        "against": list(t.against) or None,
        "parts_paired": t.parts_paired or None,
        "note": t.note or None,
        "overridden": t.overridden and _decision(t.overridden),
    }
    return entry | {key: value for key, value in encoded.items() if value is not None}


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
        if not isinstance(entry, dict):
            raise TypeError("not a mapping")
        return parse(entry, *arguments)
    except (KeyError, TypeError, ValueError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the plan has a damaged entry ({missing}): {entry!r:.80}") from error


def _fingerprint(entry: dict[str, Any]) -> Treatment:
    """Return a treatment with the fields of an entry that :func:`bind` compares, and no decision."""
    shape, role = _list(entry["shape"], int), _typed(entry, "role", str)
    if min(shape, default=0) < 0 or role not in ROLES:
        raise ValueError(f"role {role!r} and shape {shape!r}")
    aliases = _list(entry.get("aliases", []), str)
    cause = Cause(entry["cause"])
    return Treatment(_typed(entry, "name", str), shape, cause=cause, role=role, aliases=aliases)


def _treatment(entry: dict[str, Any], blank: Treatment, names: set[str]) -> Treatment:
    """Return the treatment of an entry whose fingerprint is ``blank``."""
    verdict, cause = Verdict(entry["verdict"]), Cause(entry["cause"])
    dim, mask, before = _typed(entry, "dim", int, None), entry.get("mask"), entry.get("overridden")
    if dim is not None and not 0 <= dim < len(blank.shape):
        raise ValueError(f"dim {dim} of shape {blank.shape}")
    count = 1 if dim is None else blank.shape[dim]
    if verdict == Verdict.SHRINK and entry["units"] != count:
        raise ValueError(f"{entry['units']!r} units with dim {dim} of shape {blank.shape}")
    if mask is not None and dim is None:
        raise ValueError("a mask without dim")
    if (before is None) == (cause == Cause.OVERRIDDEN):
        raise ValueError(f"cause {cause.value!r} with overridden {before!r}")
    symmetry = _symmetry(entry["symmetry"], names) if "symmetry" in entry else {}
    if (symmetry or cause in (Cause.JOINT, Cause.PAIR)) and not keys_of(blank.name, symmetry):
        raise ValueError("the symmetry lacks the parameter")
    return replace(
        blank,
        verdict=verdict,
        cause=cause,
        dim=dim,
        mask=None if mask is None else _mask(mask, count),
        in_blocks=_typed(entry, "in_blocks", bool, False),
        smallest_rms=_size(entry.get("smallest_rms", 0.0)),
        symmetry=symmetry,
        against=_known(_list(entry.get("against", []), str), names),
        parts_paired=_typed(entry, "parts_paired", bool, False),
        note=_typed(entry, "note", str, ""),
        overridden=None if before is None else _treatment(before, blank, names),
    )


def _typed(entry: dict[str, Any], key: str, kind: type, *default: Any) -> Any:
    value = entry.get(key, *default) if default else entry[key]
    if type(value) is not kind and (value,) != default:
        raise ValueError(f"{key} {value!r}")
    return value


def _size(value: Any) -> float:
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise ValueError(f"smallest_rms {value!r}")
    return value


def _list(values: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"{values!r} where a list of {kind.__name__} should be")
    return tuple(values)


def _known(keys: Any, names: set[str]) -> Any:
    if unknown := [key for key in keys if parameter_of(key) not in names]:
        raise ValueError(f"the unknown parameter {unknown[0]!r}")
    return keys


def _symmetry(symmetry: Any, names: set[str]) -> Symmetry:
    if not isinstance(symmetry, dict) or not all(type(e) is int and e for e in symmetry.values()):
        raise ValueError("a symmetry is {name: exponent}, with exponents that are whole numbers and not 0")
    return _known(symmetry, names)  # type: ignore[no-any-return]


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
        ValueError: The model has other parameters, shapes, ties or frozen parameters; the message names the
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
    bound = {t.name: (in_model[name], named[in_model[name]]) for name, t in planned.items()}
    check_frozen(treatments, {name: parameter for name, (_, parameter) in bound.items()})
    return bound


def check_frozen(treatments: Sequence[Treatment], parameters: Mapping[str, Tensor]) -> None:
    """Raise an error that names the first parameter that is frozen only in the plan, or only in the model.

    Args:
        treatments: The treatments of the plan.
        parameters: {name in the plan: parameter}.
    """
    for t in treatments:
        frozen = t.cause == Cause.FROZEN
        if parameters[t.name].requires_grad == frozen:
            raise _misfit(f"{t.name!r} is {'' if frozen else 'not '}frozen in the plan, unlike in the model")


def _misfit(difference: str) -> ValueError:
    return ValueError(f"the plan does not fit the model: {difference}; plan anew")
