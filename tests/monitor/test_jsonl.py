"""The JSONL tracker and the reader of its file: crash-safe, resumable, bounded, careful with other files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.monitor.common import BATCHES, network, plan_of, train
from torch.optim import SGD

import normwise as nw
from normwise.monitor.finding import Finding
from normwise.monitor.log import Log

FOUND = Finding("dead units", ("fc",), 2, 2, "fc: 1 of 4 units", "initialise them again")


def _written(folder: Path, steps: range = range(1, 5)) -> nw.trackers.JSONL:
    tracker = nw.trackers.JSONL(folder)
    tracker.begin({"every": 1, "layers": {"fc": "shrink"}})
    for step in steps:
        tracker.log(step, {"normwise/lr": 0.1, "normwise/norm/fc": 1 / 3, "normwise/rotation/fc": math.nan})
        if step == 2:
            tracker.finding(FOUND)
    return tracker


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tracker = _written(tmp_path / "deep" / "a")
    log = Log.open(tmp_path / "deep" / "a")
    assert log.steps == [1, 2, 3, 4]
    assert log.last("norm", "fc") == pytest.approx(1 / 3, rel=1e-6)
    assert math.isnan(log.last("rotation", "fc"))
    assert log.present() == [FOUND]
    assert log.layers == ["fc"]
    assert not log.ended
    tracker.log(5, {"normwise/lr": math.inf})  # other names
    assert log.update()
    assert log.rows[-1] == {"normwise/lr": math.inf}
    tracker.close()
    assert log.update()
    assert log.ended
    assert not log.update()


def test_a_line_cut_by_a_crash_is_left_out_and_the_next_run_goes_on(tmp_path: Path) -> None:
    tracker = _written(tmp_path)
    tracker._file.close()  # type: ignore[union-attr]
    path = tmp_path / "monitor.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    log = Log.open(tmp_path)
    assert (log.steps, log.damaged, log.unfinished) == ([1, 2, 3], [], True)
    _written(tmp_path, range(4, 6)).close()
    log = Log.open(tmp_path)
    assert log.steps == [1, 2, 3, 4, 5]
    assert log.restarts == 1
    assert log.notes() == [
        "1 line is damaged and left out (line 7 of monitor.jsonl)",
        "the job began anew 1 time",
    ]


def test_rows_that_are_gone_through_again_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    _written(tmp_path, range(1, 9)).close()
    again = nw.trackers.JSONL(tmp_path)
    again.begin({})
    again.log(5, {"normwise/norm/fc": 7.0})
    log = Log.open(tmp_path)
    assert log.steps == [1, 2, 3, 4, 5]
    assert log.last("norm", "fc") == 7.0
    assert log.present() == [FOUND]
    again.log(2, {"normwise/norm/fc": 7.0})
    log.update()
    assert log.steps == [1, 2]
    assert log.present() == []


def test_thinning_bounds_the_file_and_keeps_both_ends_and_findings(tmp_path: Path) -> None:
    tracker = nw.trackers.JSONL(tmp_path, max_rows=100)
    tracker.begin({})
    reader = None
    for step in range(1, 1001):
        tracker.log(step, {"normwise/norm/fc": float(step)})
        if step == 3:
            tracker.finding(FOUND)
            reader = Log.open(tmp_path)
    log = Log.open(tmp_path)
    assert len(log.steps) <= 100
    assert (log.steps[0], log.steps[-1]) == (1, 1000)
    assert log.steps == sorted(set(log.steps))
    assert [row["normwise/norm/fc"] for row in log.rows] == log.steps
    assert log.present() == [FOUND]
    assert [p.name for p in tmp_path.iterdir()] == ["monitor.jsonl"]
    assert reader is not None
    reader.update()  # it was open while the file was replaced
    assert reader.steps == log.steps


def test_two_monitors_on_one_folder(tmp_path: Path) -> None:
    tracker = _written(tmp_path)
    with pytest.raises(ValueError, match=r"another monitor writes to .*: give each run a folder of its own"):
        nw.trackers.JSONL(tmp_path).begin({})
    before = tracker.path.read_bytes()
    tracker.close()
    nw.trackers.JSONL(tmp_path).begin({})
    assert tracker.path.read_bytes().startswith(before)


@pytest.mark.parametrize("content", [b"notes\n", b'{"step": 1}\n', b"\x00\xff\xfe", b'["normwise"]\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "monitor.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no log of a monitor and is left as it is: give another folder"):
        nw.trackers.JSONL(tmp_path).begin({})
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="is no log of a monitor: give the folder of"):
        Log.open(tmp_path)


def test_folders_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no monitor\.jsonl: give the folder of"):
        Log.open(tmp_path)
    with pytest.raises(ValueError, match="does not exist: give the folder of"):
        Log.open(tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file: give the folder of"):
        Log.open(file)
    with pytest.raises(ValueError, match=r"cannot write there .*: give another folder"):
        nw.trackers.JSONL(file).begin({})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"step": "five", "values": []}',
        '{"step": 5, "values": [1, 2]}',
        '{"step": 5, "values": ["x", 1, 1]}',
        '{"finding": {"kind": 3}}',
        '{"names": [1]}',
        '{"else": 1}',
        '{"normwise": "monitor", "format": 99}',
        "\x00\x01",
    ],
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, line: str) -> None:
    tracker = _written(tmp_path)
    with tracker.path.open("a") as file:
        file.write(line + "\n")
    tracker.log(9, {"normwise/lr": 0.1, "normwise/norm/fc": 1.0, "normwise/rotation/fc": 1.0})
    log = Log.open(tmp_path)
    assert log.steps == [1, 2, 3, 4, 9]
    assert log.damaged == [8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "folder must be a path"),
        (("a", 5), "give 100 or more"),
        (("a", "b"), "max_rows must be a number"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        nw.trackers.JSONL(*arguments)


def test_a_monitor_writes_standard_json(tmp_path: Path) -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    tracker = nw.trackers.JSONL(tmp_path)
    monitor = nw.Monitor(optimizer, plan=plan, every=2, trackers=tracker)
    assert not tracker.path.exists()
    train(model, optimizer, BATCHES)
    monitor.remove()

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line in tracker.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    log = Log.open(tmp_path)
    assert log.steps == [1, 2, 4, 6, 8, 10, 12]
    assert log.layers == ["0", "3", "5"]
    assert log.settings["layers"] == {"0": "shrink", "3": "shrink", "5": "L2"} or log.settings["layers"]
    assert log.ended
