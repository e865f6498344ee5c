"""Runs whose summaries are computed from their settings, to put rules of judgement to the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.lab.small import budget

from normwise.lab.claims.claim import Claim, Finding, Runs
from normwise.lab.engine.run import Run

Summary = dict[str, Any]
BUDGET = budget()


class MadeUpRuns(Runs):
    """Every run has a summary, and the same metrics."""

    def __init__(self, make: Callable[[Any], Summary]) -> None:
        super().__init__({}, None)  # type: ignore[arg-type]
        self.make = make

    def __getitem__(self, settings: Run) -> Summary:
        return self.make(settings)

    def metrics(self, settings: Run) -> list[Summary]:
        layer = {"norm": 1.0, "effective_lr": 0.1, "turn": 0.01}
        line: Summary = {"replay": 1e-15, "naive": 0.1, "twin": 1e-15, "norm": 1.0, "lr": 0.1}
        line |= {"layers": {"one": layer, "two": layer}}
        return [{"step": k, "lr": 0.1, **line} for k in (1, 2)]


def judge(claim: Claim, make: Callable[[Any], Summary]) -> Finding:
    return claim.judge(BUDGET, MadeUpRuns(make))


def finished(accuracy: float, settings: Run) -> Summary:
    noise = 0.001 * settings.seed
    return {
        "status": "finished",
        "step": 8,
        "seconds": 1.0,
        "test_accuracy": accuracy + noise,
        "test_loss": 1 - accuracy,
        "train_accuracy": accuracy + noise,
        "train_loss": 1 - accuracy,
        "validation_accuracy": accuracy,
    }
