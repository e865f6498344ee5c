"""Units: the norm of every unit is right for any shape, dtype and magnitude, and bad units are refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normwise import Unit
from normwise.norms import check_dim, slice_norms

SHAPES = [(6,), (1, 1), (4, 5), (3, 2, 4), (4, 3, 3, 2), (2, 3, 2, 2, 2)]
# How far a norm may be from the exact one: the accumulation of float32 squares, else the widest type.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def exact_norms(weight: Tensor, dim: int | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The slow reference: one unit after the other, correctly rounded sums of exact squares."""
    array = weight.detach().to(torch.float64).numpy()
    slices = [array] if dim is None else np.moveaxis(array, dim, 0)
    norms = []
    for one in slices:
        values = [float(v) for v in np.ravel(one)]
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


def test_units_of_very_different_norms_in_one_tensor() -> None:
    weight = torch.tensor([[3e30, 4e30], [0.0, 0.0], [3e-30, 4e-30], [3.0, 4.0]])
    np.testing.assert_allclose(slice_norms(weight).flatten(), [5e30, 0.0, 5e-30, 5.0], rtol=1e-6)
    np.testing.assert_allclose(slice_norms(weight.T, 1).flatten(), [5e30, 0.0, 5e-30, 5.0], rtol=1e-6)


def test_half_precision_neither_overflows_nor_underflows() -> None:
    weight = torch.tensor([[6e4, 6e4], [6e-8, 0.0]], dtype=torch.float16)
    np.testing.assert_allclose(slice_norms(weight).flatten(), exact_norms(weight, 0), rtol=1e-6)


def test_norms_that_are_not_finite_are_told() -> None:
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


def test_a_scalar_is_one_unit() -> None:
    assert slice_norms(torch.tensor(-2.0), None).item() == 2.0
    assert Unit(torch.tensor(-2.0), dim=None).norms().tolist() == [2.0]


def test_views_of_any_layout() -> None:
    weight = torch.randn(6, 5, 4)
    for view in (weight.transpose(0, 2), weight[::2, 1:], weight.permute(1, 2, 0)):
        for dim in (0, 1, 2, None):
            np.testing.assert_allclose(slice_norms(view, dim).flatten(), exact_norms(view, dim), rtol=1e-6)


def test_norms_do_not_track_gradients() -> None:
    assert not slice_norms(torch.ones(2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dim", [0, 1, None])
def test_joint_norm_is_that_of_the_concatenation(dim: int | None) -> None:
    first, second = torch.randn(4, 4, 2), torch.randn(4, 4)
    unit = Unit([first, second], dim)
    squares = slice_norms(first, dim).flatten() ** 2 + slice_norms(second, dim).flatten() ** 2
    torch.testing.assert_close(unit.norms(), squares.sqrt())
    assert unit.count == (1 if dim is None else 4)
    assert unit.numel == (48 if dim is None else 12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_joint_norms_at_the_ends_of_the_range(scale: float) -> None:
    unit = Unit([torch.full((2, 1), 3 * scale), torch.full((2, 1), 4 * scale)])
    np.testing.assert_allclose(unit.norms(), [5 * scale] * 2, rtol=1e-6)


def test_broadcast_multiplies_the_units() -> None:
    param = torch.ones(2, 3, 4)
    for dim in (0, 1, 2, -1, None):
        unit = Unit(param, dim)
        values = torch.arange(1.0, unit.count + 1)
        np.testing.assert_allclose(
            slice_norms(param * unit.broadcast(values, param), dim).flatten(), unit.norms() * values
        )


def test_overlap_is_by_tensor_and_slice() -> None:
    one, other = torch.ones(3, 2), torch.ones(3, 2)
    first, rest = [True, False, False], [False, True, True]
    assert Unit(one).overlaps(Unit([other, one]))
    assert Unit(one, 0).overlaps(Unit(one, 1))
    assert Unit(one, mask=first).overlaps(Unit(one))
    assert not Unit(one).overlaps(Unit(other))
    assert not Unit(one, mask=first).overlaps(Unit(one, mask=rest))
    assert Unit(one, 0, first).overlaps(Unit(one, 1, [True, False]))


def test_repr_and_description_are_plain() -> None:
    unit = Unit(torch.ones(3, 2), dim=-2, mask=torch.tensor([True, False, True]))
    assert repr(unit) == "Unit((3, 2), dim=0, mask=2 of 3)"
    assert unit.describe() == {"shapes": [[3, 2]], "dim": 0, "mask": [True, False, True]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": []}, ValueError, "params is empty"),
        ({"params": [1.0]}, TypeError, "params must be tensors, not float"),
        ({"params": torch.ones(2, dtype=torch.int64)}, TypeError, "not torch.int64"),
        ({"params": torch.ones(2, dtype=torch.complex64)}, TypeError, "not torch.complex64"),
        ({"params": [torch.ones(2)] * 2}, ValueError, "the same tensor twice"),
        ({"params": torch.ones(2, 3), "dim": 2}, ValueError, "dim=2 is out of range"),
        ({"params": torch.ones(2, 3), "dim": -3}, ValueError, "give an int from -2 to 1, or None"),
        ({"params": torch.ones(2, 3), "dim": True}, TypeError, "dim must be an int or None"),
        ({"params": torch.ones(2, 3), "dim": "0"}, TypeError, "not '0'"),
        ({"params": torch.tensor(1.0)}, ValueError, "has no dimensions: give dim=None"),
        ({"params": [torch.ones(2, 3), torch.ones(3, 2)]}, ValueError, "give dim=None to take the whole"),
        ({"params": [torch.ones(2, 3), torch.ones(3)], "dim": -1}, ValueError, "give dim >= 0"),
        ({"params": torch.ones(2, 3), "dim": None, "mask": [True]}, ValueError, "dim=None has none"),
        ({"params": torch.ones(2, 3), "mask": [True]}, ValueError, "mask must hold 2 booleans"),
        ({"params": torch.ones(2, 3), "mask": [1, 0]}, ValueError, "not torch.int64"),
        ({"params": torch.ones(2, 3), "mask": [False, False]}, ValueError, "mask selects nothing"),
    ],
)
def test_bad_units(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        Unit(**arguments)
    assert "\n" not in str(caught.value)


def test_check_dim_names_what_it_is_for() -> None:
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
