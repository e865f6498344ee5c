"""Runs that end badly; workers of a cluster import them by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from normwise.lab.runs.settings import Settings


@dataclass(frozen=True, kw_only=True)
class OddRun(Settings):
    """Carried out by ``end`` below, in the way that it is called."""

    kind: ClassVar[str] = "odd"
    carried_out_by: ClassVar[str] = "tests.lab.engine.odd_runs:end"

    way: str

    @property
    def cost(self) -> float:
        """Less than that of any other: it comes last."""
        return 0.0 if self.way == "fine" else 1e9 if self.way == "error first" else -1.0


def end(settings: OddRun, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    if settings.way.startswith("error"):
        raise ArithmeticError("the sum\ndoes not add up")
    if settings.way == "killed":
        os._exit(9)
    while settings.way == "endless":
        time.sleep(60)
    log({"step": 1})
    return {"status": "finished", "step": 1}
