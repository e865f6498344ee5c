"""A monitor in a trainer: rows go to the trainer's own loggers, findings to the log as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["LoggerTracker"]

_logger = logging.getLogger("normwise")


class LoggerTracker:
    """Gives the rows of a monitor to functions that log numbers, and says its findings.

    Args:
        log: Functions (values, step), such as ``log_metrics`` of Lightning's loggers.
    """

    def __init__(self, log: Sequence[Callable[[dict[str, float], int], Any]]) -> None:
        self._log = list(log)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        for log in self._log:
            log(dict(values), step)

    def finding(self, finding: Any) -> None:
        """Say a finding."""
        _logger.warning("%s", finding)
