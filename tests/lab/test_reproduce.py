from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.lab.small import budget
from tests.pages import made_up_results

from normwise.cli import _lines, main
from normwise.lab.claims import claims_named
from normwise.lab.claims.budget import Budget, seeds_from
from normwise.lab.claims.finished_runs import StoredRuns
from normwise.lab.engine.execution import HERE, Outcome
from normwise.lab.engine.store import Store
from normwise.lab.reproduce import execute_all, rebuild_report, reproduce


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The budget of a second, and no figures for a paper, which take longer."""
    real = Budget.of

    def of(name: str, data: str, fingerprint: str, seeds: str | int | None = None) -> Budget:
        real(name, data, fingerprint, seeds)  # its checks
        return budget(seeds=(0, 1) if seeds is None else seeds_from(seeds))

    monkeypatch.setattr(Budget, "of", of)
    with made_up_results.without_figures():
        yield


def _run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["normwise", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.usefixtures("small")
def test_reproduce_leaves_runs_results_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--data", "digits", "--out", str(out), "--jobs", "1", "--offline"]
    claims = ["effective-learning-rate", "initialization"]
    arguments = ["reproduce", *claims, *options, "--json"]
    assert _run(*arguments, monkeypatch=monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert printed == results
    assert set(results["claims"]) == set(claims)
    for claim in results["claims"].values():
        assert claim["verdict"] in ("reproduced", "partly", "undecided", "not reproduced")
        assert claim["headline"]
        assert claim["changes"]
        for identity in claim["runs"]["identities"]:
            folder = out / "runs" / identity
            assert {path.name for path in folder.iterdir()} == {
                "config.json",
                "metrics.jsonl",
                "summary.json",
            }
    assert results["claims"]["effective-learning-rate"]["verdict"] == "reproduced"
    assert "What was found" in (out / "report.html").read_text(encoding="utf-8")

    # again, another claim selection: nothing is repeated and nothing is lost
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    assert _run("reproduce", "initialization", *options, monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    assert "all runs are done already" in captured.err
    assert "initialization" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 80
    assert len(captured.out.splitlines()) == len(claims) + 1  # a line for each claim, and what the signs mean
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")} == stamps
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert again["claims"] == results["claims"]

    # compared with itself it agrees; with another it does not, and says so by its exit code too
    reference = tmp_path / "reference"
    reference.mkdir()
    compared = [*arguments[:1], "initialization", *arguments[1:-1], "--compare", str(reference)]
    (reference / "results.json").write_text(json.dumps(again), encoding="utf-8")
    assert _run(*compared, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert f"Comparedwith{reference}:agrees." in "".join(said.split())  # the path is broken over lines
    assert max(len(line) for line in said.splitlines()) <= 80
    for gain in again["claims"]["initialization"]["statistics"]["weight_norm"]["advantage_over_L2"].values():
        for key in ("mean", "low", "high"):
            gain[key] += 1e6
    (reference / "results.json").write_text(json.dumps(again), encoding="utf-8")
    assert _run(*compared, "--json", monkeypatch=monkeypatch) == 1
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison == json.loads((out / "results.json").read_text(encoding="utf-8"))["comparison"]
    assert [comparison["agrees"], comparison["claims"]["initialization"]["agrees"]] == [False, False]
    # an earlier comparison does not stay with results that were not compared
    assert _run(*arguments, monkeypatch=monkeypatch) == 0
    assert "comparison" not in json.loads(capsys.readouterr().out)

    page = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    assert _run("report", str(out), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    rebuilt = (out / "report.html").read_text(encoding="utf-8")
    assert rebuilt == page

    (out / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is damaged .*: delete it and repeat"):
        rebuild_report(out)


_JOB = """
from pathlib import Path
import sys
from tests.lab.small import budget
from normwise.lab.claims.budget import Budget, seeds_from
from normwise.lab.reproduce import reproduce
Budget.of = lambda *_: budget()
reproduce(["under-fitting"], out=Path(sys.argv[1]), data="digits", jobs=2)
"""


@pytest.mark.usefixtures("small")
def test_an_interrupted_job_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    write = Store.write_run

    def stops(self: Store, *run: Any) -> None:
        write(self, *run)
        if len(list(stopped.glob("runs/*/summary.json"))) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_run", stops)
        with pytest.raises(KeyboardInterrupt):
            reproduce(["effective-learning-rate"], out=stopped, data="digits")
    before = {path: path.stat().st_mtime_ns for path in stopped.glob("runs/*/summary.json")}
    assert len(before) == 3
    assert not (stopped / "results.json").exists()
    resumed = reproduce(["effective-learning-rate"], out=stopped, data="digits")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert resumed["claims"] == reproduce(["effective-learning-rate"], out=whole, data="digits")["claims"]


def test_the_time_left_of_a_resumed_job_is_that_of_the_runs_that_are_missing(tmp_path: Path) -> None:
    budget = Budget.of("large", "fashion-mnist", "")
    claims = [claim(budget) for claim in claims_named(["under-fitting", "no-tuning"], "large")]
    store = Store(tmp_path)
    left: list[float] = []
    summary = {"status": "finished", "seconds": 1.0, "validation_accuracy": 0.5}
    workers = replace(HERE, task=lambda *_: Outcome([], dict(summary)))

    def execute() -> None:
        execute_all(claims, store, workers, lambda line: None, lambda done, total, time: left.append(time))

    first = {run.identity: run for claim in claims for run in claim.runs()}
    execute()
    later = sum(claim.second_cost() for claim in claims)
    assert left[0] == pytest.approx(sum(run.cost for run in first.values()) + later)
    second = {run.identity: run for claim in claims for run in claim.second_runs(StoredRuns(store))}
    only_first = next(run for run in claims[0].runs() if run.identity not in second)  # and chooses nothing
    only_second = next(run for identity, run in second.items() if identity not in first)
    both = next(run for identity, run in second.items() if identity in first)
    for lost in ([], [only_first], [only_second], [both], [only_first, only_second, both]):
        for run in lost:
            shutil.rmtree(store.run_folder(run))
        left.clear()
        execute()
        assert left[0] == pytest.approx(sum(run.cost for run in lost))


@pytest.mark.parametrize("name", ["generalization", "shrink", "migration", "what-to-decay", "no-tuning"])
def test_second_runs_need_the_first_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        claims_named([name], "quick")[0](budget()).second_runs(StoredRuns(Store(tmp_path)))


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
def test_a_killed_job_goes_on_where_it_was(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    job = subprocess.Popen([sys.executable, "-c", _JOB, str(killed)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while len(list(killed.glob("runs/*/summary.json"))) < 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, "the job ended before it could be killed"
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    # its worker processes may still finish the runs that they had begun
    before = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/summary.json")}
    assert not (killed / "results.json").exists()
    resumed = reproduce(["under-fitting"], out=killed, data="digits")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    uninterrupted = reproduce(["under-fitting"], out=whole, data="digits")
    assert resumed["claims"] == uninterrupted["claims"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gravity"], "claim 'gravity' is not known: choose from "),
        (["--data", "imagenet"], "--data imagenet is not known: choose from fashion-mnist, digits"),
        (["--budget", "endless"], "--budget endless is not known: choose from quick, full, large, paper"),
        (["--seeds", "1"], "--seeds 1 is not possible: give their number, 2"),
        (["--jobs", "0"], "--jobs 0 is not possible: give 1 or more"),
        (["--depth", "3"], "No such option: --depth"),
        (["--seeds", "many"], "--seeds many is not possible"),
        (["--seeds", "5-5"], "--seeds 5-5 is not possible"),
        (["--seeds", "900-1001"], "--seeds 900-1001 is not possible"),
    ],
)
def test_what_is_not_possible_is_said_in_a_line_with_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert _run("reproduce", "--out", str(out), *arguments, monkeypatch=monkeypatch) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert not out.exists()


@pytest.mark.usefixtures("small")
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for command in ("reproduce", "--data", "digits", "--out", str(tmp_path)), ("report", str(tmp_path)):
        assert _run(*command, monkeypatch=monkeypatch) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_data_are_an_error_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("normwise.lab.data.debian.installed_files", lambda *_: {}, raising=False)
    assert _run("reproduce", "--offline", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    assert "fashion-mnist" in capsys.readouterr().err


def test_the_time_left_does_not_jump(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with _lines() as line:
        line(0, 100, 600.0)
        assert "100 runs to do, about 10 min left" in capsys.readouterr().err
        said = []
        for done, left in enumerate((3600.0, 60.0, 3600.0, 60.0), start=1):  # estimates that jump
            now[0] += 30
            line(done, 100, left)
            said.append(float(capsys.readouterr().err.split("about ")[1].split()[0]))
        assert all(abs(one - other) <= 6 for one, other in pairwise(said))
        for done in range(5, 60):  # and settles on what stays
            now[0] += 1
            line(done, 100, 300.0)
        line(100, 100, 300.0)
        assert capsys.readouterr().err.endswith("100 of 100 runs, about 5 min left\n")


def test_a_line_is_printed_while_a_run_of_hours_is_in_progress(capfd: pytest.CaptureFixture[str]) -> None:
    with _lines(silence=0.2) as line:
        line(0, 3, 90_000.0)
        time.sleep(1.0)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "normwise: 3 runs to do, about 25.0 h left"
    assert len(said) > 1
    assert set(said[1:]) == {"normwise: 0 of 3 runs, about 25.0 h left"}


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; import normwise, normwise.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import normwise

    assert _run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip() == normwise.__version__


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here"),
        (OSError(28, "No space left on device", "x/y"), 2, "x/y: No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), 2, "the output was closed before its end"),
        (ValueError("two\nlines"), 2, "two lines"),
        (KeyError("status"), 2, "KeyError: 'status' (test_reproduce.py, line "),
        (MemoryError(), 2, "MemoryError"),
    ],
)
def test_a_command_ends_in_one_line_whatever_is_raised(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("normwise.lab.reproduce.reproduce", failing)
    assert _run("reproduce", monkeypatch=monkeypatch) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"normwise: {said}")


def test_sigterm_is_handled_as_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "normwise.lab.reproduce.reproduce", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert _run("reproduce", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == "normwise: stopped; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_an_output_that_is_full_is_exit_code_2(option: str) -> None:
    code = "from normwise.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, option], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["normwise: the output or a file: No space left on device"]
