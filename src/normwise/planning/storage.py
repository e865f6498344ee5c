"""A plan as JSON, and whether it fits a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normwise.planning.decide import parameter_aliases
from normwise.planning.symmetries import Symmetry
from normwise.planning.treatment import VERDICTS, Treatment

__all__ = ["bind", "from_json", "read", "to_json"]

_FORMAT = 1
# What wrappers put into names: torch.compile, FSDP, activation checkpointing; DDP a prefix.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def to_json(treatments: list[Treatment], symmetries: list[Symmetry]) -> str:
    """Return the plan as JSON: names and shapes are the fingerprint of the model."""
    parameters = []
    for t in treatments:
        entry: dict[str, Any] = {"name": t.name, "shape": list(t.shape), "role": t.role}
        entry |= {"verdict": t.verdict, "reason": t.reason}
        if t.verdict == "shrink":
            entry["dim"] = t.dim
        if t.mask is not None:
            entry["mask"] = _ranges(t.mask)
        if t.together:
            entry["together"] = list(t.together)
        if t.against:
            entry["against"] = list(t.against)
        if t.aliases:
            entry["aliases"] = list(t.aliases)
        parameters.append(entry)
    whole = {"format": _FORMAT, "what": "normwise plan", "parameters": parameters, "symmetries": symmetries}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[list[Treatment], list[Symmetry]]:
    """Return what :func:`to_json` wrote.

    Raises:
        ValueError: It is not such a text; the message names the place.
    """
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON ({error}): give a file that Plan.save wrote") from error
    if not isinstance(whole, dict) or whole.get("what") != "normwise plan":
        raise ValueError("this is no plan: give a file that Plan.save wrote")
    if whole.get("format") != _FORMAT:
        raise ValueError(
            f"the plan has format {whole.get('format')!r}, and this version reads {_FORMAT}: make it anew"
        )
    entries, symmetries = whole.get("parameters"), whole.get("symmetries")
    if not isinstance(entries, list) or not isinstance(symmetries, list):
        raise ValueError("the plan lacks its parameters or symmetries: make it anew")
    for symmetry in symmetries:
        if not isinstance(symmetry, dict) or not all(isinstance(e, int) for e in symmetry.values()):
            raise ValueError(f"the plan has a symmetry that is none: {symmetry!r}")
    return [_treatment(entry) for entry in entries], symmetries


def _treatment(entry: Any) -> Treatment:
    try:
        shape = tuple(int(size) for size in entry["shape"])
        dim, verdict = entry.get("dim"), entry["verdict"]
        if verdict not in VERDICTS or not (dim is None or (type(dim) is int and 0 <= dim < len(shape))):
            raise ValueError(f"verdict {verdict!r} with dim {dim!r}")
        mask = _mask(entry["mask"], shape[dim]) if "mask" in entry and dim is not None else None
        return Treatment(
            name=str(entry["name"]),
            shape=shape,
            verdict=verdict,
            reason=str(entry["reason"]),
            role=str(entry["role"]),
            dim=dim,
            mask=mask,
            together=tuple(map(str, entry.get("together", ()))),
            against=tuple(map(str, entry.get("against", ()))),
            aliases=tuple(map(str, entry.get("aliases", ()))),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the plan has an entry that is none ({error}): {str(entry)[:80]}") from error


def _ranges(mask: tuple[bool, ...]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for k, meant in enumerate(mask):
        if meant and ranges and ranges[-1][1] == k:
            ranges[-1][1] = k + 1
        elif meant:
            ranges.append([k, k + 1])
    return ranges


def _mask(ranges: list[list[int]], size: int) -> tuple[bool, ...]:
    if not all(0 <= a < b <= size for a, b in ranges):
        raise ValueError(f"mask {ranges} beyond {size}")
    return tuple(any(a <= k < b for a, b in ranges) for k in range(size))


def read(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the plan {path} cannot be read: {error}") from error


def bare(name: str) -> str:
    """Return a name without what wrappers add to it.

    Example:
        >>> bare("module._orig_mod.fc.weight")
        'fc.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def bind(treatments: list[Treatment], model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return {name in the plan: (name in the model, parameter)}; names are compared without wrappers.

    Raises:
        ValueError: The model has other parameters, shapes or ties than the plan; the message names the
            first difference.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named: Mapping[str, Tensor] = dict(model.named_parameters())
    theirs = {bare(name): name for name in named}
    ties = {
        bare(name): {bare(other) for other in others} for name, others in parameter_aliases(model).items()
    }
    mine = {bare(t.name): t for t in treatments}
    for name, t in mine.items():
        if name not in theirs:
            raise ValueError(f"the plan does not fit the model: {t.name!r} is not in the model; plan anew")
        shape = tuple(named[theirs[name]].shape)
        if shape != t.shape:
            raise ValueError(
                f"the plan does not fit the model: {t.name!r} has shape {t.shape} in the plan and {shape} "
                "in the model; plan anew"
            )
        if {bare(alias) for alias in t.aliases} != ties[name]:
            raise ValueError(
                f"the plan does not fit the model: {t.name!r} is shared with "
                f"{', '.join(sorted(t.aliases)) or 'nothing'} in the plan and with "
                f"{', '.join(sorted(ties[name])) or 'nothing'} in the model; plan anew"
            )
    new = [full for name, full in theirs.items() if name not in mine]
    if new:
        raise ValueError(
            f"the plan does not fit the model: {new[0]!r} is in the model and not in the plan; plan anew"
        )
    return {t.name: (theirs[name], named[theirs[name]]) for name, t in mine.items()}
