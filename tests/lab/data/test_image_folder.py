from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lab.small_images import put_folder

from normwise.lab.data.catalog import load_images
from normwise.lab.data.image_folder import (
    ImageFolder,
    Pictures,
    center_crop,
    load_image_folder,
    random_resized_crop,
)
from normwise.lab.data.source import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put_folder(tmp_path / "pictures", classes=3, images=2)
    return tmp_path / "pictures"


def test_pictures_are_listed_by_class(folder: Path) -> None:
    listed = load_images(f"imagefolder:{folder}")
    assert isinstance(listed, ImageFolder)
    assert listed.classes == ("class0", "class1", "class2")
    assert listed.train[1] == (0, 0, 1, 1, 2, 2)
    assert [path.relative_to(folder).as_posix() for path in listed.test[0][:2]] == [
        "val/class0/0.png",
        "val/class0/1.png",
    ]
    (folder / "train" / "class1" / "notes.txt").write_text("no picture")
    assert load_image_folder(folder).fingerprint == listed.fingerprint
    (folder / "val").rename(folder / "test")
    assert load_image_folder(folder).fingerprint != listed.fingerprint


def test_a_picture_depends_on_seed_epoch_and_index_alone(folder: Path) -> None:
    paths, labels = load_image_folder(folder).train
    pictures = Pictures(paths, labels, 16, seed=1)
    image, label = pictures[(0, 3)]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 1)
    random.seed(5)
    assert torch.equal(pictures[(0, 3)][0], image)
    for other in (pictures[(1, 3)], Pictures(paths, labels, 16, seed=2)[(0, 3)]):
        assert not torch.equal(other[0], image)
    fixed = Pictures(paths, labels, 16)
    assert torch.equal(fixed[(0, 3)][0], fixed[(1, 3)][0])
    assert fixed[(0, 4)][0][0].float().mean() > 200  # red is high in class 2, and channels come first
    assert fixed[(0, 0)][0][0].max() == 0


def test_crops_lie_inside_and_have_the_published_areas_and_ratios() -> None:
    """Red counts columns and green counts rows, so a crop tells where it is from."""
    width, height = 200, 160
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(width), np.arange(height)[:, None]
    picture = Image.fromarray(grid)
    numbers, mirrored = random.Random(0), 0
    for _ in range(200):
        crop = _pixels(random_resized_crop(picture, 32, numbers))
        across = crop[:, :, 0].mean(0)
        mirrored += bool(across[0] > across[-1])
        w = (across[-1] - across[0]).abs().item() * 32 / 31
        h = (crop[-1, :, 1] - crop[0, :, 1]).mean().item() * 32 / 31
        assert 0.07 * width * height < w * h < 1.05 * width * height
        assert 0.7 < w / h < 1.45
    assert 70 < mirrored < 130
    central = _pixels(center_crop(picture, 32))
    assert central[:, :, 0].mean() == pytest.approx(width / 2, abs=1)
    assert (central[0, -1, 0] - central[0, 0, 0]).item() * 32 / 31 == pytest.approx(140, abs=2)


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float()


def test_what_is_wrong_is_said_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = folder / "train" / "class0" / "0.png"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    pictures = Pictures(*load_image_folder(folder).train, 16)
    with pytest.raises(DataError, match=r"class0/0.png is not a picture that can be decoded \(.*truncated"):
        pictures[(0, 0)]
    picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot identify image file"):
        pictures[(0, 0)]
    with pytest.raises(DataError, match="is not a folder"):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty/train has no class folders: put the pictures of each class"):
        load_image_folder(tmp_path / "empty")
    (folder / "val" / "more").mkdir()
    with pytest.raises(DataError, match=r"val/more has no pictures"):
        load_image_folder(folder)
    (folder / "val" / "more" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="the class 'more' is in only one of train and val"):
        load_image_folder(folder)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="needs a package to decode pictures: pip install pillow"):
        load_image_folder(folder)
