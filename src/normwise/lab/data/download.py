"""Downloading one file of a data set over HTTP: resumable, bounded, verified before it gets its name."""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from normwise.lab.data.source import DataError, SourceFile, read_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SILENCE_SECONDS = 30.0  # without a byte from the site
_ATTEMPTS = 3
_CHUNK = 1 << 16


def part_of(target: Path) -> Path:
    """Where an unfinished download of ``target`` is kept."""
    return target.with_name(f"{target.name}.part")


def store(path: Path, target: Path, file: SourceFile) -> None:
    """Move ``path`` to ``target`` on the same file system, if its content is what ``file`` describes.

    Raises:
        DataError: it is not. Nothing is moved.
    """
    read_content(path, file)
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())  # or a power cut could leave the name without the content
    path.replace(target)


def download(url: str, target: Path, file: SourceFile) -> None:
    """Download ``url`` to ``target``, going on where an earlier download broke off.

    What has arrived is kept beside ``target`` with the suffix ``.part``; ``target`` itself appears only
    whole and verified. A connection that breaks off is tried again, three times in all.

    Raises:
        DataError: the site cannot be reached, or sends something else.
    """
    part = part_of(target)
    reason: Exception | None = None
    for _ in range(_ATTEMPTS):
        resumed = part.exists()
        try:
            _append(url, part, file.limit)
            store(part, target, file)
        except urllib.error.HTTPError as error:
            error.close()
            reason = error
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < 500:
                break
        except DataError as error:
            part.unlink(missing_ok=True)
            reason = error
            if not resumed:  # a whole download with the wrong content: another will be no better
                break
        except (OSError, http.client.HTTPException) as error:
            reason = error
        else:
            return
    raise DataError(f"{url}: {reason or 'no answer'}")


def _append(url: str, part: Path, limit: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "normwise", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_SILENCE_SECONDS) as response:
        partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if not partial:
            have = 0  # the site ignores ranges and sends all of it; a wrong range fails the checksum
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with part.open("ab" if partial else "wb") as stream, _progress(part.stem, total) as advance:
            advance(have)
            while chunk := response.read(_CHUNK):
                have += len(chunk)
                if have > limit:
                    raise DataError(f"expected at most {limit:,} bytes, found more")
                stream.write(chunk)
                advance(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off after {have:,} of {total:,} bytes")


@contextlib.contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal, once the download has taken two seconds."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=total)
    started = time.monotonic()

    def advance(count: int) -> None:
        bar.advance(task, count)
        if time.monotonic() - started > 2:
            bar.start()  # does nothing the second time

    try:
        yield advance
    finally:
        bar.stop()
