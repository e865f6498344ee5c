"""Made-up image data of the published formats, small."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from normwise.lab.data.cifar import CIFAR10, CIFAR100, Archive


def cifar_archive(archive: Archive, images: int = 40, seed: int = 0) -> tuple[bytes, Archive]:
    """Return a tar.gz of this archive's format with random records, and its description."""
    classes = 10 if archive.name == "cifar10" else 100
    random = np.random.default_rng(seed)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for k, name in enumerate((*archive.train, archive.test)):
            labels = random.integers(0, 20, (images, archive.label_bytes), dtype=np.uint8)
            labels[:, -1] = (np.arange(images) + k) % classes
            pixels = random.integers(0, 256, (images, 3072), dtype=np.uint8)
            pixels[:, ::7] = 25 * (labels[:, -1:] % 10)  # something to learn
            _add(tar, name, np.concatenate([labels, pixels], 1).tobytes())
        _add(tar, archive.names, "".join(f"class_{k}\n" for k in range(classes)).encode() + b"\n")
    content = packed.getvalue()
    return content, replace(archive, md5=hashlib.md5(content, usedforsecurity=False).hexdigest())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def put_cifar(cache: Path, images: int = 40) -> tuple[Archive, Archive]:
    """Put both archives into a cache; return their descriptions."""
    described = []
    for archive in (CIFAR10, CIFAR100):
        content, description = cifar_archive(archive, images)
        (cache / archive.name).mkdir(parents=True)
        (cache / archive.name / archive.file).write_bytes(content)
        described.append(description)
    return described[0], described[1]


def put_folder(folder: Path, classes: int = 2, images: int = 6) -> None:
    """Put a folder of PNG pictures: DIR/train/CLASS/… and DIR/val/CLASS/…"""
    from PIL import Image

    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for k in range(classes):
            (folder / part / f"class{k}").mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (40 + 4 * i, 48, 3), dtype=np.uint8)
                pixels[..., 0] = 120 * k
                Image.fromarray(pixels).save(folder / part / f"class{k}" / f"{i}.png")
