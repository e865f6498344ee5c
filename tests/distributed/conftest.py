"""One world of each size for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.distributed.world import World


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    directory = tmp_path_factory.mktemp("rendezvous")
    made = {size: World(size, directory) for size in (1, 2, 3, 4, 5)}
    yield made
    for world in made.values():
        world.close()


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def world(request: pytest.FixtureRequest, worlds: dict[int, World]) -> World:
    made: World = worlds[request.param]
    return made


@pytest.fixture
def four(worlds: dict[int, World]) -> World:
    return worlds[4]
