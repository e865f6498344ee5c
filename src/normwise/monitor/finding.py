"""A finding: one thing that is wrong with a training.

This module does not import torch, as ``normwise watch`` does not need it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from normwise.planning.tables import listed

__all__ = ["KINDS", "Finding"]

KINDS = {
    "effective rate vanished": 3,
    "effective rate too large": 3,
    "decay too weak": 3,
    "decay too strong": 3,
    "norm out of range": 1,
    "gradient near overflow": 1,
    "decay lost to rounding": 2,
    "dead units": 1,
    "layers out of balance": 3,
    "decayed vectors": 1,
    "decayed twice": 1,
    "not invariant": 3,
    "loss spike": 1,
}
"""The kinds of findings, and in how many observed steps in a row each must be seen."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: One of :data:`KINDS`.
        layers: The layers that it concerns.
        since: The first observed step that showed it.
        step: The observed step in which it was last stated.
        evidence: What was measured.
        remedy: What to do, as a line of code where there is one.
        ended: Whether it is over.
    """

    kind: str
    layers: tuple[str, ...]
    since: int
    step: int
    evidence: str
    remedy: str
    ended: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return {**asdict(self), "layers": list(self.layers)}

    def __str__(self) -> str:
        """The finding in two lines."""
        where = f": {listed(self.layers)}" if self.layers else ""
        state = "over since" if self.ended else "since"
        step = self.step if self.ended else self.since
        return f"{self.kind}{where} ({state} step {step}). {self.evidence}\n  → {self.remedy}"
