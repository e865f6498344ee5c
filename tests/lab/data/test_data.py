from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normwise.lab.data import datasets as data
from normwise.lab.data.source import FASHION_MNIST, DataError, Source, SourceFile, parse_idx


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", offline=True)


def test_an_unknown_name_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'mnist' is not known; it must be one of fashion-mnist, digits"):
        data.load("mnist")


def test_digits_are_scikit_learns_each_once(digits: data.Dataset) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.cat([digits.train_images, digits.test_images]) * 16
    labels = torch.cat([digits.train_labels, digits.test_labels])
    ours = sorted(
        [*image.flatten().tolist(), float(label)] for image, label in zip(images, labels, strict=True)
    )
    theirs = sorted(
        [*image, float(label)] for image, label in zip(raw.data.tolist(), raw.target, strict=True)
    )
    assert ours == theirs


def test_digits_shapes_types_and_range(digits: data.Dataset) -> None:
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == 0
        assert images.max() == 1
        assert len(images) == len(labels)
    assert digits.classes == tuple("0123456789")


def test_digits_split_is_stratified(digits: data.Dataset) -> None:
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert ((test - (train + test) * 360 / 1797).abs() <= 1).all()


def test_digits_never_change(digits: data.Dataset) -> None:
    # runs are identified by it, and results compared across years: a change must be meant
    assert digits.fingerprint == "9ceef695024dc75b3095fff55a03348c2a1ee956628e4547bb3bdbb09d22c379"


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**31),
)
def test_split_is_disjoint_stratified_and_deterministic(
    counts: list[int], shares: tuple[float, float], seed: int
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.float32).reshape(-1, 1, 1, 1)  # each its own name
    dataset = data.Dataset("made up", images, labels, images[:0], labels[:0], (), "")
    train_size = max(1, round(shares[0] * len(labels)))
    validation_size = round(shares[1] * (len(labels) - train_size))

    part = data.split(dataset, train_size, validation_size, seed)

    train, validation = part.train_images.flatten().long(), part.validation_images.flatten().long()
    assert (len(train), len(validation)) == (train_size, validation_size)
    assert len(set(train.tolist()) | set(validation.tolist())) == train_size + validation_size
    assert torch.equal(part.train_labels, labels[train])
    assert torch.equal(part.validation_labels, labels[validation])
    # each prefix of the order has each class within half an example of its share of a common cut, and
    # the cut is off by at most half an example for each class
    slack = 0.5 + len(counts) / 2
    for part_labels, tolerance in ((part.train_labels, slack), (part.validation_labels, 2 * slack)):
        share = torch.tensor(counts) * len(part_labels) / len(labels)
        assert ((part_labels.bincount(minlength=len(counts)) - share).abs() <= tolerance).all()
    again = data.split(dataset, train_size, validation_size, seed)
    assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


def test_split_of_balanced_classes_is_balanced_to_one_example() -> None:
    labels = torch.arange(6000) % 10
    images = torch.arange(6000, dtype=torch.float32).reshape(-1, 1, 1, 1)
    dataset = data.Dataset("made up", images, labels, images[:0], labels[:0], (), "")
    part = data.split(dataset, 4003, 1004, seed=3)
    assert sorted(part.train_labels.bincount().tolist()) == [400] * 7 + [401] * 3
    assert sorted(part.validation_labels.bincount().tolist()) == [100] * 6 + [101] * 4


def test_split_depends_on_the_seed_and_nests(digits: data.Dataset) -> None:
    first, other = data.split(digits, 500, 100, seed=0), data.split(digits, 500, 100, seed=1)
    assert not torch.equal(first.train_images, other.train_images)
    smaller = data.split(digits, 200, 100, seed=0)
    larger = {tuple(image.flatten().tolist()) for image in first.train_images}
    assert {tuple(image.flatten().tolist()) for image in smaller.train_images} <= larger


