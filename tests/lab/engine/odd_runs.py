"""Runs that end badly; workers of a cluster import them by name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from normwise.lab.engine.run import Log, Metrics, Run


@dataclass(frozen=True, kw_only=True)
class OddRun(Run):
    """A run that ends in the given way."""

    way: str

    @property
    def cost(self) -> float:
        """Less than that of any other: it comes last."""
        return 0.0 if self.way == "fine" else 1e9 if self.way == "error first" else -1.0

    def run(self, log: Log) -> Metrics:
        if self.way.startswith("error"):
            raise ArithmeticError("the sum\ndoes not add up")
        if self.way == "killed":
            os._exit(9)
        while self.way == "endless":
            time.sleep(60)
        log({"step": 1})
        return {"status": "finished", "step": 1}
