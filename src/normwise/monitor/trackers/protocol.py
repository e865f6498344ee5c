"""What a monitor expects of a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from normwise.monitor.finding import Finding

__all__ = ["Tracker", "check_tracker"]


@runtime_checkable
class Tracker(Protocol):
    """Takes rows and findings of a monitor, on rank 0 only.

    Two further methods are called where a tracker has them: ``begin(settings)`` before the first row, with a
    mapping of plain values about the whole run, and ``close()`` when the monitor is removed.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take a row.

        Args:
            step: The number of optimizer steps taken.
            values: {"normwise/quantity/layer": number}; for the network as a whole "normwise/name". Numbers
                may be infinite or NaN.
        """

    def finding(self, finding: Finding) -> None:
        """Take a finding that is new, has changed or is over."""


def check_tracker(tracker: object) -> None:
    """Raise a TypeError if something is no tracker."""
    if isinstance(tracker, type) or not isinstance(tracker, Tracker):
        raise TypeError(
            f"trackers must be objects such as nw.trackers.JSONL('runs/a'), with methods log and "
            f"finding, not {tracker!r:.60}"
        )
