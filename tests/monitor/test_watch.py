"""``normwise watch`` as a user has it: a terminal, a pipe, JSON, a file that grows, and what is no log."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.monitor import made_up

from normwise.monitor.log import Log
from normwise.monitor.terminal import line, lines, sparkline, summary
from normwise.monitor.watch import watch

COMMAND = [sys.executable, "-c", "from normwise.cli import main; main()", "watch"]


@pytest.mark.parametrize("layers", [1, 10, 300])
@pytest.mark.parametrize("width", [60, 80, 110])
def test_no_line_is_longer_than_the_terminal(tmp_path: Path, layers: int, width: int) -> None:
    made_up.write(tmp_path, layers, text="a.very.long.name.of.a.module." * (layers == 10))
    shown = list(lines(Log.open(tmp_path), width))
    assert max(len(text) for text, _ in shown) <= width
    assert len(shown) < 45  # 300 layers are grouped by pattern


def test_the_terminal_shows_findings_first_and_marks_their_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would break the title over two lines
    made_up.write(Path("log"))
    shown = list(lines(Log.open(Path("log")), 80))
    text = "\n".join(content for content, _ in shown)
    assert text.index("effective rate vanished") < text.index("turn/step")
    assert "→ plan.attach(optimizer)" in text
    assert "step 400 of 400" in text
    styles = {content.split()[0]: style for content, style in shown if content.startswith("blocks")}
    assert styles["blocks.0.attn.query"] == "red"
    assert styles["blocks.1.attn.key"] == ""


def test_once_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up.write(tmp_path)
    watch(tmp_path, once=True)
    assert "effective rate vanished" in capsys.readouterr().out
    watch(tmp_path, as_json=True)
    read = json.loads(capsys.readouterr().out)
    assert read["step"] == 400
    assert read["findings"][0]["kind"] == "effective rate vanished"
    assert read["layers"]["blocks.1.attn.key"]["norm"] == pytest.approx(1, rel=0.05)
    assert read["network"]["loss"] == pytest.approx(2, rel=0.1)
    assert read == summary(Log.open(tmp_path))


def test_in_a_pipe_a_line_for_each_row_also_over_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = made_up.write(tmp_path, rows=4)

    def begin_anew() -> None:
        tracker.begin({})
        tracker.log(30, {"normwise/loss": 2.5})

    happenings: list[Any] = [
        lambda: tracker.log(50, {"normwise/loss": 1.5}),
        lambda: None,
        lambda: tracker.finding(made_up.finding(50, ("blocks.0.attn.key",))),
        begin_anew,
        lambda: tracker.log(40, {"normwise/loss": 2.4}),
        tracker.close,
    ]
    watch(tmp_path, sleep=lambda _: happenings.pop(0)())
    out = capsys.readouterr().out.splitlines()
    steps = [text.split()[1] for text in out if text.startswith("step")]
    assert steps == ["10", "20", "30", "40", "50", "30", "40"]
    assert sum(text.startswith("! effective rate vanished") for text in out) >= 2
    assert "the job began anew from a checkpoint" in out
    assert out[-1] == "the job ended"


def test_a_row_as_a_line(tmp_path: Path) -> None:
    made_up.write(tmp_path, layers=3)
    text = line(Log.open(tmp_path), 0)
    assert text.startswith("step 10  loss 4.0")
    assert "turn 1" in text


def test_sparklines() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([3.0], 10) == "▄"
    assert sparkline([1.0, 10.0, 100.0], 3, log_scale=True) == "▁▅█"
    assert len(sparkline([float(k) for k in range(1000)], 20)) == 20


def test_a_log_without_rows(tmp_path: Path) -> None:
    made_up.write(tmp_path, rows=0)
    shown = [text for text, _ in lines(Log.open(tmp_path), 80)]
    assert shown[-1].startswith("no row yet")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_what_is_no_log_ends_in_one_line(tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path, "holds no monitor.jsonl: give the folder of"),
        (tmp_path / "nothing", "does not exist: give the folder of"),
    ):
        done = _run(str(folder), "--once")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    (tmp_path / "monitor.jsonl").write_bytes(b"\x00\x01\nnothing\n")
    done = _run(str(tmp_path), "--once")
    assert done.returncode == 2
    assert "is no log of a monitor" in done.stderr


def test_a_damaged_log_is_shown_and_the_damage_named(tmp_path: Path) -> None:
    tracker = made_up.write(tmp_path)
    with tracker.path.open("a") as file:
        file.write('{"step": 410, "val')
    assert _run(str(tmp_path), "--once").returncode == 0
    with tracker.path.open("a") as file:
        file.write("\n")
    done = _run(str(tmp_path), "--once")
    assert "1 line is damaged and left out (line 44 of monitor.jsonl)" in done.stdout


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    made_up.write(tmp_path)
    code = (
        "import sys; from normwise.monitor.watch import watch; from pathlib import Path; "
        f"watch(Path({str(tmp_path)!r}), once=True); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_live_in_a_terminal_until_the_job_ends(tmp_path: Path) -> None:
    tracker = made_up.write(tmp_path, rows=4)

    def end() -> None:
        tracker.log(50, {"normwise/loss": 1.25})
        tracker.close()

    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(  # in the folder, as a long path would break the title over two lines
        [*COMMAND, "."], stdout=slave, stderr=slave, env=environment, cwd=tmp_path
    )
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 40
    sent = False
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        if b"step 40" in seen and not sent:
            sent = True
            threading.Timer(0.1, end).start()
    try:
        process.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert process.returncode == 0
    assert b"effective rate vanished" in seen
    assert b"step 50" in seen
    assert b"1.25" in seen
