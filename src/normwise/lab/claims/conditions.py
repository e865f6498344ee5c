"""Conditions that hold, do not hold, or are undecided, and the verdict that follows from them.

A condition on an estimate is decided where the whole interval lies on one side of the threshold. Conditions
are combined by Kleene's three-valued logic, in which None stands for "undecided": what would follow from
either answer follows, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from normwise.lab.claims.statistics import Equivalence, Estimate

__all__ = [
    "SIGNS",
    "Condition",
    "Verdict",
    "above",
    "all_of",
    "all_some_none",
    "any_of",
    "below",
    "equivalent",
    "negated",
    "verdict_of",
]

Condition = bool | None
Verdict = Literal["reproduced", "partly", "undecided", "not reproduced"]
SIGNS: dict[str, str] = {"reproduced": "✓", "partly": "◐", "undecided": "?", "not reproduced": "✗"}


def above(estimate: Estimate, threshold: float = 0.0) -> Condition:
    """Whether a statistic is above a threshold; None if its interval contains it, or if there is none.

    Example:
        >>> above(Estimate(2.0, 1.0, 3.0, n=3)), above(Estimate(2.0, -1.0, 5.0, n=3))
        (True, None)
    """
    return True if estimate.low > threshold else False if estimate.high < threshold else None


def below(estimate: Estimate, threshold: float = 0.0) -> Condition:
    """Whether a statistic is below a threshold; None if its interval contains it, or if there is none."""
    return negated(above(estimate, threshold))


def equivalent(test: Equivalence) -> Condition:
    """Whether a difference lies within the margin of a test; None if its interval reaches over an end."""
    outside = above(test.difference, test.margin) or below(test.difference, -test.margin)
    return True if test.shown else False if outside else None


def negated(condition: Condition) -> Condition:
    """Return the opposite; None stays None."""
    return None if condition is None else not condition


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Whether all hold: False if one does not, None if that is open.

    Example:
        >>> all_of([True, None]), all_of([False, None])
        (None, False)
    """
    known = set(conditions)
    return False if False in known else None if None in known else True


def any_of(conditions: Iterable[Condition]) -> Condition:
    """Whether one holds at least: True if one does, None if that is open."""
    return negated(all_of(map(negated, conditions)))


def verdict_of(reproduced: Condition, partly: Condition) -> Verdict:
    """Return the verdict for a rule with a condition for each of the two better verdicts.

    Example:
        >>> verdict_of(None, True), verdict_of(False, True), verdict_of(False, None)
        ('undecided', 'partly', 'undecided')
    """
    if reproduced:
        return "reproduced"
    if reproduced is None:
        return "undecided"
    return "partly" if partly else "undecided" if partly is None else "not reproduced"


def all_some_none(conditions: Iterable[Condition]) -> Verdict:
    """Return the verdict for a rule that asks how many conditions hold."""
    known = list(conditions)
    return verdict_of(all_of(known), any_of(known))
