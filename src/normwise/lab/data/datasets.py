"""The data sets that the paper's claims are tested on, as tensors.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747) is fetched when it is first needed;
scikit-learn's digits (8x8 images) need no network.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from normwise.lab.data.fetch import obtain
from normwise.lab.data.source import FASHION_MNIST, DataError, Source, parse_idx

if TYPE_CHECKING:
    from collections.abc import Callable

    Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "cache_directory", "downsample", "load", "split"]

DATASETS = ("fashion-mnist", "digits")

_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_DIGITS_SEED = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set of grey images with its training and test part.

    Attributes:
        name: one of ``DATASETS``.
        train_images: shape (N, 1, H, W), float32, grey levels in [0, 1].
        train_labels: shape (N,), int64, an index into ``classes``.
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
        classes: what each label means.
        fingerprint: SHA-256 (hex) of the name and all images and labels: equal if, and only if, the
            data are.
    """

    name: str
    train_images: torch.Tensor = field(repr=False)
    train_labels: torch.Tensor = field(repr=False)
    test_images: torch.Tensor = field(repr=False)
    test_labels: torch.Tensor = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str


class Split(NamedTuple):
    """Two disjoint parts of a training set; shapes and types as in ``Dataset``."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor
    validation_labels: torch.Tensor


def to_stderr(line: str) -> None:
    """Print a line to stderr: how ``load`` says what it does unless told otherwise."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def load(
    name: str,
    *,
    cache: Path | None = None,
    offline: bool = False,
    announce: Callable[[str], None] = to_stderr,
) -> Dataset:
    """Load a data set, fetching its files first if they are not there.

    Fashion-MNIST's files come from the cache, else from Debian's package ``dataset-fashion-mnist`` where it
    is installed, else they are fetched into the cache: as that package through apt (without being root),
    else from the authors' site. Every file's content is verified at every load. A damaged file is never
    used; it is announced and fetched again, or with ``offline`` an error.

    Args:
        name: one of ``DATASETS``.
        cache: folder of the cache; ``cache_directory()`` by default.
        offline: forbids the network.
        announce: is called with one line for each thing that is fetched, from where, to where.

    Raises:
        ValueError: there is no data set of that name.
        DataError: a file is missing, truncated or altered and was not to be fetched, or could not be.

    Example:
        >>> digits = load("digits")
        >>> digits.train_images.shape, digits.test_images.shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    if name == "fashion-mnist":
        return _fashion_mnist(FASHION_MNIST, cache or cache_directory(), offline, announce)
    if name == "digits":
        return _digits()
    raise ValueError(f"data set {name!r} is not known; it must be one of {', '.join(DATASETS)}")


def cache_directory() -> Path:
    """Folder for fetched data: $NORMWISE_CACHE, else $XDG_CACHE_HOME/normwise, else ~/.cache/normwise.

    Raises:
        DataError: none of them can be determined.
    """
    try:
        if own := os.environ.get("NORMWISE_CACHE"):
            return Path(own).expanduser().absolute()
        # the XDG specification has relative paths ignored
        if (shared := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
            return shared / "normwise"
        return Path.home() / ".cache" / "normwise"
    except RuntimeError as error:
        raise DataError(
            f"the folder for fetched data is unknown ({error}); name one in the environment variable "
            "NORMWISE_CACHE"
        ) from error


def _fashion_mnist(source: Source, cache: Path, offline: bool, announce: Callable[[str], None]) -> Dataset:
    contents = obtain(source, cache / source.name, offline=offline, announce=announce)
    arrays = [parse_idx(contents[file.name], file.name) for file in source.files]
    return _dataset(source.name, arrays, 255, _FASHION_CLASSES)


def _digits() -> Dataset:
    """scikit-learn's 1797 digits, split once and for all.

    The order is that of a stratified ranking (see ``_stratified_order``) under NumPy's legacy
    ``RandomState(0)``, whose stream is frozen; the first fifth is the test part.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = raw.images.astype(np.uint8)[:, None], raw.target.astype(np.uint8)
    permutation = np.random.RandomState(_DIGITS_SEED).permutation(len(labels))
    order = _stratified_order(torch.from_numpy(labels), torch.from_numpy(permutation)).numpy()
    count = math.ceil(len(labels) / 5)
    test, train = np.sort(order[:count]), np.sort(order[count:])
    parts = [images[train], labels[train], images[test], labels[test]]
    return _dataset("digits", parts, 16, tuple(str(name) for name in raw.target_names))


