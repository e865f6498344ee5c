"""The images of a run: what it trains on, in which order, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from normwise.lab.data.datasets import Dataset, downsample, load, split
from normwise.lab.models.convnet import ConvNet
from normwise.lab.runs.settings import ImageSettings

__all__ = ["Images", "batches", "evaluate"]


class Images:
    """Training, validation and test images of a run, normalised by the training images' mean and deviation.

    The data set must be on this machine already: a run fetches nothing. With the same seed the training
    images are the same whatever the size of the validation part.
    """

    def __init__(self, settings: ImageSettings, validation_size: int = 0) -> None:
        dataset = _small_images(settings.data, settings.image_size, settings.fingerprint)
        part = split(dataset, settings.train_size, validation_size, settings.seed)
        mean, deviation = part.train_images.mean(), part.train_images.std()
        self.train, self.train_labels = (part.train_images - mean) / deviation, part.train_labels
        self.validation, self.validation_labels = (
            (part.validation_images - mean) / deviation,
            part.validation_labels,
        )
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


def batches(
    settings: ImageSettings, images: Images, dtype: torch.dtype = torch.float32
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
