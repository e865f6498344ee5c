"""Checkpoints inside a run: the state of a training in one file, complete or not there at all."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from normwise.lab.engine.store import naming_errors, write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = 1
_DAMAGED = (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError)


def save_checkpoint(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before is replaced only by a complete one.

    Args:
        path: The file.
        settings: What the training depends on, as plain values.
        state: Tensors and plain values.

    Raises:
        ValueError: The file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "settings": _plain(settings), "state": state}, buffer)
    with naming_errors(path):
        write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of a checkpoint on the CPU, or None if there is no file.

    Nothing but tensors and plain values is unpickled (``weights_only``).

    Raises:
        ValueError: It is damaged, of another format, or of other settings; the message names the first
            setting that differs.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, known = content["settings"], content["format"] == _FORMAT
    except (*_DAMAGED, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read ({reason}): delete it, and the run starts from its beginning"
        ) from error
    if not known:
        raise ValueError(f"{path} is of format {content['format']}, not {_FORMAT}: delete it to start again")
    wanted = _plain(settings)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} is of other settings: {key} is {found.get(key)!r} there and {wanted.get(key)!r} "
                "now; give the settings of before, or delete it to start again"
            )
    state: dict[str, Any] = content["state"]
    return state


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as JSON would: tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
