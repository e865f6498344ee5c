"""Small models are copied in float64; these fixtures store them as large ones are."""

from __future__ import annotations

import pytest


@pytest.fixture
def narrow_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store all weights in float32 and widen them at each read, whatever the size of the model."""
    monkeypatch.setattr("normwise.invariance.find.NARROW_ABOVE", 0)


@pytest.fixture(params=["copied", "narrow"])
def either_storage(request: pytest.FixtureRequest) -> None:
    """Run a test with weights that are copied, and with weights that are stored in float32."""
    if request.param == "narrow":
        request.getfixturevalue("narrow_storage")
