"""``normwise watch``: what a monitor logs, while it logs it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normwise.monitor.log import Log
from normwise.monitor.terminal import line, lines, summary

__all__ = ["watch"]

_PAUSE = 1.0  # seconds between two looks at the file


def watch(
    folder: Path,
    *,
    html: Path | None = None,
    once: bool = False,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the log in a folder, until the job ends or the user stops.

    On a terminal a table is kept up to date. Elsewhere a line is printed for each row, and for each finding.

    Args:
        folder: The folder of a :class:`normwise.trackers.JSONL`.
        html: Write a page to this file instead.
        once: Show the present state, and return.
        as_json: Print the present state as JSON, and return.
        sleep: Waits for so many seconds.

    Raises:
        ValueError: The folder holds no log, or the page cannot be written.
    """
    log = Log.open(folder)
    if html is not None:
        print(_page(log, html))  # noqa: T201
    if as_json:
        print(json.dumps(summary(log), indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201
    elif html is None and once:
        _print(log)
    elif html is None and sys.stdout.isatty():
        _live(log, sleep)
    elif html is None:
        _follow(log, sleep)


def _page(log: Log, path: Path) -> Path:
    try:
        from normwise.monitor.page import write_page
    except ImportError as error:
        raise ValueError("--html needs the extra 'lab': pip install normwise[lab]") from error
    return write_page(log, path)


def _rendered(log: Log, width: int) -> Any:
    from rich.text import Text

    text = Text()
    for content, style in lines(log, max(60, min(width, 110))):
        text.append(content + "\n", style=style)
    return text


def _print(log: Log) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as capture:  # rich would end the process if the output were closed
        console.print(_rendered(log, console.width), end="")
    sys.stdout.write(capture.get())


def _live(log: Log, sleep: Callable[[float], None]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(_rendered(log, console.width), console=console, auto_refresh=False) as live:
        while not log.ended:
            sleep(_PAUSE)
            if log.update() or console.width != live.console.width:
                live.update(_rendered(log, console.width), refresh=True)


def _follow(log: Log, sleep: Callable[[float], None]) -> None:
    shown, said, rewound = -1, 0, len(log.rewound)
    for note in log.notes():
        print(note)  # noqa: T201
    while True:
        if len(log.rewound) > rewound:
            shown = min(shown, log.rewound[-1] - 1)
            print("the job began anew from a checkpoint")  # noqa: T201
        rewound, said = len(log.rewound), min(said, len(log.past))
        for index, step in enumerate(log.steps):
            if step > shown:
                print(line(log, index))  # noqa: T201
                shown = step
        for finding in log.past[said:]:
            print(f"! {finding}")  # noqa: T201
        said = len(log.past)
        sys.stdout.flush()
        if log.ended:
            print("the job ended")  # noqa: T201
            return
        sleep(_PAUSE)
        log.update()
