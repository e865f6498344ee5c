"""All image data sets by name, in memory or in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from normwise.lab.data.cifar import CIFAR10, CIFAR100, load_cifar
from normwise.lab.data.datasets import DATASETS, Dataset, load, to_stderr
from normwise.lab.data.image_folder import ImageFolder, load_image_folder

__all__ = ["CATALOG", "is_known", "load_images"]

_ARCHIVES = {archive.name: archive for archive in (CIFAR10, CIFAR100)}
_FOLDER = "imagefolder:"
CATALOG = (*DATASETS, *_ARCHIVES, f"{_FOLDER}DIR")


def is_known(name: str) -> bool:
    """Return whether there is a data set of this name.

    A folder's name is the rest of a command line: it has letters, digits and ``/._~+=-`` only.

    Example:
        >>> is_known("cifar100"), is_known("imagefolder:/data/imagenet"), is_known("imagefolder:$(x)")
        (True, True, False)
    """
    return name in CATALOG[:-1] or re.fullmatch(rf"{_FOLDER}[\w/.~+=-]+", name) is not None


def load_images(
    name: str,
    *,
    cache: Path | None = None,
    offline: bool = False,
    announce: Callable[[str], None] = to_stderr,
) -> Dataset | ImageFolder:
    """Load a data set by name; download its files if they are missing.

    Args:
        name: One of :data:`CATALOG`, such as "cifar100" or "imagefolder:/data/imagenet".
        cache: Folder of the cache. The default is ``cache_directory()``.
        offline: Forbids the network.
        announce: Called with one line for each download.

    Raises:
        ValueError: There is no data set of that name.
        DataError: A file is missing, truncated or altered, and downloading it is forbidden or failed.

    Example:
        >>> load_images("digits").train_images.shape
        torch.Size([1437, 1, 8, 8])
    """
    if name in DATASETS:
        return load(name, cache=cache, offline=offline, announce=announce)
    if name in _ARCHIVES:
        return load_cifar(_ARCHIVES[name], cache=cache, offline=offline, announce=announce)
    if name.startswith(_FOLDER) and name != _FOLDER:
        return load_image_folder(Path(name.removeprefix(_FOLDER)).expanduser().absolute())
    raise ValueError(f"data set {name!r} is not known; it must be one of {', '.join(CATALOG)}")