@pytest.mark.parametrize(("train_size", "validation_size"), [(0, 10), (-1, 10), (10, -1), (1000, 438)])
def test_split_sizes_out_of_range(digits: data.Dataset, train_size: int, validation_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"train_size {train_size} and validation_size {validation_size}.*1437"
    ):
        data.split(digits, train_size, validation_size, seed=0)


@pytest.mark.parametrize("size", [28, 14, 7, 4, 1])
def test_downsample_is_the_mean_of_blocks(size: int) -> None:
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = 28 // size
    expected = images.numpy().reshape(3, 1, size, block, size, block).mean(axis=(3, 5))
    np.testing.assert_allclose(data.downsample(images, size).numpy(), expected, rtol=1e-14)


def test_downsample_of_grey_levels_by_two_is_exact() -> None:
    grey = torch.randint(0, 256, (5, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    sums = grey.reshape(5, 1, 14, 2, 14, 2).sum(dim=(3, 5))
    assert torch.equal(data.downsample(grey.float(), 14), sums.float() / 4)


@pytest.mark.parametrize(("shape", "size"), [((28, 28), 13), ((28, 28), 0), ((28, 28), 56), ((28, 14), 14)])
def test_downsample_to_a_size_that_does_not_divide(shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match=f"size {size} is not possible for images of {shape[0]}x{shape[1]}"):
        data.downsample(torch.zeros(1, 1, *shape), size)


def made_up_idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    )


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_idx_is_read_as_numpy_wrote_it(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(parse_idx(made_up_idx(array)), array)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NORMWISE_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"NORMWISE_CACHE": "~/a", "HOME": "/c"}, "/c/a"),
        ({"NORMWISE_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/normwise"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/normwise"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/normwise"),
    ],
)
def test_cache_directory(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("NORMWISE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data.cache_directory() == Path(expected)


def test_no_home_asks_for_a_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NORMWISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataError, match="NORMWISE_CACHE"):
        data.cache_directory()


def test_load_turns_the_files_into_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, shape, dtype=np.uint8) for shape in ((6, 4, 4), (6,), (3, 4, 4), (3,))]
    files = []
    for index, array in enumerate(arrays):
        content = made_up_idx(array)
        path = tmp_path / "fashion-mnist" / f"made-up-{index}.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content))
        files.append(SourceFile.idx(path.name, array.shape, hashlib.sha256(content).hexdigest()))
    source = Source("fashion-mnist", tuple(files), "no-such-package", "http://127.0.0.1:9/", 1000)
    monkeypatch.setattr(data, "FASHION_MNIST", source)
    said: list[str] = []

    dataset = data.load("fashion-mnist", cache=tmp_path, offline=True, announce=said.append)

    assert said == []
    for images, labels, grey, target in (
        (dataset.train_images, dataset.train_labels, arrays[0], arrays[1]),
        (dataset.test_images, dataset.test_labels, arrays[2], arrays[3]),
    ):
        assert images.dtype == torch.float32
        np.testing.assert_array_equal(images.numpy(), (grey / np.float32(255))[:, None])
        np.testing.assert_array_equal(labels.numpy(), target.astype(np.int64))
        assert labels.dtype == torch.int64
    assert len(dataset.classes) == 10

    # one grey level of one test image more, and the fingerprint is another
    arrays[2][0, 0, 0] ^= 1
    content = made_up_idx(arrays[2])
    (tmp_path / "fashion-mnist" / files[2].name).write_bytes(gzip.compress(content))
    files[2] = replace(files[2], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(
        data, "FASHION_MNIST", Source("fashion-mnist", tuple(files), "none", "http://127.0.0.1:9/", 1)
    )
    assert data.load("fashion-mnist", cache=tmp_path, offline=True).fingerprint != dataset.fingerprint


def test_fashion_mnists_sizes_are_those_of_the_original_files() -> None:
    assert [file.size for file in FASHION_MNIST.files] == [47_040_016, 60_008, 7_840_016, 10_008]
