"""``Invariances.units``: decaying these units changes no output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw

EPS = 1e-20  # in float64: what a smaller norm changes through eps is rounding


class _PartlyNormalized(nn.Module):
    """A layer whose first four rows meet a norm each, or two by two, and whose last two meet none."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1, bias=False)
        self.norm = nn.GroupNorm(groups, 4, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.norm(y[:, :4]), y[:, 4:]], 1)


def _linear(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "rows": (lambda: _linear(nn.BatchNorm1d(8, eps=EPS)), (16, 3), ["Unit((8, 3), dim=0)"]),
    "tensor": (lambda: _linear(nn.LayerNorm(8, eps=EPS)), (16, 3), ["Unit((8, 3), dim=None)"]),
    "blocks": (lambda: _linear(nn.GroupNorm(2, 8, eps=EPS)), (16, 3), ["Unit((8, 3), dim=None)"]),
    "columns": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, eps=EPS)),
        (8, 3, 5),
        ["Unit((3, 4, 3), dim=1)"],
    ),
    "some rows": (lambda: _PartlyNormalized(4), (8, 3, 7), ["Unit((6, 3, 1), dim=0, mask=4 of 6)"]),
    "some blocks": (lambda: _PartlyNormalized(2), (8, 3, 7), []),
    "nothing": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (8, 3), []),
}


@pytest.mark.parametrize("case", CASES)
def test_decay_of_the_units_changes_no_output(case: str) -> None:
    make, shape, expected = CASES[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    units = nw.find_invariances(model, [x], progress=False).units(model)
    assert [repr(unit) for unit in units] == expected
    if not units:
        return
    before, outputs = [unit.norms() for unit in units], model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(1.0), units)
    for _ in range(20):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all((unit.norms() < norms).any() for unit, norms in zip(units, before, strict=True))
    torch.testing.assert_close(model(x), outputs, rtol=1e-9, atol=1e-9)


def test_frozen_parameters_are_left_out() -> None:
    model = _linear(nn.BatchNorm1d(8))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    inv = nw.find_invariances(model, [torch.randn(16, 3)], progress=False)
    assert inv.scale_invariant == {"0.weight": 0}
    assert inv.units(model) == []


def test_another_model_is_refused() -> None:
    model = _linear(nn.BatchNorm1d(8))
    inv = nw.find_invariances(model, [torch.randn(16, 3)], progress=False)
    with pytest.raises(ValueError, match=r"model has no parameter '0.weight': give the model that"):
        inv.units(nn.Linear(3, 8))
