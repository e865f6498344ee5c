"""The runs of claims before any is made: those that follow from the first runs are taken at their most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normwise.lab.claims.claim import Claim
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.engine.run import Run

__all__ = ["all_runs"]


class _AsIf(FinishedRuns):
    """Runs of which those with the largest coefficient score best, as a tuned arm shares no run then."""

    def __init__(self) -> None:
        self._classes = 10

    def __getitem__(self, settings: Run) -> dict[str, Any]:
        rule = getattr(settings, "rule", None)
        size = rule["coefficient"] if isinstance(rule, dict) else getattr(settings, "coefficient", 0.0)
        return {"status": "finished", "validation_accuracy": size, "validation_loss": -size}


def all_runs(claims: Sequence[Claim]) -> list[Run]:
    """Return the distinct runs that the claims need at most: each tuned arm takes a run of its own.

    Example:
        >>> from normwise.lab.claims import claims_named
        >>> from normwise.lab.claims.budget import Budget
        >>> budget = Budget.of("large", "fashion-mnist", "")
        >>> {claim.id: len(all_runs([claim(budget)])) for claim in claims_named([], "large")}
        {'under-fitting': 30, 'initialization': 27, 'shrink': 18, 'what-to-decay': 48, 'no-tuning': 36}
    """
    wanted = [run for claim in claims for run in (*claim.runs(), *claim.second_runs(_AsIf()))]
    return list({run.identity: run for run in wanted}.values())
