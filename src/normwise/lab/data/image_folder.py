"""Images in folders, one for each class, as ImageNet is distributed: DIR/train/CLASS/… and DIR/val/CLASS/….

The pictures are decoded by Pillow when they are needed. The random crop and flip of a picture depend on seed,
epoch and picture alone, so neither the number of loading processes nor an interruption changes them.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normwise.lab.data.source import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "ImageFolder", "Pictures", "center_crop", "load_image_folder", "random_resized_crop"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
_TEST_FOLDERS = ("val", "test")
_AREAS, _RATIOS, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures on disk with their labels. A ``torch.utils.data`` data set whose keys are (epoch, index).

    Attributes:
        paths: The files.
        labels: Index of the class of each.
        size: Height and width to which they are brought, in pixels.
        seed: Seed of crops and flips. None: the central crop.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return a picture, of shape (3, size, size) and type uint8, and its label.

        Raises:
            DataError: The file cannot be decoded.
        """
        epoch, index = key
        path = self.paths[index]
        try:
            with _pillow().open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them for damaged files
            raise DataError(
                f"{path} is not a picture that can be decoded ({error}): replace or delete it"
            ) from error
        if self.seed is None:
            picture = center_crop(picture, self.size)
        else:
            # a string as seed is hashed by SHA-512: the same numbers in every process and version of Python
            picture = random_resized_crop(picture, self.size, random.Random(f"{self.seed} {epoch} {index}"))
        pixels = np.array(picture, dtype=np.uint8)  # (H, W, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """A training and a test set of pictures on disk.

    Attributes:
        name: "imagefolder:DIR".
        train: The paths and labels of the training pictures.
        test: Those of the test pictures.
        classes: Names of the classes, sorted.
        fingerprint: SHA-256 (hexadecimal) of the relative paths and sizes of all files, not of their content.
    """

    name: str
    train: tuple[tuple[Path, ...], tuple[int, ...]]
    test: tuple[tuple[Path, ...], tuple[int, ...]]
    classes: tuple[str, ...]
    fingerprint: str


def load_image_folder(folder: Path) -> ImageFolder:
    """List the pictures of DIR/train and of DIR/val (or DIR/test).

    Raises:
        DataError: A folder is missing or has no class folders, a class has no pictures, or the two sets have
            other classes; or Pillow is not installed.
    """
    _pillow()
    if not folder.is_dir():
        raise DataError(f"imagefolder:{folder}: {folder} is not a folder")
    test = next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), folder / "val")
    digest = hashlib.sha256()
    parts, names = [], []
    for part in (folder / "train", test):
        classes = sorted(path.name for path in part.iterdir() if path.is_dir()) if part.is_dir() else []
        if not classes:
            raise DataError(
                f"imagefolder:{folder}: {part} has no class folders: put the pictures of each class into "
                f"{part}/CLASS"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (part / name).iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(
                    f"imagefolder:{folder}: {part / name} has no pictures ({', '.join(SUFFIXES)}): add some, "
                    "or delete the folder"
                )
            for path in found:
                digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            paths += found
            labels += [label] * len(found)
        parts.append((tuple(paths), tuple(labels)))
        names.append(classes)
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[0]
        raise DataError(f"imagefolder:{folder}: the class {odd!r} is in only one of train and {test.name}")
    return ImageFolder(f"imagefolder:{folder}", parts[0], parts[1], tuple(names[0]), digest.hexdigest())


def center_crop(picture: Image, size: int) -> Image:
    """Return the central square of a picture, 7/8 of its shorter side, resized to ``size`` × ``size``.

    For 224 this is the usual evaluation on ImageNet (shorter side to 256 pixels, central crop of 224).
    """
    side = min(picture.size) * 7 / 8
    left, top = ((length - side) / 2 for length in picture.size)
    return picture.resize((size, size), _pillow().Resampling.BILINEAR, (left, top, left + side, top + side))


def random_resized_crop(picture: Image, size: int, numbers: random.Random) -> Image:
    """Return a random part of a picture, resized to ``size`` × ``size``, mirrored every second time.

    The part has 8 % to 100 % of the area and a ratio of sides of 3/4 to 4/3 (Szegedy et al., "Going Deeper
    with Convolutions", section 6). If ten draws do not fit into the picture, it is the central square.
    """
    pillow = _pillow()
    width, height = picture.size
    side = min(width, height)
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    for _ in range(_TRIES):
        area = width * height * numbers.uniform(*_AREAS)
        ratio = math.exp(numbers.uniform(*map(math.log, _RATIOS)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = numbers.randint(0, width - w), numbers.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    crop = picture.resize((size, size), pillow.Resampling.BILINEAR, box)
    return crop.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if numbers.random() < 0.5 else crop


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("imagefolder:DIR needs a package to decode pictures: pip install pillow") from None
    return Image
