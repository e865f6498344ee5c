"""Loading a checkpoint whose weights are stored in another form than the model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        path: The keys that lead to the state dict inside a nested checkpoint, such as ("generator",).
        prefix: The prefix that was removed from the keys, such as "module.".
        renamed: For each new key, the old keys from which it was renamed or computed, without the prefix.
        missing: Keys of the model that the state dict has no values for.
        unexpected: Keys of the state dict that the model does not have. They are passed on.
    """

    path: tuple[str, ...] = ()
    prefix: str = ""
    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"taken from: {' / '.join(self.path)}"] if self.path else []
        lines += [f"prefix removed: {self.prefix}"] if self.prefix else []
        lines += [f"{' + '.join(old)} -> {new}" for new, old in self.renamed.items()]
        lines += [f"missing: {key}" for key in self.missing]
        lines += [f"unexpected: {key}" for key in self.unexpected]
        return "\n".join(lines) or "nothing to do"


def upgrade_state_dict(
    state_dict: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Any], UpgradeReport]:
    """Convert the weights of a state dict to the form that ``model`` has.

    These forms of a weight convert to each other: plain (``weight``); weight norm, as torch's older hook
    (``weight_g``, ``weight_v``) or as a parametrization (``parametrizations.weight.original0``,
    ``.original1``), also with another ``dim`` than the model's; and spectral norm, as torch's older hook
    (``weight_orig``, ``weight_u``, ``weight_v``) or as a parametrization
    (``parametrizations.weight.original``, ``.0._u``, ``.0._v``). Other entries are passed on.

    The state dict may lie inside a nested checkpoint (``{"generator": {...}, "steps": 7}``), and its keys may
    have a prefix (``module.``, ``_orig_mod.``, ``generator.``). The report names both.

    A pair (gain, direction) that becomes one weight is evaluated as weight normalisation, because a
    checkpoint does not record the member. If it comes from another member, fold that model and save it again.
    A plain weight becomes the original of a spectral norm, which then divides it by its largest singular
    value.

    Args:
        state_dict: From ``torch.load(..., weights_only=True)``, ``safetensors.torch.load_file``, ...; it is
            not changed.
        model: The model that will load the result. Its values are not read, so it may be on "meta".

    Returns:
        The new state dict, and a report of the keys that were renamed or computed, are missing or are
        unexpected.

    Raises:
        TypeError: ``state_dict`` is not a mapping with names as keys, or a value that the model needs is not
            a tensor.
        ValueError: The stored tensors of a weight do not fit together or do not fit the model, or several
            nested state dicts or several prefixes fit the model equally well.

    Example:
        >>> old = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).state_dict()
        >>> new, report = upgrade_state_dict({f"module.{key}": value for key, value in old.items()},
        ...                                  nn.Linear(4, 3))
        >>> print(report)
        prefix removed: module.
        parametrizations.weight.original0 + parametrizations.weight.original1 -> weight
    """
    wanted = model.state_dict()
    slots, normalized = _slots(model), members(model)
    known = {key for slot in slots for form in _forms(slot) for key in form.keys} | set(wanted)
    path, prefix, new = _extract(state_dict, known)
    report = UpgradeReport(path, prefix)
    for slot, module in slots.items():
        member = normalized.get(slot)
        targets = _target_keys(slot, member)
        stored = next((form for form in _forms(slot) if all(key in new for key in form.keys)), None)
        if stored is None or not all(isinstance(wanted.get(key), Tensor) for key in targets):
            continue
        values = [_tensor(key, new[key]) for key in stored.keys]
        shapes = [wanted[key].shape for key in targets]
        if stored.keys == targets:
            if stored.kind != "pair" or values[0].shape == shapes[0]:
                continue
            if member is not None and member.kind != "weight_norm":
                raise ValueError(
                    f"the gain of {slot} has shape {tuple(values[0].shape)} in the state dict, but "
                    f"{tuple(shapes[0])} in the model, and {member.kind} does not convert to another dim: "
                    "fold the model that it comes from and save it again"
                )
        converted = _convert(slot, stored.kind, values, module, member, shapes)
        if converted is None:
            continue
        for key in stored.keys:
            del new[key]
        for key, value in zip(targets, converted, strict=True):
            new[key] = value
            report.renamed[key] = stored.keys
    for key in new:
        if isinstance(wanted.get(key), Tensor):
            _tensor(key, new[key])
    report.missing.extend(key for key in wanted if key not in new)
    report.unexpected.extend(key for key in new if key not in wanted)
    return new, report


