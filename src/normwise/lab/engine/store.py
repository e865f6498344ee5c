"""The folder of results, with one folder for each run, named by the identity of the run.

OUT/normwise.json                marks the folder as one of normwise
OUT/runs/<hash>/config.json      the settings
OUT/runs/<hash>/metrics.jsonl    the metrics, one line for each time that the run logged
OUT/runs/<hash>/summary.json     the summary, the identity of the run and a digest of summary and metrics; it
                                 exists once the run is finished
OUT/runs/<hash>/failure.txt      the traceback of the last attempt, until an attempt succeeds
OUT/runs/<hash>/checkpoint.pt    the state of a long run in progress, until it is finished
OUT/results.json, report.html    the verdicts
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normwise.lab.engine.run import Metrics, Run

__all__ = ["CHECKPOINT", "MisfitError", "Store", "naming_errors", "write_atomically"]

CHECKPOINT = "checkpoint.pt"
_MARK_NAME = "normwise.json"
_UNFINISHED_MARK = re.compile(
    rf"\.{re.escape(_MARK_NAME)}\.\d+\.[0-9a-f]{{8}}"
)  # another process writes it, or died
_MARK = {"what": "a folder of normwise reproduce", "format": 1}


class MisfitError(ValueError):
    """The stored files of a run are not what the run has written. The message is one line."""


class Store:
    """The runs in a folder.

    Args:
        folder: A new or empty folder, or one that a Store created.

    Raises:
        ValueError: It is a file, is not writable, or holds something else. Nothing has been changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"--out {folder} is a file: give a folder")
            # The names come first: another process may be writing the mark.
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            marked = _is_marked(folder / _MARK_NAME)
            if not marked and not all(_UNFINISHED_MARK.fullmatch(name) for name in names):
                raise ValueError(
                    f"--out {folder} holds something that normwise did not write: give a new or empty folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _MARK_NAME, json.dumps(_MARK) + "\n")
            (folder / "runs").mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {folder} cannot be written to ({_reason(error)}): give another folder"
            ) from error

    def run_folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.identity

    def summary(self, run: Run) -> Metrics | None:
        """Return the summary of a run, or None if the run is not finished.

        Raises:
            MisfitError: There is a summary, but its files are damaged, changed, or of another run.
        """
        folder = self.run_folder(run)
        if not os.path.lexists(folder / "summary.json"):
            return None
        try:
            config, summary = _read_object(folder / "config.json"), _read_object(folder / "summary.json")
            metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8")
            identity, digest = summary.pop("identity", None), summary.pop("digest", None)
        except OSError as error:
            raise MisfitError(f"{error.filename} cannot be read ({_reason(error)})") from error
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets without end
            raise MisfitError(f"{folder} holds a damaged file ({error})") from error
        if identity != run.identity or config != json.loads(json.dumps(run.as_dict())):  # tuples become lists
            raise MisfitError(f"{folder} holds files of another run")
        if digest != _digest(run, metrics, summary):
            raise MisfitError(f"{folder} holds files that were changed")
        return summary

    def metrics(self, run: Run) -> list[Metrics]:
        """Return the lines of metrics of a finished run."""
        text = (self.run_folder(run) / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def write_run(self, run: Run, metrics: list[Metrics], summary: Metrics) -> None:
        """Write a finished run, the summary last.

        Raises:
            ValueError: The files cannot be written.
        """
        folder = self.run_folder(run)
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        origin = {"identity": run.identity, "digest": _digest(run, lines, summary)}
        with naming_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.json", json.dumps(run.as_dict(), indent=1) + "\n")
            write_atomically(folder / "metrics.jsonl", lines)
            write_atomically(folder / "summary.json", json.dumps(origin | summary, indent=1) + "\n")
            for name in ("failure.txt", CHECKPOINT):
                (folder / name).unlink(missing_ok=True)

    def write_failure(self, run: Run, text: str) -> None:
        """Write the error of a failed attempt. The run does not count as finished.

        Raises:
            ValueError: The file cannot be written.
        """
        folder = self.run_folder(run)
        with naming_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "failure.txt", text.rstrip() + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears complete or not at all, even if two processes write it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system into one that names its file, or ``path`` if the system names none.

    Raises:
        ValueError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename or path
        raise ValueError(
            f"{file} cannot be written ({_reason(error)}): give the same command again once it can, and it "
            "goes on from here"
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _digest(run: Run, metrics: str, summary: Metrics) -> str:
    """Return the SHA-256 (hexadecimal) of a finished run: its identity, its lines of metrics, its summary."""
    content = json.dumps([run.identity, metrics, json.loads(json.dumps(summary))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _is_marked(mark: Path) -> bool:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("what") == _MARK["what"]
