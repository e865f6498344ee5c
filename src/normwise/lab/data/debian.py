"""Debian's package of a data set: the installed one, or one downloaded by apt without being root."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from normwise.lab.data.source import DataError, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_APT_OPTIONS = ["-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
_APT_SECONDS = 900.0  # 31 MB over a slow line
_QUICK_SECONDS = 60.0  # for commands that only read or unpack local files


def installed_files(source: Source) -> dict[str, Path]:
    """Where the installed package has each file of ``source``; empty if it is not installed or lacks one."""
    if shutil.which("dpkg") is None:
        return {}
    try:
        listed = _run(["dpkg", "-L", source.package], Path("/"), _QUICK_SECONDS)
    except DataError:
        return {}
    by_name = {Path(line).name: Path(line) for line in listed.splitlines()}
    files = {file.name: by_name[file.name] for file in source.files if file.name in by_name}
    return files if len(files) == len(source.files) else {}


def download_package(source: Source, work: Path, announce: Callable[[str], None]) -> Path:
    """Download and unpack the package with ``apt-get`` and ``dpkg-deb``.

    The system's package lists are tried first. Where they are empty or stale, and not ours to update,
    apt is given lists of its own under ``work``: same repositories, same keys, nothing of the system changed.

    Args:
        source: names the package.
        work: an empty folder for the download; the caller removes it.
        announce: is called with a line where lists have to be fetched.

    Returns:
        The folder that holds what the package would install.

    Raises:
        DataError: a command is missing, fails or takes too long; with the last line that it wrote.
    """
    for command in ("apt-get", "dpkg-deb"):
        if shutil.which(command) is None:
            raise DataError(f"there is no {command} here")
    try:
        _run(["apt-get", *_APT_OPTIONS, "download", source.package], work, _APT_SECONDS)
    except DataError as error:
        announce(f"{source.name}: {error}; fetching package lists for this download only")
        _download_with_own_lists(source, work)
    packages = sorted(work.glob("*.deb"))
    if len(packages) != 1:
        raise DataError(f"apt-get download left {len(packages)} packages, expected one")
    unpacked = work / "unpacked"
    _run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], work, _QUICK_SECONDS)
    return unpacked


def _download_with_own_lists(source: Source, work: Path) -> None:
    """``apt-get download`` where the system's package lists are empty or stale, and not ours to update."""
    lists, cache = work / "lists", work / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "Acquire::Languages=none"]
    update_error: DataError | None = None
    try:
        _run(["apt-get", *_APT_OPTIONS, *own, "update"], work, _APT_SECONDS)
    except DataError as error:
        update_error = error  # one broken repository among several makes it fail, and does not matter
    try:
        _run(["apt-get", *_APT_OPTIONS, *own, "download", source.package], work, _APT_SECONDS)
    except DataError as error:
        raise (update_error or error) from error


def unpack(package: Path, name: str) -> bytes:
    """Content of the file called ``name`` in a Debian package, read without Debian's tools.

    A package is an ``ar`` archive: after 8 bytes, members of a 60-byte header (name, …, size in decimal) and
    a body that is padded to an even length. One of them, data.tar.xz, is a tar archive of all files.

    Raises:
        DataError: it is no such package, or holds no such file.
    """
    content = package.read_bytes()
    start = 8
    while content[:8] == b"!<arch>\n" and start + 60 <= len(content):
        header = content[start : start + 60]
        size = int(header[48:58]) if header[48:58].strip().isdigit() else len(content)
        start += 60
        if header[:16].rstrip(b" /") == b"data.tar.xz":
            return _from_tar(content[start : start + size], package, name)
        start += size + size % 2
    raise DataError(f"{package} is no Debian package with a data.tar.xz")


def _from_tar(packed: bytes, package: Path, name: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
            for member in archive:
                if member.isfile() and Path(member.name).name == name:
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a file
                    return stream.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{package} is damaged: {error}") from error
    raise DataError(f"the package holds no {name}")


def _run(arguments: Sequence[str], directory: Path, seconds: float) -> str:
    """Output of a command. A failure is a DataError with the last line that the command wrote."""
    command = " ".join([arguments[0], *(a for a in arguments[1:] if a in ("download", "update", "-x", "-L"))])
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
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{command} took more than {seconds:.0f} s") from None
    except OSError as error:
        raise DataError(f"{command} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise DataError(f"{command}: {lines[-1]}")
    return done.stdout