# ------------------------------------------------------------------------- finding the state dict
def _extract(checkpoint: object, known: set[str]) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """Return where in a checkpoint the state dict lies, the prefix of its keys, and it without the prefix.

    Args:
        checkpoint: A state dict, or a mapping that contains one at any depth.
        known: Every key under which the model's weights may be stored.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"state_dict must be a mapping of names to tensors, not {type(checkpoint).__name__}: "
            "load the file first, with torch.load or safetensors.torch.load_file"
        )
    fits: list[tuple[int, tuple[str, ...], str]] = []
    for path, mapping in _nested(checkpoint, ()):
        counts: Counter[str] = Counter()
        for key in mapping:
            for start in _starts(key):
                if _cleaned(key[start:], known) in known:
                    counts[key[:start]] += 1
        fits += [(count, path, prefix) for prefix, count in counts.items()]
    best = max((count for count, _, _ in fits), default=0)
    chosen = [(path, prefix) for count, path, prefix in fits if count == best]
    if ((), "") in chosen or not chosen:
        path, prefix = (), ""
    elif len(chosen) > 1:
        names = [" / ".join([*path, prefix] if prefix else path) for path, prefix in chosen]
        raise ValueError(f"state_dict contains several that fit the model, {names}: pass one of them alone")
    else:
        path, prefix = chosen[0]
    nested: Any = checkpoint
    for key in path:
        nested = nested[key]
    flat = {_cleaned(key.removeprefix(prefix), known): value for key, value in nested.items()}
    if len(flat) != len(nested):
        raise ValueError(
            f"state_dict has keys with and without the prefix {prefix or '_orig_mod.'!r}: pass one kind"
        )
    return path, prefix, flat


def _nested(mapping: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a mapping and the mappings inside it whose keys are all names, each with its path."""
    if all(isinstance(key, str) for key in mapping):
        yield path, mapping
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                yield from _nested(value, (*path, key))
    elif not path:
        odd = next(key for key in mapping if not isinstance(key, str))
        raise TypeError(f"state_dict must have names as keys, not {odd!r}")


def _starts(key: str) -> list[int]:
    """Return the positions at which a key may begin after a prefix."""
    return [0, *(k + 1 for k, character in enumerate(key) if character == ".")]


def _cleaned(key: str, known: set[str]) -> str:
    """Return the key without the ``_orig_mod.`` of compiled submodules, if the model knows it so."""
    plain = key.replace("_orig_mod.", "")
    return plain if plain in known else key


# ------------------------------------------------------------------------------- the forms of a weight
class _Form(NamedTuple):
    kind: str  # "pair" (gain, direction), "spectral" (weight, u, v) or "plain"
    keys: tuple[str, ...]


def _slots(model: nn.Module) -> dict[str, nn.Module]:
    """Return the qualified names that the weights would have in a plain model, each with its module."""
    slots = {name: member.module for name, member in members(model).items()}
    for prefix, module in model.named_modules():
        if not isinstance(module, parametrize.ParametrizationList):
            slots |= {f"{prefix}.{name}" if prefix else name: module for name in module._parameters}
    return slots


def _forms(slot: str) -> list[_Form]:
    """Return the forms in which a checkpoint may store the weight ``slot``."""
    prefix, dot, name = slot.rpartition(".")
    chain = f"{prefix}{dot}parametrizations.{name}"
    return [
        _Form("pair", (f"{chain}.original0", f"{chain}.original1")),
        _Form("pair", (f"{slot}_g", f"{slot}_v")),
        _Form("spectral", (f"{chain}.original", f"{chain}.0._u", f"{chain}.0._v")),
        _Form("spectral", (f"{slot}_orig", f"{slot}_u", f"{slot}_v")),
        _Form("plain", (slot,)),
    ]


def _target_keys(slot: str, member: Member | None) -> tuple[str, ...]:
    """Return the keys under which the model stores the weight ``slot``."""
    if member is None:
        return (slot,)
    if member.kind == "spectral_norm":
        return _forms(slot)[2 if member.form == "parametrization" else 3].keys
    prefix, dot, _ = slot.rpartition(".")
    return tuple(f"{prefix}{dot}{original}" for original in member.originals)


