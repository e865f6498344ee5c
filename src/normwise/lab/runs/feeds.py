"""Batches of a training: from images in memory, on the device where they fit, or from pictures on disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from normwise.lab.data.augmentation import CropsAndFlips
from normwise.lab.data.datasets import Dataset, split
from normwise.lab.data.image_folder import ImageFolder, Pictures

__all__ = ["Feed", "FolderFeed", "MemoryFeed", "feed", "generator_of"]

Batch = tuple[Tensor, Tensor]

_MOST_SEEN = 10_000  # training images that are evaluated
# of the pictures of ImageNet (mean and deviation of red, green and blue, on a scale of 0 to 255)
_FOLDER_MEAN, _FOLDER_DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on these numbers alone."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Feed(ABC):
    """The batches of a training.

    The order of images and their augmentation depend on seed and epoch alone. Every batch is shared by
    ``world`` processes: process ``rank`` gets each ``world``-th image of it.

    Attributes:
        shape: Channels, height and width of an image.
        classes: Number of classes.
        train_size: Number of training images.
        device: Where the batches are.
    """

    shape: tuple[int, int, int]
    classes: int
    train_size: int
    device: torch.device

    def __init__(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world

    def _order(self, epoch: int, first: int) -> tuple[torch.Generator, list[Tensor]]:
        """Return this process's part of the batches of an epoch from ``first`` on."""
        generator = generator_of(self.seed, epoch)
        order = torch.randperm(self.train_size, generator=generator)
        full = [chosen for chosen in order.split(self.batch_size) if len(chosen) == self.batch_size]
        return generator, [chosen[self.rank :: self.world] for chosen in full[first:]]

    def _mine(self, part: str, size: int) -> Tensor:
        """Return the numbers of the images of a part that this process evaluates."""
        every = -(-size // _MOST_SEEN) if part == "train" else 1
        return torch.arange(0, size, every)[self.rank :: self.world]

    @abstractmethod
    def training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``first`` on: images (float32, standardised), labels."""

    @abstractmethod
    def evaluation(self, part: str) -> Iterator[Batch]:
        """Yield this process's share of the "train", "validation" or "test" images, in batches.

        Training images are not augmented, and evenly chosen if there are more than 10,000. Every ``world``-th
        image is this process's.
        """


class MemoryFeed(Feed):
    """Batches of images that lie in memory.

    Args:
        dataset: The data set.
        train_size: Number of training images, drawn by ``seed``. 0: all that validation leaves.
        validation_size: Number of training images that are held out.
        augment: Whether training images are cropped and flipped at random.
        device: Where the batches shall be.
        resident: Whether the images lie there too; otherwise each batch is moved.
        batch_size: Images per step, of all processes together.
        seed: Seed of split, order and augmentation.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        train_size: int = 0,
        validation_size: int = 0,
        augment: bool = False,
        device: torch.device,
        resident: bool = True,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, rank, world)
        if train_size or validation_size:
            size = train_size or len(dataset.train_labels) - validation_size
            part = split(dataset, size, validation_size, seed)
            parts = {
                "train": (part.train_images, part.train_labels),
                "validation": (part.validation_images, part.validation_labels),
            }
        else:
            parts = {"train": (dataset.train_images, dataset.train_labels)}
        parts["test"] = (dataset.test_images, dataset.test_labels)
        images = parts["train"][0]
        mean, deviation = _moments(images)
        self.device = device
        self._mean = mean.view(1, -1, 1, 1).to(device)
        self._deviation = deviation.view(1, -1, 1, 1).to(device)
        self._parts = {
            key: tuple(tensor.to(device) if resident else tensor for tensor in part)
            for key, part in parts.items()
        }
        self.augment = augment
        self.train_size = len(images)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.classes = len(dataset.classes)

    def training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See :meth:`Feed.training`."""
        generator, order = self._order(epoch, first)
        drawn = CropsAndFlips.draw(self.train_size, generator) if self.augment else None
        images, labels = self._parts["train"]
        for chosen in order:
            there = chosen.to(images.device)
            x = images[there]
            yield self._standardised(x if drawn is None else drawn.of(x, chosen)), self._moved(labels[there])

    def evaluation(self, part: str) -> Iterator[Batch]:
        """See :meth:`Feed.evaluation`."""
        images, labels = self._parts[part]
        mine = self._mine(part, len(labels)).to(labels.device)
        for chosen in mine.split(self.batch_size):
            yield self._standardised(images[chosen]), self._moved(labels[chosen])

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self.device)

    def _standardised(self, images: Tensor) -> Tensor:
        return (self._moved(images).float() - self._mean) / self._deviation


class FolderFeed(Feed):
    """Batches of pictures on disk, decoded by ``workers`` processes (0: by this one)."""

    def __init__(
        self,
        folder: ImageFolder,
        *,
        size: int,
        augment: bool,
        device: torch.device,
        workers: int = 0,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, rank, world)
        self._train = Pictures(*folder.train, size, seed if augment else None)
        self._seen = Pictures(*folder.train, size)
        self._test = Pictures(*folder.test, size)
        self._workers = workers
        self.device = device
        self._mean = torch.tensor(_FOLDER_MEAN, device=device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(_FOLDER_DEVIATION, device=device).view(1, 3, 1, 1)
        self.train_size = len(self._train)
        self.shape = (3, size, size)
        self.classes = len(folder.classes)

    def training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See :meth:`Feed.training`."""
        _, order = self._order(epoch, first)
        return self._loaded(self._train, epoch, order)

    def evaluation(self, part: str) -> Iterator[Batch]:
        """See :meth:`Feed.evaluation`."""
        pictures = {"train": self._seen, "test": self._test}.get(part)
        if pictures is None:
            raise ValueError(f"a folder of pictures has no {part} set: give its folder val or test")
        return self._loaded(pictures, 0, list(self._mine(part, len(pictures)).split(self.batch_size)))

    def _loaded(self, pictures: Pictures, epoch: int, order: list[Tensor]) -> Iterator[Batch]:
        keys = [[(epoch, index) for index in chosen.tolist()] for chosen in order]
        loader: DataLoader[Any] = DataLoader(
            pictures,  # type: ignore[arg-type]  # it has what DataLoader calls
            batch_sampler=keys,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            x = images.to(self.device, non_blocking=True).float()
            yield (x - self._mean) / self._deviation, labels.to(self.device, non_blocking=True)


def feed(
    data: Dataset | ImageFolder,
    *,
    batch_size: int,
    seed: int,
    augment: bool = False,
    train_size: int = 0,
    validation_size: int = 0,
    image_size: int = 224,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    workers: int = 0,
    room: float = float("inf"),
    rank: int = 0,
    world: int = 1,
) -> Feed:
    """Return the feed of a data set.

    Args:
        data: The data set.
        batch_size: As for :class:`MemoryFeed`, like ``seed``, ``augment``, ``train_size``,
            ``validation_size``, ``device``, ``rank`` and ``world``.
        seed: See above.
        augment: See above.
        train_size: See above.
        validation_size: See above.
        image_size: Height and width of pictures from a folder.
        device: See above.
        workers: Number of processes that decode pictures.
        room: Bytes that images may take on the device.
        rank: See above.
        world: See above.

    Raises:
        ValueError: A size is not possible, there are fewer training images than one batch, or the batch
            cannot be shared by the processes.
    """
    if batch_size % world:
        raise ValueError(f"--batch {batch_size} cannot be shared by {world} processes: give a multiple")
    shared = {"batch_size": batch_size, "seed": seed, "rank": rank, "world": world}
    made: Feed
    if isinstance(data, ImageFolder):
        if train_size or validation_size:
            raise ValueError("train_size and validation_size are not possible with a folder: make it smaller")
        made = FolderFeed(data, size=image_size, augment=augment, device=device, workers=workers, **shared)
    else:
        held = sum(x.nbytes for x in (data.train_images, data.test_images))
        resident = device.type == "cpu" or held < room
        sizes = {"train_size": train_size, "validation_size": validation_size}
        made = MemoryFeed(data, augment=augment, device=device, resident=resident, **sizes, **shared)
    if made.train_size < batch_size:
        raise ValueError(
            f"--batch {batch_size} is more than the {made.train_size} training images: give fewer"
        )
    return made


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, (C,), over at most 5000 images at a time."""
    sums = [(x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3))) for x in images.split(5000)]
    number = images.numel() / images.shape[1]
    mean = torch.stack([s for s, _ in sums]).sum(0) / number
    variance = torch.stack([s for _, s in sums]).sum(0) / number - mean.square()
    return mean.float(), variance.sqrt().float()
