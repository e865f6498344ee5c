"""One training run: from settings to the summary of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.data import Dataset, downsample, load, split
from normwise.lab.models import ConvNet, directions, scale_directions
from normwise.lab.settings import Settings, TrainSettings, rule_from
from normwise.units import row_norms

__all__ = ["Images", "batches", "build", "evaluate", "optimizer_for", "train"]

Metrics = dict[str, Any]


class Images:
    """Training and test images of a run, normalised by the training images' mean and deviation.

    The data set must be on this machine already: a run fetches nothing.
    """

    def __init__(self, settings: Settings) -> None:
        dataset = _small_images(settings.data, settings.image_size, settings.fingerprint)
        part = split(dataset, settings.train_size, 0, settings.seed)
        mean, deviation = part.train_images.mean(), part.train_images.std()
        self.train, self.train_labels = (part.train_images - mean) / deviation, part.train_labels
        self.test, self.test_labels = (dataset.test_images - mean) / deviation, dataset.test_labels
        self.classes = len(dataset.classes)


@lru_cache(maxsize=1)
def _small_images(name: str, size: int, fingerprint: str) -> Dataset:
    """Return the data set at the size of the runs; kept, as the next run wants the same."""
    dataset = load(name, offline=True)
    if dataset.fingerprint != fingerprint:
        raise ValueError(
            f"{name} has changed since the job began: its SHA-256 is {dataset.fingerprint[:12]}…, "
            f"not {fingerprint[:12]}…: start the job again"
        )
    return replace(
        dataset,
        train_images=downsample(dataset.train_images, size),
        test_images=downsample(dataset.test_images, size),
    )


def build(settings: Settings, classes: int) -> ConvNet:
    """Return the network as it is at the start; the same for all rules and scales but for its norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ConvNet(settings.member, settings.batch_norm, settings.width, classes)
    scale_directions(model, settings.init_scale)
    return model


def optimizer_for(settings: Settings, model: ConvNet, fused: bool = True) -> torch.optim.SGD:
    """Return SGD over all parameters, with the rule at work on the directions and on nothing else."""
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, fused=fused)
    rule = rule_from(settings.rule)
    if rule is not None:
        nw.Decay(optimizer, rule, directions(model).values(), mode=settings.mode)
    return optimizer


def batches(
    settings: Settings, images: Images, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of all steps, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    step = 0
    while step < settings.steps:
        order = torch.randperm(settings.train_size, generator=generator)
        for chosen in order.split(settings.batch_size)[: settings.steps_per_epoch]:
            if step == settings.steps:
                return
            yield images.train[chosen].to(dtype), images.train_labels[chosen]
            step += 1


@torch.no_grad()
def evaluate(model: ConvNet, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy, with the running statistics of batch norm."""
    training = model.training
    model.eval()
    losses, hits = 0.0, 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        logits = model(x)
        losses += float(cross_entropy(logits, y, reduction="sum"))
        hits += int((logits.argmax(1) == y).sum())
    model.train(training)
    return losses / len(labels), hits / len(labels)


def train(settings: TrainSettings, log: Callable[[Metrics], None]) -> Metrics:
    """Carry out a run.

    Args:
        settings: What to do.
        log: Is called with the metrics of each epoch.

    Returns:
        The summary. ``status`` is "finished", "refused" (the rule refused to go on: ``reason`` says why) or
        "not finite" (the loss was not a finite number); ``step`` is where it ended. A finished run has
        train_loss, train_accuracy, test_loss, test_accuracy (fractions), and norms and effective learning
        rates by layer.
    """
    images = Images(settings)
    model = build(settings, images.classes)
    optimizer = optimizer_for(settings, model)
    before = _units(model)
    losses: list[Tensor] = []
    for step, (x, y) in enumerate(batches(settings, images)):
        lr = optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        losses.append(loss.detach())
        loss.backward()
        try:
            optimizer.step()
        except ValueError as error:  # mode "explicit" refuses a coefficient that would flip the weight
            return {"status": "refused", "step": step, "reason": str(error)}
        if (step + 1) % settings.steps_per_epoch == 0:
            mean_loss = float(torch.stack(losses).mean())
            if not math.isfinite(mean_loss):
                return {"status": "not finite", "step": step, "reason": f"the training loss was {mean_loss}"}
            now = _units(model)
            log(
                {
                    "step": step + 1,
                    "train_loss": mean_loss,
                    "lr": lr,
                    "layers": _layers(model, lr, before, now),
                }
            )
            before, losses = now, []
    train_loss, train_accuracy = evaluate(model, images.train, images.train_labels)
    test_loss, test_accuracy = evaluate(model, images.test, images.test_labels)
    if not math.isfinite(train_loss + test_loss):
        return {"status": "not finite", "step": settings.steps, "reason": "the final loss is not finite"}
    return {
        "status": "finished",
        "step": settings.steps,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "norms": {name: float(row_norms(w).mean()) for name, w in directions(model).items()},
    }


def _units(model: ConvNet) -> dict[str, Tensor]:
    return {
        name: nw.functional.weight_norm(weight.detach().flatten(1))
        for name, weight in directions(model).items()
    }


def _layers(model: ConvNet, lr: float, before: dict[str, Tensor], now: dict[str, Tensor]) -> Metrics:
    """Mean norm, mean effective learning rate and mean turn (radians in this epoch) of each layer."""
    layers = {}
    for name, weight in directions(model).items():
        norms = row_norms(weight).flatten()
        alive = norms[(norms > 0) & norms.isfinite()]  # a unit that died or blew up has no effective rate
        turned = 2 * torch.asin(((now[name] - before[name]).norm(dim=1) / 2).clamp(max=1))
        layers[name] = {
            "norm": float(norms.mean()),
            "effective_lr": float(nw.theory.effective_lr(lr, alive).mean()) if len(alive) else None,
            "turn": float(turned.mean()),
        }
    return layers
