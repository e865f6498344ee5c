"""A progress bar with the time left: rich's if it is installed, else a line on a terminal."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_PATIENCE = 2.0


class Progress:
    """Shows how far the passes are, once they have taken two seconds and if stderr is a terminal.

    Args:
        shown: False for silence.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._drawn:
            sys.stderr.write("\n")

    def update(self, what: str, done: int, expected: int) -> None:
        """Say that ``done`` of about ``expected`` passes of the stage ``what`` are done."""
        elapsed = time.monotonic() - self._start
        if not self._shown or elapsed < _PATIENCE:
            return
        expected = max(expected, done, 1)
        if importlib.util.find_spec("rich") is not None:
            self._update_rich(what, done, expected)
            return
        left = elapsed * (expected - done) / max(done, 1)
        sys.stderr.write(f"\r{what}: {done} of about {expected} passes, {left:.0f} s left ")
        sys.stderr.flush()
        self._drawn = True

    def _update_rich(self, what: str, done: int, expected: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=expected)
            self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=expected)
