"""Getting the files of a data set: from the cache, from Debian's package, or from a web site.

Whatever the way, a file counts only if its content has the expected checksum, and it appears in the
cache under its name whole or not at all. Nothing here needs to be root.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import TYPE_CHECKING

from normwise.lab.data.debian import download_package, installed_files, unpack
from normwise.lab.data.download import download, part_of, store
from normwise.lab.data.source import DataError, Source, SourceFile, read_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Announce = Callable[[str], None]


def obtain(source: Source, directory: Path, *, offline: bool, announce: Announce) -> dict[str, bytes]:
    """Decompressed, verified content of every file of ``source``, fetched into ``directory`` if need be.

    Files in ``directory`` come first, then those of Debian's package if it is installed (used where they
    are), then the network: Debian's package through apt, then the web site of ``source``. A damaged file in
    ``directory`` is announced, and replaced only once a verified one is there to replace it.

    Args:
        source: what is wanted.
        directory: folder of the cache that holds the files; made if it does not exist.
        offline: forbids the network.
        announce: is called with one line for each thing that a user should know.

    Returns:
        The content by file name.

    Raises:
        DataError: a file is missing or damaged and could not be fetched, or must not be (``offline``).
    """
    cached = {file.name: directory / file.name for file in source.files}
    contents, problems = _read_all(source, cached)
    if not problems:
        return contents
    installed = installed_files(source)
    if installed:
        contents, package_problems = _read_all(source, installed)
        if not package_problems:
            _announce_damage(cached, problems, announce)
            folder = next(iter(installed.values())).parent
            announce(f"{source.name}: using the installed Debian package {source.package}, in {folder}")
            return contents
        announce(f"{source.name}: the installed Debian package is not used: {_first(package_problems)}")
    if offline:
        raise DataError(f"{_first(problems)}; run again without --offline, or {source.remedy(directory)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory, source, announce):
            contents, problems = _read_all(source, cached)  # another process may have fetched them by now
            if problems:
                _announce_damage(cached, problems, announce)
                _fetch(source, directory, announce)
                contents, problems = _read_all(source, cached)
    except OSError as error:
        raise DataError(
            f"{source.name} cannot be stored in {directory}: {error.strerror or error}; name a folder that "
            "can be written in the environment variable NORMWISE_CACHE"
        ) from error
    if problems:  # only if something else changes the cache at the same time
        raise DataError(f"{_first(problems)}; run again, or {source.remedy(directory)}")
    return contents


def _read_all(source: Source, paths: Mapping[str, Path]) -> tuple[dict[str, bytes], dict[str, DataError]]:
    contents: dict[str, bytes] = {}
    problems: dict[str, DataError] = {}
    for file in source.files:
        try:
            contents[file.name] = read_content(paths[file.name], file)
        except DataError as error:
            problems[file.name] = error
    return contents, problems


def _first(problems: Mapping[str, DataError]) -> DataError:
    return next(iter(problems.values()))


def _announce_damage(
    cached: Mapping[str, Path], problems: Mapping[str, DataError], announce: Announce
) -> None:
    for name, problem in problems.items():
        if cached[name].exists():
            announce(f"{problem}; it is not used")


def _fetch(source: Source, directory: Path, announce: Announce) -> None:
    """Put every file that is not good yet into ``directory``."""
    size = f"{source.download_size / 1e6:.1f} MB"
    started = time.monotonic()
    announce(
        f"{source.name}: fetching Debian's package {source.package}, {size}, with apt-get to {directory}"
    )
    try:
        _fetch_package(source, directory, announce)
    except DataError as apt_error:
        announce(f"{source.name}: not from Debian ({apt_error})")
        announce(f"{source.name}: fetching up to {size} from {source.url} to {directory}")
        try:
            _fetch_from_site(source, directory)
        except DataError as site_error:
            raise DataError(
                f"{source.name} could not be fetched, neither as Debian's package ({apt_error}) nor from its "
                f"site ({site_error}); run again when the network is back, or {source.remedy(directory)}"
            ) from site_error
    announce(f"{source.name}: fetched and verified in {time.monotonic() - started:.0f} s")


def _fetch_from_site(source: Source, directory: Path) -> None:
    """Download the files one by one, or the package that holds them, which is then unpacked without apt."""
    if source.package_file is None:
        for file in _not_good(source, directory):
            download(source.url + file.name, directory / file.name, file)
        return
    package = directory / source.package_file.name
    try:
        download(source.url, package, source.package_file)
        for file in _not_good(source, directory):
            part = part_of(directory / file.name)
            part.write_bytes(unpack(package, file.name))
            store(part, directory / file.name, file)
    finally:
        package.unlink(missing_ok=True)


def _fetch_package(source: Source, directory: Path, announce: Announce) -> None:
    work = directory / ".apt"
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed: the lock is ours
    work.mkdir()
    try:
        unpacked = download_package(source, work, announce)
        for file in _not_good(source, directory):
            path = next(iter(sorted(unpacked.rglob(file.name))), None)
            if path is None:
                raise DataError(f"the package holds no {file.name}")
            store(path, directory / file.name, file)
            part_of(directory / file.name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _not_good(source: Source, directory: Path) -> list[SourceFile]:
    _, problems = _read_all(source, {file.name: directory / file.name for file in source.files})
    return [file for file in source.files if file.name in problems]


@contextlib.contextmanager
def _lock(directory: Path, source: Source, announce: Announce) -> Iterator[None]:
    """Let one process at a time fetch into ``directory``.

    The operating system frees the lock when its holder ends in any way. Where it has no such locks
    (Windows), two processes may fetch the same files; each file is verified all the same.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (directory / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"{source.name}: waiting for another process that is fetching it to {directory}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
