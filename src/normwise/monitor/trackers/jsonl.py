"""The default tracker: a file that grows by a line per row, and that ``normwise watch`` shows."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from normwise.monitor.finding import Finding
from normwise.monitor.log import FILE, FORMAT, encoded

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, nothing keeps two monitors apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["JSONL"]


class JSONL:
    """Appends rows and findings to ``monitor.jsonl`` in a folder; ``normwise watch FOLDER`` shows them.

    Each line is written at once, so a job that is killed leaves at most one line unfinished, which readers
    leave out. A job that goes on appends to the file; rows that it writes again take the place of the old
    ones for readers. When there are more than ``max_rows``, every second is dropped: the file stays bounded,
    and the older its rows, the wider apart. Findings are kept.

    Args:
        folder: The folder; it is made with the first row.
        max_rows: The most rows, at least 100. A row of 100 layers takes about 12 KB.

    Raises:
        TypeError: ``folder`` is not a path, or ``max_rows`` is not a number.
        ValueError: ``max_rows`` is below 100, or, with the first row: the folder cannot be written to, holds
            a ``monitor.jsonl`` that is no log, or another monitor writes there.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> tracker = JSONL(folder)
        >>> tracker.begin({"every": 50})
        >>> tracker.log(50, {"normwise/norm/fc": 1.25})
        >>> tracker.close()
        >>> print(Path(folder, "monitor.jsonl").read_text().splitlines()[2])
        {"step":50,"values":[1.25]}
    """

    def __init__(self, folder: str | os.PathLike[str], max_rows: int = 2000) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a path, not {folder!r:.60}")
        if isinstance(max_rows, bool) or not isinstance(max_rows, int):
            raise TypeError(f"max_rows must be a number of rows, not {max_rows!r:.60}")
        if max_rows < 100:
            raise ValueError(f"max_rows={max_rows} is not allowed: give 100 or more")
        self.folder, self.max_rows = Path(folder), max_rows
        self._file: IO[bytes] | None = None
        self._names: list[str] | None = None
        self._count = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open the file and note the beginning of a run."""
        if self._file is None:
            self._open()
        self._names = None
        self._write({"normwise": "monitor", "format": FORMAT, "settings": dict(settings)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        if self._file is None:
            self.begin({})
        names = list(values)
        if names != self._names:
            self._write({"names": names})
            self._names = names
        self._write({"step": step, "values": [encoded(value) for value in values.values()]})
        self._count += 1
        if self._count > self.max_rows:
            self._thin()

    def finding(self, finding: Finding) -> None:
        """Append a finding."""
        if self._file is None:
            self.begin({})
        self._write({"finding": finding.to_dict()})

    def close(self) -> None:
        """Note the end of the run, and close the file."""
        if self._file is not None:
            self._write({"end": True})
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            with suppress(Exception):  # the interpreter may be half gone
                self.close()

    def __repr__(self) -> str:
        return f"JSONL({str(self.folder)!r}, max_rows={self.max_rows})"

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(
                f"nw.trackers.JSONL({str(self.folder)!r}) cannot write there ({error.strerror}): give "
                "another folder"
            ) from error
        try:
            self._lock(file)
            self._count = self._check(file)
        except ValueError:
            file.close()
            raise
        self._file = file

    def _lock(self, file: IO[bytes]) -> None:
        """Keep other monitors away, until the file is closed or the process ends, however it ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"another monitor writes to {self.path}: give each run a folder of its own"
                ) from error
            # a file system without locks

    def _check(self, file: IO[bytes]) -> int:
        """Count the rows of an older run; raise if the file is something else. End an unfinished line."""
        file.seek(0)
        count, last, is_first = 0, b"\n", True
        for line in file:
            if is_first and b'"normwise":"monitor"' not in line:
                raise ValueError(
                    f"{self.path} is no log of a monitor and is left as it is: give another folder"
                )
            is_first, last = False, line
            count += line.startswith(b'{"step":')
        if not last.endswith(b"\n"):
            file.write(b"\n")
        return count

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(_line(entry))
        self._file.flush()

    def _thin(self) -> None:
        """Drop every second row, not the last; the new file takes the old one's place at once."""
        assert self._file is not None
        seen = dropped = 0
        temporary = self.path.with_suffix(".jsonl.new")
        new = temporary.open("w+b")
        self._lock(new)
        self._file.seek(0)
        for line in self._file:
            if line.startswith(b'{"step":'):
                seen += 1
                if seen % 2 == 0 and seen < self._count:
                    dropped += 1
                    continue
            new.write(line)
        new.flush()
        temporary.replace(self.path)
        self._file.close()
        self._file = new
        self._count -= dropped


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
