"""The image data sets of the claims, as tensors.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747) is downloaded when it is first needed. The
digits of scikit-learn (8x8 images) need no network.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from normwise.lab.data.fetch import obtain
from normwise.lab.data.source import FASHION_MNIST, DataError, Source, parse_idx

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "cache_directory", "downsample", "load", "split"]

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

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
    """A data set of grey images, in a training and a test set.

    Attributes:
        name: One of ``DATASETS``.
        train_images: Shape (N, 1, H, W), float32, grey levels in [0, 1].
        train_labels: Shape (N,), int64, indices into ``classes``.
        test_images: Like ``train_images``.
        test_labels: Like ``train_labels``.
        classes: Name of each class.
        fingerprint: SHA-256 (hexadecimal) of the name and of all images and labels.
    """

    name: str
    train_images: torch.Tensor = field(repr=False)
    train_labels: torch.Tensor = field(repr=False)
    test_images: torch.Tensor = field(repr=False)
    test_labels: torch.Tensor = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str


class Split(NamedTuple):
    """Two disjoint parts of a training set. Shapes and types are those of :class:`Dataset`."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor
    validation_labels: torch.Tensor


def to_stderr(line: str) -> None:
    """Print a line to stderr, the default way of :func:`load` to announce a download."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def load(
    name: str,
    *,
    cache: Path | None = None,
    offline: bool = False,
    announce: Callable[[str], None] = to_stderr,
) -> Dataset:
    """Load a data set; download its files if they are missing.

    The files of Fashion-MNIST come from the cache, or from the Debian package ``dataset-fashion-mnist`` if it
    is installed. Otherwise they are downloaded into the cache: as that package through apt (without root
    privileges), or from the authors' site. The content of every file is verified at every load. A damaged
    file is never used: it is announced and downloaded again, or with ``offline`` it is an error.

    Args:
        name: One of ``DATASETS``.
        cache: Folder of the cache. The default is ``cache_directory()``.
        offline: Forbids the network.
        announce: Called with one line for each download: what, from where, to where.

    Raises:
        ValueError: There is no data set of that name.
        DataError: A file is missing, truncated or altered, and downloading it is forbidden or failed.

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
    """Return the folder of the cache: $NORMWISE_CACHE, else $XDG_CACHE_HOME/normwise, else ~/.cache/normwise.

    Raises:
        DataError: No variable is set and there is no home directory.
    """
    try:
        if chosen := os.environ.get("NORMWISE_CACHE"):
            return Path(chosen).expanduser().absolute()
        # the XDG specification says to ignore relative paths
        if (shared := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
            return shared / "normwise"
        return Path.home() / ".cache" / "normwise"
    except RuntimeError as error:
        raise DataError(
            f"the folder for downloaded data is unknown ({error}); name one in the environment variable "
            "NORMWISE_CACHE"
        ) from error


def _fashion_mnist(source: Source, cache: Path, offline: bool, announce: Callable[[str], None]) -> Dataset:
    contents = obtain(source, cache / source.name, offline=offline, announce=announce)
    arrays = [parse_idx(contents[file.name]) for file in source.files]
    return _dataset(source.name, arrays, 255, _FASHION_CLASSES)


def _digits() -> Dataset:
    """Return scikit-learn's 1797 digits with a fixed, stratified split; a fifth is the test set.

    The permutation comes from NumPy's legacy ``RandomState(0)``, whose stream never changes.
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
    """Build a data set from train images and labels and test images and labels; ``levels`` maps to 1."""
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
    """Draw a training and a validation set from the training images, disjoint and stratified.

    Each contains every class in proportion, to within about one example. For a given seed, a smaller
    ``train_size`` gives a subset of a larger one.

    Args:
        dataset: The data set.
        train_size: Number of training examples, at least 1.
        validation_size: Number of validation examples, at least 0.
        seed: Seed of the ``torch.Generator``.

    Returns:
        The two sets, each in the order of the data set.

    Raises:
        ValueError: A size is out of range, or there are fewer examples than both sizes need.

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
    """Return an order of all examples in which every segment contains the classes nearly in proportion.

    The j-th of the m examples of a class, in the order of ``permutation``, gets the position (j + 1/2)/m.
    """
    shuffled = labels[permutation]
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero()[:, 0]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # the permutation breaks ties between classes of equal size, so that no class is always first
    return permutation[position.argsort(stable=True)]


def downsample(images: torch.Tensor, size: int) -> torch.Tensor:
    """Shrink square images to ``size`` x ``size`` pixels, each the mean of the pixels that it covers.

    Args:
        images: Shape (N, C, H, H).
        size: New height and width in pixels, a divisor of H.

    Returns:
        Shape (N, C, size, size).

    Raises:
        ValueError: The images are not square, or ``size`` does not divide H.

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
