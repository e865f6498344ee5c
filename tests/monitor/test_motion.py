from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise.monitor.motion import angles, motion, snapshot

RANDOM = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 4, 3, generator=RANDOM)
OTHER = torch.randn(6, 5, generator=RANDOM)


def _reference_rows(params: list[Tensor], dim: int | None) -> Tensor:
    """Return the units as rows in float64, built element by element."""
    if dim is None:
        return torch.cat([param.double().reshape(-1) for param in params])[None]
    rows = [
        [param.double().select(dim, k).reshape(-1) for param in params] for k in range(params[0].shape[dim])
    ]
    return torch.stack([torch.cat(row) for row in rows])


@pytest.mark.parametrize(
    ("params", "dim"),
    [([WEIGHT], 0), ([WEIGHT], 1), ([WEIGHT], None), ([WEIGHT, OTHER], 0), ([WEIGHT, OTHER], None)],
    ids=["rows", "columns", "whole tensor", "joint rows", "jointly whole"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("degree", [1, 2])
def test_motion_agrees_with_float64(
    params: list[Tensor], dim: int | None, dtype: torch.dtype, degree: int
) -> None:
    step = [0.3 * torch.randn(param.shape, generator=RANDOM) for param in params]
    old, new = params, [param + change for param, change in zip(params, step, strict=True)]
    before, now = (snapshot(nw.Unit([p.to(dtype) for p in some], dim=dim)) for some in (old, new))
    moved = motion(before, now, lr=0.1, degree=degree)
    a, b = _reference_rows(old, dim), _reference_rows(new, dim)
    norms = b.square().sum(1).sqrt()
    cosines = (a * b).sum(1) / (a.square().sum(1).sqrt() * norms)
    rtol = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(moved.norm, norms, rtol=rtol, atol=0)
    torch.testing.assert_close(moved.effective_lr, 0.1 / norms**degree, rtol=rtol, atol=0)
    torch.testing.assert_close(moved.rotation.double(), cosines.acos(), rtol=10 * rtol, atol=0)


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.1, 3.0, math.pi])
def test_angles_are_accurate_at_every_size(angle: float) -> None:
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    assert float(angles(one, other)) == pytest.approx(angle, rel=1e-7 if angle > 3 else 1e-12)


def test_a_mask_selects_units() -> None:
    whole, part = snapshot(nw.Unit(WEIGHT)), snapshot(nw.Unit(WEIGHT, mask=[True, False] * 3))
    assert torch.equal(part.norms, whole.norms[::2])
    assert torch.equal(part.directions, whole.directions[::2])


def test_a_snapshot_does_not_change_with_the_weight() -> None:
    weight = torch.nn.Parameter(WEIGHT.clone())
    before = snapshot(nw.Unit(weight))
    with torch.no_grad():
        weight.mul_(2).add_(1)
    assert torch.equal(before.directions, snapshot(nw.Unit(WEIGHT)).directions)
    assert not before.directions.requires_grad


def test_units_without_a_finite_positive_norm_do_not_count_in_the_means() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]])
    shot = snapshot(nw.Unit(weight))
    moved = motion(shot, shot, lr=0.1)
    assert moved.effective_lr[1].isnan()
    means = moved.means()
    assert means["norm"] == 7.5
    assert means["effective_lr"] == pytest.approx((0.1 / 25 + 0.1 / 100) / 2)
    dead = snapshot(nw.Unit(torch.zeros(2, 3)))
    assert motion(dead, dead, lr=0.1).means() == {"norm": None, "effective_lr": None, "turn": 0.0}
