"""The file that :class:`normwise.trackers.JSONL` writes, as others read it: also while it grows.

Every line is a JSON object of one of five kinds: the beginning of a run, the names of the values that follow,
a row, a finding, the end of a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normwise.monitor.finding import KINDS, Finding

__all__ = ["FILE", "FORMAT", "Log", "decoded", "encoded"]

FILE = "monitor.jsonl"
FORMAT = 1
_TAIL = 200
_FINDING = {"kind": str, "since": int, "step": int, "evidence": str, "remedy": str, "ended": bool}


def encoded(value: float) -> float | str | None:
    """Return a number with six digits as JSON has it: None for NaN, "inf" and "-inf" as text."""
    if math.isfinite(value):
        return float(f"{value:.6g}")
    return None if math.isnan(value) else "inf" if value > 0 else "-inf"


def decoded(value: object) -> float:
    """Return the number that :func:`encoded` wrote.

    Raises:
        ValueError: It is no such number.
    """
    if value is None:
        return math.nan
    if isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{value!r:.20} is no number")


@dataclass
class Log:
    """What a folder's monitor has logged so far.

    Attributes:
        path: The file.
        settings: What the last run said of itself.
        steps: The steps of the rows, increasing.
        rows: {name: number} for each of them.
        findings: The last statement about each finding that is still present, by kind.
        past: All statements about findings, in order.
        damaged: The numbers of lines that cannot be read.
        restarts: How often the job began anew.
        rewound: The first steps of those that a job has gone through again.
        ended: Whether the job said that it ended.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    past: list[Finding] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    restarts: int = 0
    rewound: list[int] = field(default_factory=list)
    ended: bool = False
    _position: int = 0
    _line: int = 0
    _identity: Any = None
    _names: list[str] = field(default_factory=list)
    _begun: bool = False
    _tail: bytes = b""  # the last bytes before the position

    @classmethod
    def open(cls, folder: str | Path) -> Log:
        """Read the log in a folder.

        Raises:
            ValueError: There is none.
        """
        folder = Path(folder)
        path = folder / FILE
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}: give the folder of nw.trackers.JSONL(folder)")
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {FILE}: give the folder of nw.trackers.JSONL(folder), once the first "
                "step is taken"
            )
        log = cls(path)
        log.update()
        if not log._begun:
            raise ValueError(f"{path} is no log of a monitor: give the folder of nw.trackers.JSONL(folder)")
        return log

    def update(self) -> bool:
        """Read what has been written since; return whether anything was.

        The file is read anew if it was replaced, as thinning does. A last line without an end is left for
        the next time.
        """
        status = self.path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity or status.st_size < self._position or not self._goes_on():
            fresh = Log(self.path)
            self.__dict__.update(fresh.__dict__)
            self._identity = identity
        if status.st_size == self._position:
            return False
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read(status.st_size - self._position)
        end = data.rfind(b"\n") + 1
        for line in data[:end].split(b"\n")[:-1]:
            self._line += 1
            if line.strip():
                self._take(line)
        self._position += end
        self._tail = (self._tail + data[:end])[-_TAIL:]
        return end > 0

    def _goes_on(self) -> bool:
        """Whether the file still has what was read last: a new file may have the number of the old one."""
        with self.path.open("rb") as file:
            file.seek(self._position - len(self._tail))
            return file.read(len(self._tail)) == self._tail

    @property
    def unfinished(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self.path.stat().st_size > self._position

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
            self._enter(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged.append(self._line)

    def _enter(self, entry: Mapping[str, Any]) -> None:
        if "normwise" in entry:
            if entry["normwise"] != "monitor" or entry.get("format") != FORMAT:
                raise ValueError("of another program or version")
            self.restarts += self._begun
            self._begun, self.ended = True, False
            settings = entry.get("settings", {})
            self.settings = dict(settings) if isinstance(settings, dict) else {}
        elif "names" in entry:
            if not all(isinstance(name, str) for name in entry["names"]):
                raise ValueError("names must be text")
            self._names = list(entry["names"])
        elif "values" in entry:
            step, values = _whole(entry["step"]), [decoded(value) for value in entry["values"]]
            if len(values) != len(self._names):
                raise ValueError("another number of values than of names")
            self._rewind(step)
            self.steps.append(step)
            self.rows.append(dict(zip(self._names, values, strict=True)))
        elif "finding" in entry:
            self._enter_finding(_finding(entry["finding"]))
        elif "end" in entry:
            self.ended = True
        else:
            raise ValueError("an unknown kind of line")

    def _rewind(self, step: int) -> None:
        """Forget what a job that began anew from a checkpoint goes through again."""
        if not self.steps or self.steps[-1] < step:
            return
        self.rewound.append(step)
        kept = sum(one < step for one in self.steps)
        del self.steps[kept:], self.rows[kept:]
        past = [finding for finding in self.past if finding.step < step]
        self.past, self.findings = [], {}
        for finding in past:
            self._enter_finding(finding)

    def _enter_finding(self, finding: Finding) -> None:
        self.past.append(finding)
        if finding.ended:
            self.findings.pop(finding.kind, None)
        else:
            self.findings[finding.kind] = finding

    # -- what is in the rows -------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in the order of the model."""
        named = self.settings.get("layers")
        known = list(named) if isinstance(named, dict) else []
        found = {name.split("/", 2)[2]: None for row in self.rows[-1:] for name in row if _is_layers(name)}
        return [
            *known,
            *(name for name in found if name not in known and name.rpartition("/")[0] not in known),
        ]

    def present(self) -> list[Finding]:
        """The findings that are present, in the order of their kinds."""
        order = list(KINDS)
        return sorted(self.findings.values(), key=lambda f: order.index(f.kind) if f.kind in order else 99)

    def series(self, quantity: str, layer: str = "") -> Iterator[float]:
        """Yield a quantity over the rows; NaN where it was not logged."""
        name = f"normwise/{quantity}/{layer}" if layer else f"normwise/{quantity}"
        return (row.get(name, math.nan) for row in self.rows)

    def last(self, quantity: str, layer: str = "") -> float:
        """Return the last value of a quantity; NaN if there is none."""
        name = f"normwise/{quantity}/{layer}" if layer else f"normwise/{quantity}"
        return self.rows[-1].get(name, math.nan) if self.rows else math.nan

    def notes(self) -> list[str]:
        """Say what the reader should know of the file: damage, restarts."""
        notes = []
        if self.damaged:
            lines = ", ".join(map(str, self.damaged[:3])) + (", …" if len(self.damaged) > 3 else "")
            count = len(self.damaged)
            some = "line is" if count == 1 else "lines are"
            notes.append(f"{count} {some} damaged and left out (line {lines} of {self.path.name})")
        if self.restarts:
            notes.append(f"the job began anew {self.restarts} time{'s' if self.restarts > 1 else ''}")
        return notes


def _is_layers(name: str) -> bool:
    return name.count("/") >= 2 and not name.startswith("normwise/balance/")


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"step {value!r:.20}")
    return value


def _finding(entry: Mapping[str, Any]) -> Finding:
    fields = {name: entry[name] for name in _FINDING}
    layers = entry["layers"]
    if not all(type(fields[name]) is kind for name, kind in _FINDING.items()):
        raise ValueError("a finding with a value of another type")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ValueError("layers must be text")
    return Finding(layers=tuple(layers), **fields)
