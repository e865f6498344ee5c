"""Masks, joint units on several placements, RMS, extreme scales and precisions, sharded."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from tests.distributed.comparison import CELLS, LAYOUTS, RULES, S0, R, compare, each_extent, mesh_of, sharded
from tests.distributed.world import World
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

import normwise as nw
from normwise import collectives

pytestmark = pytest.mark.one_in(2)  # of two numbers of ranks

ALL = (*LAYOUTS.values(), None)


def placed(value: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...] | None) -> nn.Parameter:
    """Return a parameter with these placements, or a dense one."""
    return nn.Parameter(value.clone()) if placements is None else sharded(value, mesh, placements)


def along(dim: int | None, params: list[nn.Parameter], mask: list[bool] | None = None) -> list[nw.Unit]:
    return [nw.Unit(param, dim, mask) for param in params]


def pairwise(dim: int | None, params: list[nn.Parameter]) -> list[nw.Unit]:
    return [nw.Unit(params[k : k + 2], dim) for k in range(0, len(params), 2)]


def layouts(mesh: DeviceMesh, *every: tuple[Placement, ...] | None) -> list[functools.partial[nn.Parameter]]:
    return [functools.partial(placed, mesh=mesh, placements=placements) for placements in every]


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]


def masks(size: int) -> None:
    mesh = mesh_of(size)
    for name, rule in RULES.items():
        for mode in rule.modes:
            for dim, mask in ((0, [True, False, True, True, False]), (1, [False, True, True, False])):
                compare(
                    layouts(mesh, *ALL),
                    random(*[(5, 4)] * len(ALL)),
                    functools.partial(along, dim, mask=mask),
                    rule,
                    f"{name}, {mode}, masked along {dim}",
                    mode=mode,
                )


def joint(size: int, full: bool) -> None:
    """Every pair of placements, a dense one among them: units of one tensor each and all of it.

    Each rule and mode has all pairs, or a third of them that takes turns.
    """
    mesh = mesh_of(size)
    every = list(itertools.combinations_with_replacement(ALL, 2))
    for k, (name, mode) in enumerate(CELLS):
        rule = RULES[name]
        for shift, dim in enumerate((0, None)):
            pairs = every if full else every[(k + shift) % 3 :: 3]
            outcome = compare(
                layouts(mesh, *[one for pair in pairs for one in pair]),
                random(*[(5, 4), (5, 3)] * len(pairs)),
                functools.partial(pairwise, dim),
                rule,
                f"joint, {name}, {mode}, dim={dim}",
                mode=mode,
            )
            distributed = mode == "explicit" and dim == 0
            assert outcome.collectives == (0 if name == "L2" else 1 + distributed)


def joint_aligned(size: int) -> None:
    """Two tensors that are sharded alike need no communication."""
    outcome = compare(
        layouts(mesh_of(size), (S0,), (S0,)),
        random((5, 4), (5, 2, 3)),
        lambda params: [nw.Unit(params, 0)],
        RULES["AdaptiveWeightShrink"],
        "aligned",
    )
    assert outcome.collectives == 0


def every_second_step(size: int) -> None:
    """Ranks communicate only in the steps that apply the rule."""
    for steps in (1, 2, 3, 4):
        outcome = compare(
            layouts(mesh_of(size), *ALL),
            random(*[(5, 4)] * len(ALL)),
            functools.partial(along, 0),
            RULES["AdaptiveWeightShrink"],
            f"every second step, {steps} steps",
            steps=steps,
            every=2,
        )
        assert outcome.collectives == (steps + 1) % 2


def measures_and_precisions(size: int, full: bool) -> None:
    """Every dim, precision and scale together, or every two of them."""
    mesh = mesh_of(size)
    for i, dim in enumerate((0, 1, None)):
        units = functools.partial(along, dim)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
            for k, scale in enumerate((1.0, 1e-30, 1e30)):
                if not full and (i + j + k) % 3:
                    continue
                values = [(scale * value).to(dtype) for value in random(*[(5, 4)] * len(ALL))]
                for measure in ("norm", "rms"):
                    what = f"dim={dim}, {dtype}, scale {scale}, {measure}"
                    rule = nw.AdaptiveWeightShrink(0.5 / scale)
                    compare(layouts(mesh, *ALL), values, units, rule, what, measure=measure)


def whole_units_stay_whole(size: int) -> None:
    """What needs whole units on one rank has them under Shard(0) with dim=0, and under Replicate."""
    mesh = mesh_of(size)
    some = layouts(mesh, (S0,), (R,))
    units = functools.partial(along, 0)
    for rotating in (nw.RotatingSphere(1.5), nw.RotatingSphere()):
        compare(some, random((5, 4), (5, 4)), units, rotating, str(rotating))
    published = nw.PublishedEpsilonShift(0.1, 0.01)
    compare(some, random((5, 4), (5, 4)), units, published, "std", mode="coupled")
    low = [value.bfloat16() for value in random((5, 4), (5, 4))]
    compare(some, low, units, nw.AdaptiveWeightShrink(1e-2), "compensated", steps=5, compensated=True)


def norms(size: int) -> None:
    """Unit.norms gives the norms of all units on every rank."""
    mesh = mesh_of(size)
    for dim in (0, 1, None):
        for placements in LAYOUTS.values():
            (value,) = random((5, 4))
            actual = nw.Unit(sharded(value, mesh, placements), dim).norms()
            torch.testing.assert_close(actual, nw.Unit(value, dim).norms())


def test_masks(world: World) -> None:
    world.run(masks, world.size)


@each_extent
def test_joint_units(world: World, full: bool) -> None:
    world.run(joint, world.size, full)


def test_joint_units_that_are_sharded_alike(world: World) -> None:
    world.run(joint_aligned, world.size)


def test_every_second_step(world: World) -> None:
    world.run(every_second_step, world.size)


@each_extent
def test_measures_precisions_and_scales(world: World, full: bool) -> None:
    world.run(measures_and_precisions, world.size, full)


def test_rules_that_need_whole_units(world: World) -> None:
    world.run(whole_units_stay_whole, world.size)


def sum_on_a_part_of_the_world() -> tuple[float, list[int]]:
    """A mesh of two dimensions that is not all of the world: rank 4 has no part in it."""
    mesh, rank = DeviceMesh("cpu", [[0, 1], [2, 3]]), dist.get_rank()
    summed = collectives.sum_over(mesh, torch.tensor([10.0**rank]))
    return float(summed), collectives._gather(mesh, rank)


def test_meshes_within_the_world(worlds: dict[int, World]) -> None:
    *members, outsider = worlds[5].run(sum_on_a_part_of_the_world)
    assert {total for total, _ in members} == {1111.0}
    assert all(sorted(ranks) == [0, 1, 2, 3] for _, ranks in members)
    assert outsider == (1e4, [4])


def test_norms(world: World) -> None:
    world.run(norms, world.size)
