"""The images of a run: its training, validation and test images, the order of its batches, its evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normwise.lab.data.datasets import Dataset, downsample, load, split
from normwise.lab.runs.base import ImageRun

__all__ = ["Images", "batches", "evaluate"]


class Images:
    """Training, validation and test images of a run, standardised by mean and deviation of training images.

    The data set must be on this machine already: a run never downloads. For a given seed, the training images
        do
    not depend on the size of the validation set.
    """

    def __init__(self, run: ImageRun, validation_size: int = 0) -> None:
        dataset = _small_images(run.data, run.image_size, run.fingerprint)
        part = split(dataset, run.train_size, validation_size, run.seed)
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
    """Return the downsampled data set. It is cached, as successive runs use the same one."""
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
    run: ImageRun, images: Images, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of all steps. Their order depends on the seed alone."""
    generator = torch.Generator().manual_seed(run.seed)
    step = 0
    while step < run.steps:
        order = torch.randperm(run.train_size, generator=generator)
        for chosen in order.split(run.batch_size)[: run.steps_per_epoch]:
            if step == run.steps:
                return
            yield images.train[chosen].to(dtype), images.train_labels[chosen]
            step += 1


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy, computed with the running statistics of batch norm."""
    training = model.training
    model.eval()
    losses, hits = 0.0, 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        logits = model(x)
        losses += float(cross_entropy(logits, y, reduction="sum"))
        hits += int((logits.argmax(1) == y).sum())
    model.train(training)
    return losses / len(labels), hits / len(labels)
