"""A made-up data set, a web site that has it, and stand-ins for Debian's commands."""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_RANDOM = np.random.default_rng(0)
CONTENTS = {
    "images.gz": bytes([0, 0, 8, 3, 0, 0, 0, 50, 0, 0, 0, 20, 0, 0, 0, 20]) + _RANDOM.bytes(20000),
    "labels.gz": bytes([0, 0, 8, 1, 0, 0, 0, 50]) + _RANDOM.bytes(50),
}
PACKED = {name: gzip.compress(content, mtime=1) for name, content in CONTENTS.items()}


@dataclass
class Site:
    """What a local web server does, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(PACKED))
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # name, Range
    ranges: bool = True
    wrong_range: bool = False
    break_off: list[int] = field(default_factory=list)  # bytes to send before hanging up, per request
    lengths: bool = True


def put_command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def put_debian(commands: Path, files: dict[str, bytes], apt: str = "touch made-up_1_all.deb") -> Path:
    """Stand-ins for apt-get (``apt`` is its script) and dpkg-deb, for a package that holds ``files``."""
    package = commands.parent / "package"
    (package / "usr" / "share").mkdir(parents=True)
    for name, content in files.items():
        (package / "usr" / "share" / name).write_bytes(content)
    put_command(commands, "apt-get", f'echo "$@" >> {commands}/asked\n{apt}')
    put_command(commands, "dpkg-deb", f'[ "$1" = -x ] && [ -f "$2" ] && cp -r {package} "$3"')
    return commands / "asked"


def never(line: str) -> None:
    raise AssertionError(f"nothing should be announced, found {line!r}")


def ignore(line: str) -> None:
    pass


def put_cache(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
