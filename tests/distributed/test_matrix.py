"""Every rule, mode and dim for every placement: as in one process, the same bits on all ranks, few words."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from tests.distributed.comparison import (
    CELLS,
    DIMS,
    FLAT_LAYOUTS,
    LAYOUTS,
    RULES,
    SHAPES,
    SQUARE_LAYOUTS,
    compare,
    each_extent,
    mesh_of,
    sharded,
)
from tests.distributed.world import World
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

import normwise as nw

pytestmark = pytest.mark.one_in(2)  # of two numbers of ranks


class Column(NamedTuple):
    """One parameter of the matrix."""

    title: str
    placements: tuple[Placement, ...]
    dim: int | None
    shape: tuple[int, ...]

    def splits(self, mesh: DeviceMesh) -> list[int]:
        """Return the dimensions of the parameter that are split over ranks."""
        dims = [getattr(p, "dim", None) for k, p in enumerate(self.placements) if mesh.size(k) > 1]
        return [dim for dim in dims if dim is not None]


def expected_collectives(columns: list[Column], name: str, mode: str, mesh: DeviceMesh) -> int:
    """One reduction if a unit is cut; in mode "explicit" one number if ranks see different units."""
    if name == "L2":  # one factor for all
        return 0
    cut = any(split != column.dim for column in columns for split in column.splits(mesh))
    distributed = any(split == column.dim for column in columns for split in column.splits(mesh))
    return int(cut) + int(distributed and mode == "explicit")


def units_of(columns: list[Column], params: list[nn.Parameter]) -> list[nw.Unit]:
    return [nw.Unit(param, column.dim) for param, column in zip(params, columns, strict=True)]


def columns_of(layouts: dict[str, tuple[Placement, ...]], square: int | None) -> list[Column]:
    """Every layout and dim, with every shape or, as in Latin square number ``square``, with one of them."""
    cells = itertools.product(enumerate(layouts.items()), enumerate(DIMS), enumerate(SHAPES))
    return [
        Column(title, placements, dim, shape)
        for (i, (title, placements)), (j, dim), (k, shape) in cells
        if square is None or (i + j + k) % len(SHAPES) == square % len(SHAPES)
    ]


def run_matrix(sizes: tuple[int, ...], layouts: dict[str, tuple[Placement, ...]], full: bool) -> None:
    """Every rule and mode with every layout and dim; with every shape, or with a shape that takes turns."""
    mesh = mesh_of(*sizes)
    for k, (name, mode) in enumerate(CELLS):
        columns = columns_of(layouts, None if full else k)
        quiet = [c for c in columns if all(split == c.dim for split in c.splits(mesh))]
        for some in (quiet, [c for c in columns if c not in quiet]):
            if not some:
                continue
            what = f"{name}, {mode} on {sizes}"
            values = [
                torch.randn(c.shape, generator=torch.Generator().manual_seed(k)) for k, c in enumerate(some)
            ]
            outcome = compare(
                [functools.partial(sharded, mesh=mesh, placements=c.placements) for c in some],
                values,
                functools.partial(units_of, some),
                RULES[name],
                what,
                mode=mode,
                steps=2 if len(sizes) == 1 else 1,
            )
            assert outcome.collectives == expected_collectives(some, name, mode, mesh), what


@each_extent
def test_one_dimension(world: World, full: bool) -> None:
    world.run(run_matrix, (world.size,), LAYOUTS, full)


@each_extent
def test_meshes_with_a_dimension_of_one(world: World, full: bool) -> None:
    sizes = (world.size, 1) if world.size == 2 else (1, world.size)
    world.run(run_matrix, sizes, FLAT_LAYOUTS, full)


@each_extent
def test_two_dimensions(four: World, full: bool) -> None:
    four.run(run_matrix, (2, 2), SQUARE_LAYOUTS, full)
