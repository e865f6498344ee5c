"""Inspect a model that a command line names: its plan, as text, JSON or a page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise.inspection import batches as batch_sources
from normwise.inspection import models, narrowing
from normwise.planning.plan import Plan, plan

__all__ = ["Inspection", "inspect"]

_SMALL = 1 << 20  # a model of so many weights is planned itself
_NARROW = 1 << 25  # a copy of more weights is not narrow
_LARGE = 1 << 29  # a model of more weights is not planned itself


@dataclass(frozen=True)
class Inspection:
    """A plan and its model.

    Attributes:
        title: The model's name on the command line.
        plan: The plan.
        seconds: The time that planning took.
        narrowed: {setting: (value, value in the narrow copy)} if a narrow copy was planned. The plan is that
            of the full-size model all the same.
    """

    title: str
    plan: Plan
    seconds: float
    narrowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """What was planned, if it was not the model itself; else empty."""
        if not self.narrowed:
            return ""
        changes = ", ".join(f"{key} {wide} → {narrow}" for key, (wide, narrow) in self.narrowed.items())
        return (
            f"Planned by a narrow copy ({changes}), as symmetries do not depend on widths. The verdicts are "
            "carried over to the full size."
        )

    def to_json(self) -> str:
        """Return the plan as JSON that ``Plan.load`` reads, with counts of parameters and values added."""
        whole = json.loads(self.plan.to_json())
        counts: dict[str, dict[str, int]] = {}
        for t in self.plan.treatments:
            entry = counts.setdefault(t.verdict.value, {"parameters": 0, "values": 0})
            entry["parameters"] += 1
            entry["values"] += t.numel
        whole |= {"model": self.title, "seconds": round(self.seconds, 1), "counts": counts}
        if self.narrowed:
            whole["narrowed"] = {key: list(values) for key, values in self.narrowed.items()}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def inspect(
    factory: str | None,
    *,
    shapes: Sequence[str] = (),
    batch: Path | None = None,
    batches: str | None = None,
    transformers: str | None = None,
    forward: str | None = None,
    overrides: dict[str, str] | None = None,
) -> Inspection:
    """Find what decay does in a model, and plan for it.

    Args:
        factory: ``package.module:factory``; None with ``transformers``.
        shapes: Random inputs, as "8x3x32x32" or "4x16:int64".
        batch: Instead of ``shapes``: a safetensors file with one batch.
        batches: Instead of ``shapes``: ``package.module:function``, which returns batches.
        transformers: Instead of a factory: a configuration of transformers, which needs no inputs. The plan
            of a large model is that of a narrow copy, carried over.
        forward: ``package.module:function`` of (model, batch) that returns outputs, if the model itself does
            not.
        overrides: As for :func:`normwise.plan`.

    Raises:
        ValueError: Something cannot be done; the message is one line and says what.
    """
    if (factory is None) == (transformers is None):
        raise ValueError("give either a factory as package.module:factory or --transformers CONFIG")
    given = [
        name for name, value in (("--input", shapes), ("--batch", batch), ("--batches", batches)) if value
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: give one of them")
    call = None if forward is None else models.load(forward)
    start = time.monotonic()

    def planned(model: nn.Module, default: Any) -> Plan:
        given_batches = _batches(model, shapes, batch, batches, default)
        try:
            return plan(model, given_batches, call, overrides=overrides)
        except (Exception, SystemExit) as error:  # also from batches that are made as they are read
            raise ValueError(_with_options(models.one_line(error))) from error

    if transformers is None:
        assert factory is not None
        model = models.made_by(factory)
        start = time.monotonic()
        return Inspection(factory, planned(model, None), time.monotonic() - start)
    result, narrowed = _planned_narrow(models.from_transformers(transformers), planned, own_inputs=not given)
    return Inspection(f"transformers {transformers}", result, time.monotonic() - start, narrowed)


def _planned_narrow(
    configured: models.Configured, planned: Callable[[nn.Module, Any], Plan], *, own_inputs: bool
) -> tuple[Plan, Mapping[str, tuple[int, int]]]:
    """Return the plan of a model of transformers, and the settings of the narrow copy that was planned.

    A small model, or one with given inputs, is planned itself.
    """
    wide = configured.model(device="meta")
    size = sum(p.numel() for p in wide.parameters())
    refusal = ""
    for config in narrowing.narrowed(configured.config) if own_inputs and size > _SMALL else ():
        try:
            copy = replace(configured, config=config)
            empty = copy.model(device="meta")
            left = sum(p.numel() for p in empty.parameters())
            if left > min(size // 4, _NARROW) or not narrowing.same_parameters(wide, empty):
                continue
            with _one_thread():
                narrow = copy.model()
                result = planned(narrow, models.batch_for(narrow, config)).apply_to(wide, widened=True)
        except ValueError as error:
            refusal = f": {error}"
            continue
        return result, narrowing.differences(configured.config, config)
    if size > _LARGE:
        raise ValueError(
            f"--transformers {configured.name!r} has {size / 1e9:.1f} billion weights, and no narrow copy "
            f"could be planned instead{refusal}: plan a narrow copy of your own, and use Plan.apply_to"
        )
    model = configured.model()
    return planned(model, models.batch_for(model, configured.config)), {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the operations of a narrow copy are too small to be shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_options(message: str) -> str:
    """Return a message of the library with the options of the command line in place of arguments."""
    function = "--forward FUNCTION, where FUNCTION(model, batch) returns "
    return message.replace("forward=lambda model, batch: ", function).replace("forward=", "--forward")


def _batches(
    model: nn.Module, shapes: Sequence[str], batch: Path | None, batches: str | None, default: Any
) -> Any:
    if shapes:
        random = batch_sources.random_inputs(list(shapes), model)
        if default is None:
            return random
        name = next(iter(default))  # the main input of a transformers model goes by name
        return [{**default, name: drawn[0]} for drawn in random]
    if batch is not None:
        return batch_sources.read_safetensors(batch)
    if batches is not None:
        return batch_sources.returned_batches(batches)
    if default is None:
        raise ValueError("the model needs inputs: give --input SHAPE[:dtype], --batch FILE or --batches NAME")
    return [default]
