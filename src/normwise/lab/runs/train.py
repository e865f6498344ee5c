"""One training run: from settings to the summary of what came out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.data.images import Images, batches, evaluate
from normwise.lab.models.convnet import ConvNet, directions
from normwise.lab.runs.image_setup import build, optimizer_for
from normwise.lab.runs.settings import TrainSettings
from normwise.norms import slice_norms

__all__ = ["train"]

Metrics = dict[str, Any]

LINES = 40  # of metrics in a run
SPIKE = 2.0  # times the median of the losses before it


def train(settings: TrainSettings, log: Callable[[Metrics], None]) -> Metrics:
    """Carry out a run.

    Args:
        settings: What to do.
        log: Is called some 40 times with the metrics since the time before: mean training loss, learning
            rate, and for each layer its mean norm, effective learning rate and turn (radians).

    Returns:
        The summary. ``status`` is "finished", "refused" (the rule refused to go on: ``reason`` says why) or
        "not finite" (the loss was not a finite number); ``step`` is where it ended. A finished run has
        train_loss, train_accuracy, test_loss, test_accuracy (fractions), validation_loss and
        validation_accuracy where there is such a part, the norms by layer, how many steps the scaler skipped
        and how many losses were spikes.
    """
    images = Images(settings, settings.validation_size)
    model = build(settings, images.classes)
    optimizer = optimizer_for(settings, model)
    scaler = torch.amp.GradScaler("cpu", enabled=settings.precision == "float16")
    before = _units(model)
    losses: list[Tensor] = []
    skipped, noted = 0, 0
    every = max(1, settings.steps // LINES)
    for step, (x, y) in enumerate(batches(settings, images)):
        lr = _set_rates(optimizer, settings, step)
        optimizer.zero_grad()
        with _autocast(settings.precision):
            loss = cross_entropy(model(x), y)
        losses.append(loss.detach())
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        try:
            scaler.step(optimizer)
        except ValueError as error:  # mode "explicit" refuses a coefficient that would flip the weight
            return {"status": "refused", "step": step, "reason": str(error)}
        scaler.update()
        skipped += scaler.get_scale() < scale
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            mean_loss = float(torch.stack(losses[noted:]).mean())
            if not math.isfinite(mean_loss):
                reason = f"the training loss was {mean_loss}"
                return {"status": "not finite", "step": step, "reason": reason, "skipped_steps": skipped}
            now = _units(model)
            layers = _layers(model, lr, before, now)
            log({"step": step + 1, "train_loss": mean_loss, "lr": lr, "layers": layers})
            before, noted = now, len(losses)
    summary = _measured(model, images)
    if not math.isfinite(summary["train_loss"] + summary["test_loss"]):
        return {"status": "not finite", "step": settings.steps, "reason": "the final loss is not finite"}
    return {
        "status": "finished",
        "step": settings.steps,
        **summary,
        "norms": {name: float(slice_norms(w).mean()) for name, w in directions(model).items()},
        "skipped_steps": skipped,
        "spikes": _spikes(losses),
    }


def _set_rates(optimizer: Optimizer, settings: TrainSettings, step: int) -> float:
    """Set the learning rate of every group for this step; return the common one."""
    lr = settings.lr_at(step)
    rest, *layers = optimizer.param_groups
    rest["lr"] = lr
    for k, group in enumerate(layers):
        group["lr"] = lr * (
            _at(settings.relative_lr[k], step / settings.steps) if settings.relative_lr else 1
        )
    return lr


def _at(values: tuple[float, ...], way: float) -> float:
    """Interpolate positive values geometrically, ``way`` from 0 to 1 between the first and the last."""
    place = way * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    share = place - low
    return float(values[low] ** (1 - share) * values[low + 1] ** share)


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, precision))


def _measured(model: ConvNet, images: Images) -> Metrics:
    found: Metrics = {}
    for part in ("train", "validation", "test"):
        labels = getattr(images, f"{part}_labels")
        if len(labels):
            loss, accuracy = evaluate(model, getattr(images, part), labels)
            found |= {f"{part}_loss": loss, f"{part}_accuracy": accuracy}
    return found


def _spikes(losses: list[Tensor], window: int = 20) -> int:
    """Count the losses that are more than SPIKE times the median of those before, and 0.5 above it."""
    if len(losses) <= window:
        return 0
    values = torch.stack(losses).float()
    median = values[:-1].unfold(0, window, 1).median(1).values
    later = values[window:]
    return int(((later > SPIKE * median) & (later > median + 0.5)).sum())


def _units(model: ConvNet) -> dict[str, Tensor]:
    return {
        name: nw.functional.weight_norm(weight.detach().flatten(1))
        for name, weight in directions(model).items()
    }


def _layers(model: ConvNet, lr: float, before: dict[str, Tensor], now: dict[str, Tensor]) -> Metrics:
    """Mean norm, mean effective learning rate and mean turn (radians, since the line before) by layer."""
    layers = {}
    for name, weight in directions(model).items():
        norms = slice_norms(weight).flatten()
        alive = norms[(norms > 0) & norms.isfinite()]  # a unit that died or blew up has no effective rate
        turned = 2 * torch.asin(((now[name] - before[name]).norm(dim=1) / 2).clamp(max=1))
        layers[name] = {
            "norm": float(alive.mean()) if len(alive) else None,
            "effective_lr": float(nw.theory.effective_lr(lr, alive).mean()) if len(alive) else None,
            "turn": float(turned.mean()),
        }
    return layers