def _tensor(key: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"state_dict[{key!r}] must be a tensor, not {type(value).__name__}")
    return value


def _convert(
    slot: str,
    form: str,
    values: list[Tensor],
    module: nn.Module,
    member: Member | None,
    shapes: list[torch.Size],
) -> list[Tensor] | None:
    """Convert the stored tensors of a weight to those that the model stores, or return None if it cannot be.

    Args:
        slot: The name of the weight.
        form: The form in which it is stored: "pair", "spectral" or "plain".
        values: The stored tensors.
        module: The module that owns the weight.
        member: What computes the weight in the model, or None: it is plain.
        shapes: The shapes of the tensors that the model stores.
    """
    kind = "plain" if member is None else member.kind
    spectral = kind == "spectral_norm"
    if (form == "spectral" and spectral) or (
        form == "pair" and kind == "weight_norm" and [value.shape for value in values] == shapes
    ):
        return values  # renamed only
    with torch.no_grad():
        weight = _evaluate(slot, form, values, module)
        expected = shapes[0 if spectral else -1]
        if weight.shape != expected:
            raise ValueError(
                f"the weight {slot} has shape {tuple(weight.shape)} in the state dict, but {tuple(expected)} "
                "in the model: load it into the model that it belongs to"
            )
        if kind == "orthogonal":
            return None  # it takes more than the weight
        if spectral:
            left, _, right = torch.linalg.svd(
                _matrix(slot, weight, shapes[1].numel(), module).double(), full_matrices=False
            )
            return [weight, left[:, 0].to(weight.dtype), right[0].to(weight.dtype)]
        if member is None or len(shapes) == 1:
            return [weight]
        return [natural_gain(weight, _formula(member)), weight]


def _evaluate(slot: str, form: str, values: list[Tensor], module: nn.Module) -> Tensor:
    """Return the weight that the stored tensors stand for."""
    for value in values:
        if not value.is_floating_point():
            raise ValueError(
                f"the weight {slot} is stored as {value.dtype}: convert it to floating point first"
            )
    if form == "plain":
        return values[0]
    if form == "spectral":
        weight, u, v = values
        matrix = _matrix(slot, weight, u.numel(), module)
        if u.ndim != 1 or v.shape != matrix.shape[1:]:
            raise ValueError(
                f"the spectral norm of {slot} is stored with vectors of shapes {tuple(u.shape)} and "
                f"{tuple(v.shape)}, which do not fit a weight of shape {tuple(weight.shape)}"
            )
        return (weight / (u.double() @ (matrix.double() @ v.double()))).to(weight.dtype)
    gain, weight = values
    return normalize(weight, gain, Formula(_dim_of(slot, gain, weight), center=False, factor=1.0))


def _matrix(slot: str, weight: Tensor, rows: int, module: nn.Module) -> Tensor:
    """Return the weight as the matrix whose largest singular value spectral norm computes.

    Args:
        slot: The name of the weight.
        weight: Its value.
        rows: The number of rows of the matrix: the size of the weight along one of its dimensions.
        module: The module that owns the weight. Transposed convolutions have their rows along dim 1.
    """
    first = 1 if getattr(module, "transposed", False) else 0
    for dim in [first, *range(weight.ndim)]:
        if dim < weight.ndim and weight.shape[dim] == rows:
            return weight.movedim(dim, 0).flatten(1)
    raise ValueError(
        f"the spectral norm of {slot} is stored with a vector of {rows} elements, which does not fit a "
        f"weight of shape {tuple(weight.shape)}"
    )


def _formula(member: Member) -> Formula:
    if member.form == "parametrization":
        first = next(chains(member.module)[member.name].children())
        if isinstance(first, NormalizedWeight):
            return first.formula
    return Formula(member.dim, center=False, factor=1.0)


def _dim_of(slot: str, gain: Tensor, weight: Tensor) -> int | None:
    """Return the dim of the units that ``gain`` belongs to."""
    counted = [k for k, size in enumerate(gain.shape) if size != 1]
    if (
        gain.ndim not in (0, weight.ndim)
        or len(counted) > 1
        or any(gain.shape[k] != weight.shape[k] for k in counted)
    ):
        raise ValueError(
            f"the gain of {slot}, of shape {tuple(gain.shape)}, does not fit its weight, of shape "
            f"{tuple(weight.shape)}: it must have one number per unit, and size 1 in every other dimension"
        )
    return counted[0] if counted else None
