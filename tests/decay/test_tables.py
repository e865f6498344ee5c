"""All parameters at once, by table: the same results as one after the other, and launches that do not grow.

The kernels for CUDA are replaced by a stand-in that reads the same table (by_table.py); where Triton is
installed, test_kernels.py runs the kernels themselves in its interpreter.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.decay.by_table import StandIn, use_kernels
from torch import nn
from torch.optim import SGD

import normwise as nw
from normwise.decay.rules import Rule
from normwise.decay.table import KINDS, Table

RULES: list[Rule] = [
    nw.L2(0.3),
    nw.AdaptiveWeightShrink(0.3),
    nw.PowerShrink(0.3, 1.7),
    nw.EpsilonShiftedL2(0.3, 0.5),
    nw.Sphere(1.5),
    nw.Sphere(),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def units(dtype: torch.dtype = torch.float32) -> list[nw.Unit]:
    """Every kind of tile, and whatever a table has to tell apart."""

    def made(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape).to(dtype).to(memory_format=memory_format))

    last = torch.channels_last
    return [
        nw.Unit(made(5, 40)),  # short rows, fewer than a tile has
        nw.Unit(made(131, 40)),  # short rows, in three tiles
        nw.Unit(made(17, 300)),  # longer ones
        nw.Unit(made(3, 40000)),  # in segments
        nw.Unit(made(70, 9), dim=1),  # columns
        nw.Unit(made(1100, 5), dim=1),  # columns in segments
        nw.Unit(made(4, 3, 5, 5), dim=1),
        nw.Unit(made(4, 3, 5, 5, memory_format=last), dim=1),
        nw.Unit(made(6, 3, 5, 5, memory_format=last)),
        nw.Unit(made(1, 7)),
        nw.Unit(made(7, 1), dim=1),
        nw.Unit(made(90, 200), dim=None),  # a whole tensor
        nw.Unit(made(3)),  # units of one element
        nw.Unit(made(8, 30), mask=[True, False] * 4),
        nw.Unit([made(4, 30), made(4, 5000), made(4, 50)]),  # jointly
        nw.Unit([made(4, 30), made(6, 7)], dim=None),
    ]


def stepped(its: list[nw.Unit], rule: Rule, steps: int = 1, **settings: Any) -> None:
    params = [param for unit in its for param in unit.params]
    optimizer = SGD(params, lr=0.0)
    nw.Decay(optimizer, rule, its, clock="step", **settings)
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()


def off(mine: list[nw.Unit], others: list[nw.Unit]) -> float:
    """The largest difference in units in the last place of a unit's norm."""
    worst = 0.0
    for unit, other in zip(mine, others, strict=True):
        gaps = [
            p.detach().double() - q.detach().double() for p, q in zip(unit.params, other.params, strict=True)
        ]
        eps = torch.finfo(unit.params[0].dtype).eps
        worst = max(worst, float((nw.Unit(gaps, unit.dim).norms() / other.norms() / eps).max()))
    return worst


@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", ["norm", "rms"])
def test_by_table_is_one_after_the_other(
    measure: str, dtype: torch.dtype, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 8 ULP of a unit's norm, as norms are summed in another order and type."""
    torch.manual_seed(1)
    one_by_one = units(dtype)
    together = copy.deepcopy(one_by_one)
    stepped(one_by_one, rule, measure=measure)
    stand_in = StandIn()
    use_kernels(monkeypatch, lambda _: stand_in)
    stepped(together, rule, measure=measure)
    assert stand_in.launches > 0
    assert off(together, one_by_one) <= 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_factors_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: L2 needs no norm, and a factor is rounded once and multiplied once on both paths."""
    one_by_one = units(dtype)
    together = copy.deepcopy(one_by_one)
    stepped(one_by_one, nw.L2(0.3), steps=3)
    use_kernels(monkeypatch, lambda _: StandIn())
    stepped(together, nw.L2(0.3), steps=3)
    for unit, other in zip(together, one_by_one, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(unit.params, other.params, strict=True))


def test_every_kind_of_tile_is_there() -> None:
    assert [launch.kind for launch in Table(units()).launches] == list(KINDS)


def test_gaps_and_empty_tensors_are_taken_by_themselves(by_table: StandIn) -> None:
    wide = torch.randn(6, 8)
    gappy, empty = nn.Parameter(wide[:, ::2]), nn.Parameter(torch.empty(3, 0))
    expected = gappy.detach() / (1 + 0.5 * gappy.detach().norm(dim=1, keepdim=True))
    stepped([nw.Unit(gappy), nw.Unit(empty)], nw.AdaptiveWeightShrink(0.5))
    assert by_table.launches == 0
    torch.testing.assert_close(gappy.detach(), expected)


def test_a_table_is_made_again_when_a_weight_has_moved_or_has_no_gradient(by_table: StandIn) -> None:
    first, second = (nn.Parameter(torch.full((2, 4), 2.0)) for _ in "ab")
    optimizer = SGD([first, second], lr=0.0)
    nw.Decay(optimizer, nw.Sphere(1.0), [first, second], clock="step")
    first.grad, second.grad = torch.zeros(2, 4), torch.zeros(2, 4)
    optimizer.step()
    moved, old = torch.full((2, 4), 3.0), second.data
    second.data = moved
    optimizer.step()
    assert torch.equal(second.data, torch.full((2, 4), 0.5))
    assert second.data_ptr() == moved.data_ptr()
    assert torch.equal(old, torch.full((2, 4), 0.5))
    second.grad = None
    second.data.fill_(7.0)
    optimizer.step()
    assert torch.equal(second.data, torch.full((2, 4), 7.0))


def test_a_joint_unit_is_left_to_itself_where_its_tensors_differ(by_table: StandIn) -> None:
    """One tensor has no gradient, or is of another type or group: still the joint norm counts."""
    for kind in ("idle", "type", "group"):
        first = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        second = nn.Parameter(torch.randn(3, 5, dtype=torch.float32 if kind == "type" else torch.float64))
        norms = torch.hypot(first.detach().norm(dim=1), second.detach().double().norm(dim=1))
        expected = [p.detach() / (1 + 0.5 * norms[:, None]) for p in (first, second)]
        groups = [{"params": [first]}, {"params": [second]}] if kind == "group" else [first, second]
        optimizer = SGD(groups, lr=0.0)
        nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.5), nw.Unit([first, second]), clock="step")
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        if kind == "idle":
            second.grad, expected[1] = None, second.detach().clone()
        optimizer.step()
        for param, value in zip((first, second), expected, strict=True):
            torch.testing.assert_close(param.detach().double(), value.double(), rtol=1e-6, atol=0)
    assert by_table.launches == 0


def test_zero_units_and_norms_that_are_not_finite(by_table: StandIn) -> None:
    weight = nn.Parameter(
        torch.tensor([[0.0, 0.0], [3.0, 4.0], [torch.inf, 1.0], [torch.nan, 1.0], [3e30, 4e30]])
    )
    stepped([nw.Unit(weight)], nw.Sphere(1.0))
    assert torch.equal(weight.detach()[:3], torch.tensor([[0.0, 0.0], [0.6, 0.8], [torch.inf, 1.0]]))
    assert torch.equal(weight.detach()[3].isnan(), torch.tensor([True, False]))
    torch.testing.assert_close(weight.detach()[4], torch.tensor([0.6, 0.8]))
