"""Settings of all tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# In CI the same examples each time, so that a change is judged by what it changed; at home new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("home", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Take what is imported out of garbage collection: Accelerate, for one, collects before each training."""
    gc.collect()
    gc.freeze()
