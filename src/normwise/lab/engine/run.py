"""The base class of a run: settings, the identity that follows from them, and the code that executes it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import normwise as nw
from normwise.lab.engine.sources import source_hash

__all__ = ["Log", "Metrics", "Run"]

Metrics = dict[str, Any]
Log = Callable[[Metrics], None]
"""Called by a run with one line of metrics."""


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """A run: the settings that its results depend on, and :meth:`run`, which executes it.

    A subclass adds its settings as fields. They must be plain values (numbers, strings, tuples, dicts), as
    they are written to JSON and sent to other processes.

    Attributes:
        seed: Seed of everything random in the run.
    """

    seed: int = 0

    @property
    @abstractmethod
    def cost(self) -> float:
        """Rough number of seconds that the run takes.

        The engine starts expensive runs first and estimates the remaining time from the costs.
        """

    @abstractmethod
    def run(self, log: Log) -> Metrics:
        """Execute the run in this process.

        Args:
            log: Called with each line of metrics.

        Returns:
            The summary. Its entry ``status`` is "finished", or says how the run ended.
        """

    def run_in(self, folder: Path | None, execution: Any, log: Log) -> Metrics:
        """Execute the run with a folder for its checkpoints; most runs are short and need none.

        Args:
            folder: The folder of the run, which may not exist yet, if this process can write there. What
                :meth:`run_in` leaves there lets the same call go on after an interruption.
            execution: The device, and how, as the class of the run knows it; None for its default. It has no
                part in the identity.
            log: As for :meth:`run`.
        """
        return self.run(log)

    def as_dict(self) -> dict[str, Any]:
        """Return everything that the results depend on, as plain values: settings, versions, source code."""
        code = source_hash(type(self))
        versions = {"normwise": nw.__version__, "code": code, "torch": torch.__version__}
        return {"run": type(self).__name__, **asdict(self), "versions": versions}

    @property
    def identity(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of :meth:`as_dict`."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
