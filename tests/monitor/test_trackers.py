"""The trackers that people use, with the real libraries; a test is left out where its library is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor.common import BATCHES, network, plan_of, train
from torch.optim import SGD

import normwise as nw
from normwise.monitor.finding import Finding

FOUND = Finding("dead units", ("0",), 2, 2, "0: 1 of 8 units", "initialise them again")


@pytest.fixture(autouse=True)
def others_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(tracker: Any) -> nw.Monitor:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    monitor = nw.Monitor(optimizer, plan=plan, every=4, trackers=[tracker])
    train(model, optimizer, BATCHES)
    tracker.finding(FOUND)
    monitor.remove()
    return monitor


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(nw.trackers.TensorBoard(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "normwise/rotation/3" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("normwise/norm/0")] == [1, 4, 8, 12]
    assert "normwise/findings/dead units/text_summary" in events.Tags()["tensors"]


def test_tensorboard_with_a_writer_that_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        run(nw.trackers.TensorBoard(writer))
        writer.add_scalar("loss", 1.0, 1)


@pytest.mark.thorough
def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    made = wandb.init(mode="offline", dir=str(tmp_path), project="normwise-test")
    run(nw.trackers.WandB(made))
    shown = dict(made.summary)
    made.finish()
    assert shown["normwise/step"] == 12
    assert shown["normwise/findings/dead units"].startswith("dead units")
    assert any("normwise/rotation/3" in str(name) for name in shown)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    kept: list[dict[str, Any]] = []

    class Run:
        def log(self, metrics: dict[str, Any], step: int) -> None:
            kept.append({**metrics, "step": step})

        def finish(self) -> None:
            kept.append({"finished": True})

    import trackio

    monkeypatch.setattr(trackio, "init", lambda **options: Run())  # the real one starts a server
    run(nw.trackers.Trackio(project="normwise-test"))
    assert [row["step"] for row in kept if "normwise/norm/0" in row] == [1, 4, 8, 12]
    assert kept[-1] == {"finished": True}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(tmp_path.joinpath("runs").as_uri())
    with mlflow.start_run() as active:
        run(nw.trackers.MLflow())
        identity = active.info.run_id
    client = mlflow.tracking.MlflowClient()
    history = client.get_metric_history(identity, "normwise/norm/0")
    assert [metric.step for metric in history] == [1, 4, 8, 12]
    tags = client.get_run(identity).data.tags
    assert tags["normwise/findings/dead units"].startswith("dead units")
    path = client.download_artifacts(identity, "normwise.json")
    assert json.loads(Path(path).read_text())["every"] == 4


@pytest.mark.parametrize("name", ["TensorBoard", "WandB", "Trackio", "MLflow"])
def test_a_library_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    for module in ("tensorboard", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    make = getattr(nw.trackers, name)
    with pytest.raises(ValueError, match=f"{name} needs .*: pip install"):
        make(tmp_path) if name == "TensorBoard" else make()
