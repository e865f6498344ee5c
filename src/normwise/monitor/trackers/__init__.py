"""Where the rows and findings of a monitor go.

A tracker is any object with the methods ``log(step, values)`` and ``finding(finding)``; ``begin(settings)``
and ``close()`` are called too where it has them.
"""

from __future__ import annotations

from normwise.monitor.trackers.jsonl import JSONL
from normwise.monitor.trackers.others import MLflow, TensorBoard, Trackio, WandB
from normwise.monitor.trackers.protocol import Tracker, check_tracker

__all__ = ["JSONL", "MLflow", "TensorBoard", "Tracker", "Trackio", "WandB", "check_tracker"]
