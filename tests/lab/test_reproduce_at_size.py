"""``normwise reproduce --budget large``, from the command line, with networks that are trained in no time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.sized import sized_budget
from tests.pages import made_up_results

from normwise import cli
from normwise.lab.claims.budget import Budget
from normwise.lab.claims.networks import Networks
from normwise.lab.reproduce import reproduce
from normwise.lab.runs import checkpoint, network
from normwise.lab.runs.devices import Execution

pytest.importorskip("lightning")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large, with twelve runs for under-fitting; and no figures for a paper."""
    real, small = Budget.of, sized_budget()
    few = replace(small, sized=Networks(small.networks.whole, small.networks.sweep, {}))

    def of(name: str, data: str, of_data: str, seeds: str | int | None = None) -> Budget:
        made = real(name, data, of_data, seeds)
        return few if name == "large" else made

    monkeypatch.setattr(Budget, "of", of)
    with made_up_results.without_figures():
        yield


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["normwise", "reproduce", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.usefixtures("tiny")
def test_a_killed_job_goes_on_within_a_run_and_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["under-fitting", "--budget", "large", "--data", "digits", "--jobs", "1", "--offline", "--json"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(monkeypatch, *options, "--out", str(whole)) == 0
    expected = json.loads(capsys.readouterr().out)["claims"]["under-fitting"]
    assert expected["protocol"]["budget"] == "large"
    assert "all 64 images of digits" in expected["protocol"]["experiments"]
    assert expected["runs"]["count"] == 12
    assert expected["changes"] == []  # those of the small networks are not its own
    assert "--budget large" in (whole / "report.html").read_text("utf-8")

    saved = checkpoint.save_checkpoint

    def stops(*arguments: Any) -> None:
        saved(*arguments)
        if len(list(stopped.glob("runs/*/summary.json"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(network, "save_checkpoint", stops)
        assert command(patch, *options, "--out", str(stopped)) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert len(list(stopped.glob("runs/*/checkpoint.pt"))) == 1

    found = list[int]()
    loaded = checkpoint.load_checkpoint

    def spy(*arguments: Any) -> Any:
        state = loaded(*arguments)
        found.append(0 if state is None else state["step"])
        return state

    with monkeypatch.context() as patch:
        patch.setattr(network, "load_checkpoint", spy)
        assert command(patch, *options, "--out", str(stopped)) == 0
    assert len(found) == 10  # two were finished
    assert sorted(found)[-2:] == [0, 2]  # and one went on from the end of its first epoch
    resumed = json.loads(capsys.readouterr().out)["claims"]["under-fitting"]
    assert resumed["statistics"] == expected["statistics"]
    assert resumed["runs"] == expected["runs"]
    assert not list(stopped.glob("runs/*/checkpoint.pt"))


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_of_other_settings_stops_the_job_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "under-fitting",
        "--budget",
        "large",
        "--data",
        "digits",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]

    def stops(*arguments: Any) -> None:
        saved(*arguments)
        raise KeyboardInterrupt

    saved = checkpoint.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(network, "save_checkpoint", stops)
        assert command(patch, *options) == 130
    capsys.readouterr()
    monkeypatch.setattr(
        "normwise.lab.reproduce.Execution", lambda device: Execution(device, channels_last=False)
    )
    assert command(monkeypatch, *options) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " failed: " in line)
    assert "is of other settings: execution is " in line
    assert "or delete it to start again" in line


@pytest.mark.thorough
@pytest.mark.usefixtures("tiny")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    made = {
        jobs: reproduce(
            ["under-fitting"],
            out=tmp_path / str(jobs),
            data="digits",
            budget="large",
            jobs=jobs,
            offline=True,
        )
        for jobs in (1, 2)
    }
    one, two = (made[jobs]["claims"]["under-fitting"] for jobs in (1, 2))
    assert one["statistics"] == two["statistics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["equilibrium", "--budget", "large"],
            "claim 'equilibrium' is not in --budget large, which has under-",
        ),
        (
            ["--budget", "paper"],
            "--budget paper is not for --data fashion-mnist: give cifar10, cifar100 or image",
        ),
        (["--budget", "large", "--device", "cuda:9"], "--device cuda:9 is not possible: torch "),
        (
            ["--budget", "large", "--precision", "int8"],
            "--precision int8 is not known: choose from float32, bf16",
        ),
        (["--device", "cuda"], "--device cuda is not for --budget quick, whose networks are small: give cpu"),
        (
            ["--precision", "bf16"],
            "--precision bf16 is not for --budget quick: give float32, or --budget large or",
        ),
        (["--data", "cifar10"], "--budget quick is not for --data cifar10: give fashion-mnist or digits"),
        (["--dry-run"], "--dry-run is not for --budget quick, which takes minutes: give large or paper"),
        (
            ["--data", "imagefolder:/a b", "--budget", "paper"],
            "--data imagefolder:/a b is not known: choose from",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, *arguments, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normwise: {message}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_a_dry_run_adds_up_by_claim_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--budget", "large", "--data", "digits", "--dry-run") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["claims"]) == {"under-fitting", "initialization", "shrink", "what-to-decay", "no-tuning"}
    assert found["claims"]["under-fitting"]["runs"] == 12
    assert found["runs"] < sum(claim["runs"] for claim in found["claims"].values())  # they share runs
    assert command(monkeypatch, "what-to-decay", "--budget", "large", "--dry-run") == 0
    of_text = json.loads(capsys.readouterr().out)  # no network of images
    assert of_text["steps"] > of_text["runs"] > 0
    assert list(tmp_path.iterdir()) == []
