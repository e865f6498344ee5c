"""Runs whose summaries are computed from their settings, to test rules of judgement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.lab.small import budget

from normwise.lab.claims.claim import Claim, Outcome
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.engine.run import Run

Summary = dict[str, Any]
BUDGET = budget()


class MadeUpRuns(FinishedRuns):
    """Runs with the summary ``make(run)``, whose layers have the norm ``norm(run)`` at all times."""

    def __init__(
        self, make: Callable[[Any], Summary], norm: Callable[[Any], float] = lambda run: 1.0
    ) -> None:
        super().__init__({}, None)  # type: ignore[arg-type]
        self.make, self.norm = make, norm

    def __getitem__(self, settings: Run) -> Summary:
        return self.make(settings)

    def metrics(self, settings: Run) -> list[Summary]:
        layer = {"norm": self.norm(settings), "effective_lr": 0.1, "turn": 0.01}
        line: Summary = {"replay": 1e-15, "naive": 0.1, "twin": 1e-15, "norm": 1.0, "lr": 0.1}
        line |= {"objective": 1.0, "train_loss": 1.0, "layers": {"one": layer, "two": layer}}
        return [{"step": k, **line} for k in range(1, 9)]


def outcome(
    claim: type[Claim], make: Callable[[Any], Summary], norm: Callable[[Any], float] = lambda run: 1.0
) -> Outcome:
    return claim(BUDGET).outcome(MadeUpRuns(make, norm))


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


def not_finite() -> Summary:
    return {"status": "not finite", "step": 3, "reason": "the training loss was nan"}


def rule_name(run: Any) -> str:
    """Return the class name of the rule, "" where there is none."""
    return "" if run.rule is None else str(run.rule["name"])
