"""Every rule, mode and dim for every placement: as in one process, the same bits on all ranks, few words."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from tests.distributed.comparison import (
    CELLS,
    DIMS,
    FLAT_LAYOUTS,
    LAYOUTS,
    RULES,
    SHAPES,
    SQUARE_LAYOUTS,
    Outcome,
    compare,
    mesh_of,
    sharded,
)
from tests.distributed.world import World
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

import normwise as nw

Table = dict[tuple[str, str, str], Outcome]


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


def run_matrix(sizes: tuple[int, ...], layouts: dict[str, tuple[Placement, ...]]) -> Table:
    """Return {(layout, rule, mode): differences and collectives}."""
    mesh = mesh_of(*sizes)
    table: Table = {}
    columns = [
        Column(title, placements, dim, shape)
        for (title, placements), dim, shape in itertools.product(layouts.items(), DIMS, SHAPES)
    ]
    quiet = [c for c in columns if all(split == c.dim for split in c.splits(mesh))]
    for name, mode in CELLS:
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
            for column, ulps in zip(some, outcome.ulps, strict=True):
                cell = table.setdefault((column.title, name, mode), Outcome([], 0))
                cell.ulps.append(ulps)
                table[column.title, name, mode] = Outcome(
                    cell.ulps, max(cell.collectives, outcome.collectives)
                )
    return table


def test_one_dimension(world: World) -> None:
    world.run(run_matrix, (world.size,), LAYOUTS)


def test_meshes_with_a_dimension_of_one(world: World) -> None:
    world.run(run_matrix, (world.size, 1) if world.size == 2 else (1, world.size), FLAT_LAYOUTS)


def test_two_dimensions(four: World) -> None:
    four.run(run_matrix, (2, 2), SQUARE_LAYOUTS)
