"""The folder of results, with one folder for each run, named by the identity of the run.

OUT/normwise.json                marks the folder as one of normwise
OUT/runs/<hash>/config.json      the settings
OUT/runs/<hash>/metrics.jsonl    the metrics, one line for each time that the run logged
OUT/runs/<hash>/summary.json     the summary; it exists once the run is finished
OUT/runs/<hash>/failure.txt      the traceback of the last attempt, until an attempt succeeds
OUT/results.json, report.html    the verdicts
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from normwise.lab.engine.run import Run

__all__ = ["Store", "write_atomically"]

_MARK = {"what": "a folder of normwise reproduce", "format": 1}


class Store:
    """The runs in a folder.

    Args:
        folder: A new or empty folder, or one that a Store created.

    Raises:
        ValueError: It is a file, is not writable, or holds something else. Nothing has been changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mark = folder / "normwise.json"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file: give a folder")
        try:
            if folder.is_dir() and any(folder.iterdir()) and not _is_marked(mark):
                raise ValueError(
                    f"--out {folder} holds something that normwise did not write: give a new or empty folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(mark, json.dumps(_MARK) + "\n")
        except OSError as error:
            raise ValueError(
                f"--out {folder} cannot be written to ({error.strerror}): give another folder"
            ) from error

    @classmethod
    def existing(cls, folder: Path) -> Store:
        """Open a folder that a Store created; raise ValueError for any other."""
        if not _is_marked(folder / "normwise.json"):
            raise ValueError(f"{folder} is not a folder of results: give the --out of a normwise reproduce")
        return cls(folder)

    def run_folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.identity

    def summary(self, run: Run) -> dict[str, Any] | None:
        """Return the summary of a run, or None if it is not finished or its files are damaged."""
        folder = self.run_folder(run)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        # JSON turns tuples into lists
        same = config == json.loads(json.dumps(run.as_dict()))
        return summary if same and isinstance(summary, dict) and "status" in summary else None

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        """Return the lines of metrics of a finished run."""
        text = (self.run_folder(run) / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def write_run(self, run: Run, metrics: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Write a finished run, the summary last."""
        folder = self.run_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(run.as_dict(), indent=1) + "\n")
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        (folder / "failure.txt").unlink(missing_ok=True)

    def write_failure(self, run: Run, text: str) -> None:
        """Write the error of a failed attempt. The run does not count as finished."""
        folder = self.run_folder(run)
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


def _is_marked(mark: Path) -> bool:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("what") == _MARK["what"]
