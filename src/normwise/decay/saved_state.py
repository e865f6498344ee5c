"""What a Decay accepts as a state to continue from. Everything is checked before anything is changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from normwise.decay.kahan import LARGEST_PENDING, SMALLEST_PENDING
from normwise.sharding import is_sharded, local_tensor
from normwise.units import Unit

__all__ = ["check_state"]

_SETTINGS = ("format", "rule", "mode", "clock", "measure", "every", "compensated")


@torch.no_grad()
def check_state(
    saved: Any, present: dict[str, Any], units: Sequence[Unit], rates: Sequence[float | Tensor]
) -> None:
    """Raise an error that names the first fault of a saved state, or difference from that of this Decay.

    Args:
        saved: The state_dict to load.
        present: The state_dict of this Decay.
        units: The Units of this Decay.
        rates: The learning rate of each param_group of the optimizer.

    Raises:
        ValueError: The state is damaged, or belongs to another Decay.
    """
    if not isinstance(saved, dict) or set(saved) != set(present):
        raise ValueError(f"state_dict is not one of a Decay: it needs the keys {', '.join(present)}")
    for key in _SETTINGS:
        if not _is_same(saved[key], present[key]):
            raise ValueError(
                f"state_dict was made with {key}={_in_words(saved[key])}, and this Decay has "
                f"{key}={_in_words(present[key])}: construct it as it was (plan.attach: before you load "
                "optimizer and scheduler), or start without the old state"
            )
    _check_units(saved["units"], present["units"])
    steps = saved["steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 2**63:
        raise _damaged("steps", steps, "a whole number, 0 or more")
    for k, times in enumerate(_list("elapsed", saved["elapsed"], len(units))):
        for j, time in enumerate(_list(f"elapsed[{k}]", times, len(units[k].params))):
            if time is not None and not _is_time(time):
                raise _damaged(f"elapsed[{k}][{j}]", time, "None or a finite number, 0 or more")
    _check_peaks(saved["max_lr"], rates)
    for k, reference in enumerate(_list("reference", saved["reference"], len(present["reference"]))):
        mask = units[k].mask
        acting = _values(f"reference[{k}]", reference, (units[k].count,), mask)
        if not bool((acting.isfinite() & (acting > 0)).all()):
            raise _damaged(f"reference[{k}]", reference, "finite positive norms")
    starts = _list("start", saved["start"], len(present["start"]))
    for k, readings in enumerate(starts):
        if not isinstance(readings, list) or not all(
            isinstance(value, float) and math.isfinite(value) for value in readings
        ):
            raise _damaged(f"start[{k}]", readings, "a list of finite numbers")
    for k, of_unit in enumerate(_list("pending", saved["pending"], len(present["pending"]))):
        for j, factors in enumerate(_list(f"pending[{k}]", of_unit, len(units[k].params))):
            name = f"pending[{k}][{j}]"
            values = _values(name, factors, (units[k].count,), None)
            if not bool(((values >= SMALLEST_PENDING) & (values <= LARGEST_PENDING)).all()):
                raise _damaged(name, factors, f"factors from {SMALLEST_PENDING} to {LARGEST_PENDING}")


def _check_units(saved: Any, present: list[dict[str, Any]]) -> None:
    if not isinstance(saved, list) or len(saved) != len(present):
        found = f"{len(saved)} units" if isinstance(saved, list) else f"units={_in_words(saved)}"
        raise ValueError(
            f"state_dict has {found}, and this Decay has {len(present)}: construct it with the same "
            "parameters"
        )
    for k, (old, new) in enumerate(zip(saved, present, strict=True)):
        if not isinstance(old, dict) or set(old) != set(new):
            raise _damaged(f"units[{k}]", old, f"a dict with the keys {', '.join(new)}")
        for key in new:
            if not _is_same(old[key], new[key]):
                raise ValueError(
                    f"unit {k} of the state_dict has {key}={_in_words(old[key])}, and of this Decay "
                    f"{key}={_in_words(new[key])}: construct it with the same units"
                )


def _check_peaks(saved: Any, rates: Sequence[float | Tensor]) -> None:
    if not isinstance(saved, list):
        raise _damaged("max_lr", saved, "a list with a rate for each param_group")
    if len(saved) > len(rates):
        raise ValueError(
            f"state_dict has the peak rates of {len(saved)} param_groups, and the optimizer has "
            f"{len(rates)}: add its groups before loading"
        )
    for k, (peak, rate) in enumerate(zip(saved, rates, strict=False)):
        name, value = f"max_lr[{k}]", peak
        if isinstance(peak, Tensor):
            value = float(_values(name, peak, tuple(rate.shape) if isinstance(rate, Tensor) else (), None))
        if not _is_time(value):
            raise _damaged(name, peak, "a finite number, 0 or more")


def _list(name: str, value: Any, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise _damaged(name, value, f"a list of length {length}")
    return value


def _values(name: str, value: Any, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Return the part of a tensor that is on this rank and in the mask."""
    if (
        not isinstance(value, Tensor)
        or value.is_nested
        or value.layout != torch.strided
        or not value.is_floating_point()
        or value.is_meta
        or tuple(value.shape) != shape
    ):
        raise _damaged(name, value, f"a floating-point tensor of shape {shape}")
    values = local_tensor(value).detach().to(torch.float64 if value.device.type != "mps" else torch.float32)
    return values if mask is None or is_sharded(value) else values[mask.to(values.device)]


def _is_time(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
    )


def _is_same(saved: Any, present: Any) -> bool:
    """Return whether two plain values are equal; a tensor, or True in place of 1, is not."""
    if isinstance(present, dict):
        keys_agree = isinstance(saved, dict) and set(saved) == set(present)
        return keys_agree and all(_is_same(saved[key], present[key]) for key in present)
    if isinstance(present, (list, tuple)):
        fits = isinstance(saved, (list, tuple)) and len(saved) == len(present)
        return fits and all(_is_same(a, b) for a, b in zip(saved, present, strict=True))
    if isinstance(saved, Tensor) or isinstance(present, Tensor):
        return isinstance(saved, Tensor) and isinstance(present, Tensor) and torch.equal(saved, present)
    numbers = isinstance(saved, Real) and isinstance(present, Real)
    is_kind = numbers and isinstance(saved, bool) == isinstance(present, bool)
    return (is_kind or type(saved) is type(present)) and bool(saved == present)


def _damaged(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"state_dict has {name}={_in_words(value)}, which must be {allowed}: load a state that is not damaged"
    )


def _in_words(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided:
            return "a tensor that is not dense"
        found = f", {value.tolist()}" if value.numel() <= 4 and not value.is_meta else ""
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}{found}"
    if isinstance(value, dict) and "name" in value:
        arguments = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "name")
        value = f"{value['name']}({arguments})"
        text = " ".join(value.split())
    else:
        text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
