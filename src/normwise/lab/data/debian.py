"""The Debian package of a data set: installed, or downloaded with apt without root privileges."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from normwise.lab.data.source import DataError, Source

__all__ = ["download_package", "installed_files"]

_APT = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
_SECONDS = 900.0  # enough for 31 MB over a slow line


def installed_files(source: Source) -> dict[str, Path]:
    """Return the path of each file in the installed package; empty if it is not installed or lacks a file."""
    try:
        listed = _run(["dpkg", "-L", source.package], Path("/"))
    except DataError:
        return {}
    paths = {Path(line).name: Path(line) for line in listed.splitlines()}
    files = {file.name: paths[file.name] for file in source.files if file.name in paths}
    return files if len(files) == len(source.files) else {}


def download_package(source: Source, work: Path, announce: Callable[[str], None]) -> Path:
    """Download and unpack the package with ``apt-get download`` and ``dpkg-deb -x``.

    If that fails with the package lists of the system, apt fetches lists into ``work`` and tries again. The
    repositories and keys are those of the system, which is not changed.

    Args:
        source: Names the package.
        work: An empty folder, which the caller removes.
        announce: Called with a line if package lists must be fetched.

    Returns:
        The folder that holds the unpacked files.

    Raises:
        DataError: A command is missing, fails or takes too long. The message ends with the last line of its
            output.
    """
    try:
        _run([*_APT, "download", source.package], work)
    except DataError as error:
        announce(f"{source.name}: {error}; fetching package lists for this download only")
        (work / "lists" / "partial").mkdir(parents=True)
        (work / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
        update_error = None
        try:
            _run([*_APT, *private, "-o", "Acquire::Languages=none", "update"], work)
        except DataError as failed:
            update_error = failed  # a single broken repository makes it fail, which may not matter
        try:
            _run([*_APT, *private, "download", source.package], work)
        except DataError as failed:
            raise (update_error or failed) from failed
    packages = sorted(work.glob("*.deb"))
    if len(packages) != 1:
        raise DataError(f"apt-get download left {len(packages)} packages, expected one")
    _run(["dpkg-deb", "-x", str(packages[0]), str(work / "unpacked")], work)
    return work / "unpacked"


def _run(arguments: Sequence[str], directory: Path) -> str:
    """Return the output of a command. A failure is a DataError with the last line of its output."""
    command = " ".join([arguments[0], *(a for a in arguments if a in ("download", "update", "-x", "-L"))])
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            arguments,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise DataError(f"there is no {arguments[0]} here") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{command} took more than {_SECONDS:.0f} s") from None
    except OSError as error:
        raise DataError(f"{command} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise DataError(f"{command}: {lines[-1]}")
    return done.stdout
