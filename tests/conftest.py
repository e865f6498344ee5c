"""Settings of all tests."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

# In CI the same examples each time, so that a change is judged by what it changed; at home new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("home", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection: Accelerate, for one, collects before each training."""
    gc.freeze()
