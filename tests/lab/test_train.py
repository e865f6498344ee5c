"""``normwise train``, from the command line to the summary, on made-up data of the published formats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.lab.sized import sized_budget
from tests.lab.small_images import put_cifar

from normwise import cli
from normwise.lab import train as module
from normwise.lab.claims.networks import matched
from normwise.lab.data import catalog
from normwise.lab.engine.store import Store
from normwise.lab.models.networks import NETWORKS
from normwise.lab.runs.arms import NONE
from normwise.lab.runs.network import RULES

pytest.importorskip("lightning")
TINY = ["--network", "resnet20", "--width", "2", "--batch", "16", "--epochs", "2", "--device", "cpu"]
MAIN = "from normwise.cli import main; main()"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["normwise", "train", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = put_cifar(tmp_path / "cache", images=40)
    monkeypatch.setattr(catalog, "_ARCHIVES", {archive.name: archive for archive in archives})
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cifar")
def test_cifar_from_the_command_line_to_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "cifar100", *TINY, "--out", str(tmp_path / "out"), "--offline"]
    assert command(monkeypatch, *options) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert summary["status"] == "finished"
    assert summary["step"] == 2 * (40 // 16)
    assert "normwise: epoch 1 of 2: training loss " in output.err
    assert "left" in output.err
    folder = tmp_path / "out" / "runs" / summary["identity"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "summary.json"}
    assert json.loads((folder / "config.json").read_text())["data"] == "cifar100"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]

    assert command(monkeypatch, *options) == 0  # nothing to do
    again = capsys.readouterr()
    assert json.loads(again.out) == summary
    assert "is finished already" in again.err
    assert "epoch" not in again.err


def test_ctrl_c_and_the_same_command_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "digits", *TINY, "--train-size", "64", "--offline"]
    assert command(monkeypatch, *options, "--out", str(tmp_path / "whole")) == 0
    whole = json.loads(capsys.readouterr().out)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Progress, "__call__", interrupted)
        assert command(patch, *options, "--out", str(tmp_path / "out"), "--checkpoint-every", "0") == 130
    assert "stopped; the same command goes on from the last checkpoint" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "runs").glob("*/checkpoint.pt"))) == 1
    assert command(monkeypatch, *options, "--out", str(tmp_path / "out")) == 0
    output = capsys.readouterr()
    assert "goes on from its checkpoint" in output.err
    resumed = json.loads(output.out)
    for summary in (whole, resumed):
        del summary["training_seconds"]
    assert resumed == whole
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:9"], "--device cuda:9 is not possible: torch "),
        (
            ["--rule", "l1"],
            "--rule l1 is not known: choose from none, l2, l2-filters, aws, aws-tuned, epsilon",
        ),
        (["--network", "lenet"], "network='lenet' is not known: choose from resnet20, "),
        (["--data", "mnist"], "data set 'mnist' is not known; it must be one of fashion-mnist, digits, "),
        (["--data", "imagefolder:/nowhere"], "imagefolder:/nowhere: /nowhere is not a folder"),
        (["--drops", "30;60"], "--drops 30;60 is not possible: give epochs, such as 30,60,90"),
        (["--batch", "2000"], "--batch 2000 is more than the 1437 training images: give fewer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    arguments = ["--data", "digits", *TINY, *options, "--out", str(tmp_path / "out")]
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normwise: {message}")
    assert len(error.splitlines()) == 1


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "empty"))
    arguments = ["--data", "cifar10", *TINY, "--epochs", "200", "--dry-run", "--offline"]
    assert command(monkeypatch, *arguments) == 0  # the data set is not needed
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["steps"]) == (1, 200 * (50_000 // 16))
    assert found["hours"] > 0
    assert found["memory_gib"] > 0
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_run_of_a_budget_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = matched(sized_budget().networks.whole, NONE)
    options = ["--data", "digits", *TINY, "--batch", "32", "--no-augment", "--train-size", "64", "--offline"]
    options += ["--rule", "none", "--coefficient", "0", "--weight-decay", "0", "--evaluate-every", "2"]
    assert Store(tmp_path).summary(run) is None
    assert command(monkeypatch, *options, "--out", str(tmp_path)) == 0
    assert Store(tmp_path).summary(run) is not None


def test_the_page_names_every_network_and_rule() -> None:  # tests/docs runs its code
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    for name in (*NETWORKS, *RULES):
        assert f"`{name}`" in text


@pytest.mark.thorough
def test_a_killed_process_loses_nothing_but_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    options = ["--data", "digits", *TINY, "--train-size", "640", "--offline", "--checkpoint-every", "0"]
    summaries = []
    for name in ("whole", "killed"):
        started = [sys.executable, "-c", MAIN, "train", *options, "--out", str(tmp_path / name)]
        if name == "killed":
            process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not list(tmp_path.glob("killed/runs/*/checkpoint.pt")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        output = subprocess.run(started, capture_output=True, text=True, check=True)
        assert ("goes on from its checkpoint" in output.stderr) == (name == "killed")
        summaries.append(json.loads(output.stdout))
        del summaries[-1]["training_seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.thorough
def test_two_processes_of_torchrun_do_what_one_does(tmp_path: Path) -> None:
    """Without batch norm, whose statistics are each process's own."""
    options = [
        "--data",
        "digits",
        *TINY,
        "--train-size",
        "64",
        "--offline",
        "--no-batch-norm",
        "--lr",
        "0.01",
    ]
    alone = [sys.executable, "-c", MAIN]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both += ["--no-python", *alone]
    summaries = []
    for name, start in (("alone", alone), ("both", both)):
        output = subprocess.run(
            [*start, "train", *options, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        summaries.append(json.loads(output.stdout))
    for key in ("test_loss", "train_loss", "test_accuracy", "median_norm"):
        assert summaries[1][key] == pytest.approx(summaries[0][key], rel=1e-3), key
