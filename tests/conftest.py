"""Settings of all tests."""

from __future__ import annotations

import gc
import os
import zlib
from collections import defaultdict

import pytest
from hypothesis import settings

# In CI the same examples each time, so that a change is judged by what it changed; at home new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("home", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection: Accelerate, for one, collects before each training."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before the cases are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked ``one_in(n)``, leave one case in n to `make test`, and all to `make thorough`.

    Which ones follows from a hash of their names, so each value of each parameter has its chance, and every
    process and machine chooses the same.
    """
    tests: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None and item.get_closest_marker("thorough") is None:
            tests[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, n), cases in tests.items():
        cases.sort(key=lambda case: zlib.crc32(case.nodeid.encode()))
        for case in cases[-(-len(cases) // n) :]:
            case.add_marker(pytest.mark.thorough)