def _dataset(name: str, parts: list[Bytes], levels: int, classes: tuple[str, ...]) -> Dataset:
    """From train images, train labels, test images, test labels as bytes; ``levels`` becomes 1."""
    digest = hashlib.sha256(f"{name} {levels}".encode())
    for part in parts:
        digest.update(f" {part.shape} ".encode())
        digest.update(part.tobytes())

    def images(part: Bytes) -> torch.Tensor:
        grey = part.astype(np.float32)
        grey /= levels
        return torch.from_numpy(grey).reshape(len(part), 1, *part.shape[-2:])

    def labels(part: Bytes) -> torch.Tensor:
        return torch.from_numpy(part.astype(np.int64))

    return Dataset(
        name,
        images(parts[0]),
        labels(parts[1]),
        images(parts[2]),
        labels(parts[3]),
        classes,
        digest.hexdigest(),
    )


def split(dataset: Dataset, train_size: int, validation_size: int, seed: int) -> Split:
    """Draw a training and a validation set from the training part, disjoint and stratified.

    Each holds every class in proportion, to within about one example. With the same seed a smaller
    ``train_size`` gives a subset of a larger one. The test part plays no role.

    Args:
        dataset: where to draw from.
        train_size: number of examples to train on, at least 1.
        validation_size: number of examples to validate on, at least 0.
        seed: of the ``torch.Generator`` that draws.

    Returns:
        The two sets, each in the data set's own order.

    Raises:
        ValueError: a size is out of range, or there are fewer examples than both sizes need.

    Example:
        >>> part = split(load("digits"), train_size=1000, validation_size=200, seed=0)
        >>> part.train_images.shape, torch.bincount(part.validation_labels).max().item()
        (torch.Size([1000, 1, 8, 8]), 21)
    """
    available = len(dataset.train_labels)
    if train_size < 1 or validation_size < 0 or train_size + validation_size > available:
        raise ValueError(
            f"train_size {train_size} and validation_size {validation_size} are not possible: they must be "
            f"at least 1 and 0, and together at most the {available} training examples of {dataset.name}"
        )
    permutation = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    order = _stratified_order(dataset.train_labels, permutation)
    train = order[:train_size].sort().values
    validation = order[train_size : train_size + validation_size].sort().values
    return Split(
        dataset.train_images[train],
        dataset.train_labels[train],
        dataset.train_images[validation],
        dataset.train_labels[validation],
    )


def _stratified_order(labels: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """An order of all examples of which every stretch holds the classes nearly in proportion.

    The j-th of a class's m examples, in the order of ``permutation``, is put at (j + 1/2)/m of the way.
    """
    shuffled = labels[permutation]
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero()[:, 0]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # ties between classes of equal size are broken by the permutation, so that none is always first
    return permutation[position.argsort(stable=True)]


def downsample(images: torch.Tensor, size: int) -> torch.Tensor:
    """Shrink square images to ``size`` x ``size`` pixels, each the mean of the pixels that it covers.

    Args:
        images: shape (N, C, H, H).
        size: pixels on a side, a divisor of H.

    Returns:
        Shape (N, C, size, size).

    Raises:
        ValueError: the images are not square, or ``size`` does not divide H.

    Example:
        >>> downsample(torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]]), 1)
        tensor([[[[0.7500]]]])
    """
    height, width = images.shape[-2:]
    if height != width or size < 1 or height % size:
        sizes = [divisor for divisor in range(1, height + 1) if height % divisor == 0]
        raise ValueError(
            f"size {size} is not possible for images of {height}x{width} pixels: the images must be square, "
            f"and size one of {sizes}"
        )
    return F.avg_pool2d(images, height // size)
