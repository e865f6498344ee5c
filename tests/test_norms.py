"""Norms of slices are right for any shape, type, layout and magnitude; unsuitable tensors are refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normwise.norms import check_dim, check_tensor, slice_norms

SHAPES = [(6,), (1, 1), (4, 5), (3, 2, 4), (4, 3, 3, 2), (2, 3, 2, 2, 2)]
# How far a norm may be from the exact one: the accumulation of float32 squares, else the widest type.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def exact_norms(weight: Tensor, dim: int | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the norms by a slow reference: correctly rounded sums of exact squares, slice by slice."""
    array = weight.detach().to(torch.float64).numpy()
    slices = [array] if dim is None else np.moveaxis(array, dim, 0)
    norms = []
    for array_slice in slices:
        values = [float(v) for v in np.ravel(array_slice)]
        largest = max(map(abs, values), default=0.0)
        norms.append(largest * math.sqrt(math.fsum((v / largest) ** 2 for v in values)) if largest else 0.0)
    return np.array(norms)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_every_shape_and_dim(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for dim in (None, *range(-len(shape), len(shape))):
        norms = slice_norms(weight, dim)
        assert norms.dtype == torch.float64
        assert norms.ndim == weight.ndim
        assert (weight / norms).shape == weight.shape
        np.testing.assert_allclose(norms.flatten(), exact_norms(weight, dim), rtol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=60)
@given(
    exponent=st.floats(-30, 30),
    spread=st.floats(0, 3),
    dim=st.sampled_from([0, 1, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_norms_from_1e_minus_30_to_1e30(
    exponent: float, spread: float, dim: int | None, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** (exponent + spread * torch.rand(5, 1, generator=generator, dtype=torch.float64))
    weight = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * rows).to(dtype)
    np.testing.assert_allclose(
        slice_norms(weight, dim).flatten(), exact_norms(weight, dim), rtol=TOLERANCE[dtype]
    )


def test_slices_of_very_different_norms_in_one_tensor() -> None:
    weight = torch.tensor([[3e30, 4e30], [0.0, 0.0], [3e-30, 4e-30], [3.0, 4.0]])
    np.testing.assert_allclose(slice_norms(weight).flatten(), [5e30, 0.0, 5e-30, 5.0], rtol=1e-6)
    np.testing.assert_allclose(slice_norms(weight.T, 1).flatten(), [5e30, 0.0, 5e-30, 5.0], rtol=1e-6)


def test_half_precision_neither_overflows_nor_underflows() -> None:
    weight = torch.tensor([[6e4, 6e4], [6e-8, 0.0]], dtype=torch.float16)
    np.testing.assert_allclose(slice_norms(weight).flatten(), exact_norms(weight, 0), rtol=1e-6)


def test_non_finite_norms_stay_non_finite() -> None:
    weight = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    norms = slice_norms(weight).flatten()
    assert math.isnan(norms[0])
    assert norms[1:].tolist() == [math.inf, 5.0]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("dim", [0, -1, None])
def test_empty_tensors(shape: tuple[int, ...], dim: int | None) -> None:
    norms = slice_norms(torch.empty(shape), dim)
    assert norms.numel() == (1 if dim is None else shape[dim])
    assert not norms.any()


def test_the_norm_of_a_scalar_is_its_magnitude() -> None:
    assert slice_norms(torch.tensor(-2.0), None).item() == 2.0


def test_views_of_any_layout() -> None:
    weight = torch.randn(6, 5, 4)
    for view in (weight.transpose(0, 2), weight[::2, 1:], weight.permute(1, 2, 0)):
        for dim in (0, 1, 2, None):
            np.testing.assert_allclose(slice_norms(view, dim).flatten(), exact_norms(view, dim), rtol=1e-6)


def test_norms_do_not_track_gradients() -> None:
    assert not slice_norms(torch.ones(2, 2, requires_grad=True)).requires_grad


def test_check_dim_names_the_tensor() -> None:
    assert check_dim(None, 0, "weight") is None
    with pytest.raises(ValueError, match="for weight with 1 dimension"):
        check_dim(1, 1, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 300_000), (300_000, 2), (40, 40, 9, 9), (8193,)])
def test_norms_over_many_elements_keep_their_digits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within 8 ULP; torch's own sum, one square after the other, is off by hundreds."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    layouts = [weight] if weight.ndim != 4 else [weight, weight.to(memory_format=torch.channels_last)]
    for layout in layouts:
        for dim in (None, *range(min(2, weight.ndim))):
            if dim is not None and weight.shape[dim] > 50:
                continue
            norms = slice_norms(layout, dim).reshape(-1).numpy()
            np.testing.assert_allclose(norms, exact_norms(weight, dim), rtol=8 * torch.finfo(dtype).eps)


def suitable_tensors() -> list[torch.Tensor]:
    square = torch.randn(6, 5, 4, 3)
    return [
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.ones(2, 3, dtype=torch.bfloat16),
        square.transpose(0, 2),
        square[::2, 1:, :, :1],
        square.to(memory_format=torch.channels_last),
        torch.ones(1, 1).expand(1, 1),
        torch.nn.Parameter(torch.ones(2, 2)),
    ]


@pytest.mark.parametrize("tensor", suitable_tensors())
def test_suitable_tensors_are_accepted(tensor: torch.Tensor) -> None:
    check_tensor(tensor, "the weight")
    assert tensor.numel() == 0 or slice_norms(tensor, None).isfinite()


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (1.0, TypeError, "params must be tensors, not float"),
        (torch.ones(2, dtype=torch.int64), TypeError, "the weight has type torch.int64"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "the weight has type torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "the weight has type torch.float8_e4m3fn"),
        (torch.eye(2).to_sparse(), ValueError, "the weight has layout sparse_coo"),
        (torch.eye(2).to_mkldnn(), ValueError, "the weight has layout mkldnn"),
        (torch.imag(torch.ones(2, dtype=torch.complex64).conj()), ValueError, "lazily negated view"),
        (torch.ones(3, 1).expand(3, 2), ValueError, "overlap in memory"),
        (torch.ones(9).as_strided((4, 3), (2, 1)), ValueError, "strides (2, 1) whose elements overlap"),
        (torch.nn.LazyLinear(3).weight, ValueError, "run the model once to initialise it"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_unsuitable_tensors_are_refused(tensor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_tensor(tensor, "the weight")


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strides=st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
def test_every_overlapping_view_is_refused(shape: list[int], strides: list[int]) -> None:
    view = torch.zeros(200).as_strided(shape, strides[: len(shape)])
    places = torch.arange(200).as_strided(shape, strides[: len(shape)]).flatten().tolist()
    assume(len(set(places)) < len(places))
    with pytest.raises(ValueError, match="overlap in memory"):
        check_tensor(view, "the weight")
