"""Units: joint norms, masks, broadcasting and overlap; bad units are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from normwise import Unit
from normwise.norms import slice_norms


@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_joint_norm_is_the_norm_of_the_concatenation(dim: int | None) -> None:
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
        ({"params": torch.ones(2, dtype=torch.int64)}, TypeError, "type torch.int64"),
        ({"params": torch.ones(2, 1).expand(2, 3)}, ValueError, "a tensor of shape (2, 3) is a view"),
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
