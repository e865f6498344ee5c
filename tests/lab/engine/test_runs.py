from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.engine.odd_runs import OddRun
from tests.lab.small import replaying, text, training
from torch import nn

import normwise as nw
from normwise.lab.engine.execution import (
    HERE,
    Outcome,
    RunError,
    Workers,
    attempt,
    execute,
    local_workers,
)
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import CHECKPOINT, MisfitError, Store
from normwise.lab.models.convnet import ConvNet, directions
from normwise.lab.runs.images import Images, batches
from normwise.lab.runs.train import TrainRun


def _without_time(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "seconds"}


def _wanted() -> list[Run]:
    return [
        training(),
        training(seed=1).with_rule(nw.AdaptiveWeightShrink(1.0)),
        training(init_scale=1e3).with_rule(nw.AdaptiveWeightShrink(1.0), mode="explicit"),
        replaying(length=5).with_rule(nw.L2(0.5)),
        text(seed=1, decayed="invariant").with_rule(nw.AdaptiveWeightShrink(2.0)),
    ]


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Workers]:
    with local_workers(2) as workers:
        yield workers


def test_two_processes_give_the_same_numbers_as_one(tmp_path: Path, two_workers: Workers) -> None:
    one = execute(_wanted(), Store(tmp_path / "one"))
    two = execute(_wanted(), Store(tmp_path / "two"), two_workers)
    assert set(one) == {settings.identity for settings in _wanted()}
    assert {k: _without_time(v) for k, v in one.items()} == {k: _without_time(v) for k, v in two.items()}
    for settings in _wanted():
        assert Store(tmp_path / "one").metrics(settings) == Store(tmp_path / "two").metrics(settings)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named_and_loses_no_other(
    tmp_path: Path, jobs: int, request: pytest.FixtureRequest
) -> None:
    store, workers = Store(tmp_path), request.getfixturevalue("two_workers") if jobs == 2 else HERE
    fine, failing = [OddRun(way="fine", seed=seed) for seed in range(3)], OddRun(way="error", seed=7)
    with pytest.raises(
        RunError,
        match=rf"^run {failing.identity} \(OddRun: way=error, seed=7\) failed: ArithmeticError: the sum "
        rf"does not add up; more in .*{failing.identity}.failure.txt; 3 finished runs are kept, .*$",
    ) as caught:
        execute([*fine, failing], store, workers)
    assert "\n" not in str(caught.value)
    assert all(store.summary(settings) for settings in fine)
    assert store.summary(failing) is None
    assert "raise ArithmeticError" in (store.run_folder(failing) / "failure.txt").read_text()
    # once it succeeds, no trace of the failure is left
    store.write_run(failing, [], {"status": "finished"})
    assert not (store.run_folder(failing) / "failure.txt").exists()


def test_no_run_is_begun_after_one_that_failed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RunError, match="0 finished runs are kept"):
        execute([OddRun(way="fine"), OddRun(way="error first")], store)
    assert store.summary(OddRun(way="fine")) is None


@pytest.mark.parametrize("share_files", [True, False])
def test_a_run_gets_its_folder_where_its_process_sees_it(tmp_path: Path, share_files: bool) -> None:
    given = []

    def task(run: Run, identity: str, folder: Path | None) -> Outcome:
        given.append(folder)
        return attempt(run, identity, folder)

    store, run = Store(tmp_path), OddRun(way="fine")
    execute([run], store, Workers(HERE.executor, task=task, share_files=share_files))
    assert given == [store.run_folder(run) if share_files else None]


def test_a_finished_run_has_no_checkpoint(tmp_path: Path) -> None:
    store, run = Store(tmp_path), OddRun(way="fine")
    store.run_folder(run).mkdir()
    (store.run_folder(run) / CHECKPOINT).write_bytes(b"of an earlier attempt")
    execute([run], store)
    assert sorted(path.name for path in store.run_folder(run).iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "summary.json",
    ]


class _Killed(Executor):
    """Answers as a pool does whose processes were killed."""

    def submit(self, task: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("A process was terminated abruptly"))
        return future


@pytest.mark.parametrize(
    "started",
    [
        lambda: contextlib.nullcontext(Workers(_Killed(), 2)),
        pytest.param(lambda: local_workers(2), marks=pytest.mark.thorough),
    ],
    ids=["made up", "real"],
)
def test_a_process_that_is_killed_is_said_in_a_line(tmp_path: Path, started: Any) -> None:
    wanted = [OddRun(way="killed"), OddRun(way="killed", seed=1)]
    killed = pytest.raises(RunError, match=r"a process that executed .* fewer than --jobs 2")
    with killed, started() as workers:
        execute(wanted, Store(tmp_path), workers)


_ENDLESS = """
import multiprocessing
import signal
import sys
from pathlib import Path
from tests.lab.engine.odd_runs import OddRun
from normwise.lab.engine.execution import execute, local_workers
from normwise.lab.engine.store import Store

# The tests may run in the background of a shell, where processes ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def tell(done, total, share):
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)

with local_workers(2) as workers:
    runs = [OddRun(way="fine"), OddRun(way="endless"), OddRun(way="endless", seed=1)]
    execute(runs, Store(Path(sys.argv[1])), workers, tell)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the state of processes from /proc")
@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        *(pytest.param(how, marks=pytest.mark.thorough) for how in (signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_worker_processes_end_with_the_job(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _ENDLESS, str(tmp_path)]
    job = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert job.stdout is not None
    try:
        job.stdout.readline()
        pids = job.stdout.readline().split()  # once the first run is done, both workers are there
        assert len(pids) == 2
        job.send_signal(how)
        job.communicate(timeout=120)
    finally:
        job.kill()
        job.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{int(pid)}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its job"
        time.sleep(0.05)


def test_threads_of_the_process_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        execute([training()], Store(tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_finished_runs_are_not_repeated_and_damaged_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    seen: list[tuple[int, int, float]] = []
    first, second = training(), training(seed=1)
    summaries = execute([first, second, first], store, progress=lambda *now: seen.append(now))
    assert [now[:2] for now in seen] == [(0, 2), (1, 2), (2, 2)]
    lefts = [now[2] for now in seen]
    assert lefts[0] == pytest.approx(first.cost + second.cost)
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[-1] == 0
    (store.run_folder(second) / "summary.json").write_text('{"status": "fini')
    done: list[Run] = []

    real = TrainRun.run

    def recorded(self: TrainRun, log: Any) -> dict[str, Any]:
        done.append(self)
        return real(self, log)

    monkeypatch.setattr(TrainRun, "run", recorded)
    again = execute([first, second], store)
    assert done == [second]
    assert _without_time(again[second.identity]) == _without_time(summaries[second.identity])


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = training()
    execute([run], store)
    config = store.run_folder(run) / "config.json"
    config.write_text(json.dumps(replace(run, lr=0.7).as_dict()))
    with pytest.raises(MisfitError, match="holds files of another run"):
        store.summary(run)


def test_a_refused_step_is_recorded_with_its_reason(tmp_path: Path) -> None:
    run = training(init_scale=1e3).with_rule(nw.AdaptiveWeightShrink(1.0), mode="explicit")
    summary = execute([run], Store(tmp_path))[run.identity]
    assert (summary["status"], summary["step"]) == ("refused", 0)
    assert 'mode="explicit"' in summary["reason"]


def test_a_loss_that_is_not_finite_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvNet, "forward", lambda self, x: self.head(self.body(x)) * torch.inf)
    summary = training().run(lambda line: None)
    assert summary["status"] == "not finite"


def test_a_dead_layer_is_logged_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainRun.build

    def with_dead_units(self: TrainRun, classes: int) -> nn.Module:
        model = real(self, classes)
        with torch.no_grad():
            for weight in directions(model).values():
                weight.zero_()
        return model

    monkeypatch.setattr(TrainRun, "build", with_dead_units)
    lines: list[dict[str, Any]] = []
    assert training().run(lines.append)["status"] == "finished"
    assert {layer["effective_lr"] for layer in lines[0]["layers"].values()} == {None}


def test_metrics_hold_norms_effective_rates_and_turns() -> None:
    lines: list[dict[str, Any]] = []
    training(init_scale=2.0).run(lines.append)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        for layer in line["layers"].values():
            # means over units of equal norms to a few per cent: lr/n²
            assert layer["effective_lr"] == pytest.approx(line["lr"] / layer["norm"] ** 2, rel=0.1)
            assert 0 < layer["turn"] < torch.pi


def test_start_and_batches_depend_on_the_seed_alone() -> None:
    one, other = training(), training(init_scale=5.0, lr=0.3).with_rule(nw.L2(0.1))
    images = Images(one)
    for (x, y), (u, v) in zip(batches(one, images), batches(other, images), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert not torch.equal(*(next(iter(directions(s.build(10)).values())) for s in (one, other)))
    torch.testing.assert_close(one.build(10)(x), other.build(10)(x))
    heads = [run.build(10).get_parameter("head.weight") for run in (one, replace(one, seed=1))]
    assert not torch.equal(*heads)


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
@pytest.mark.parametrize("rule", [nw.L2(0.3), nw.AdaptiveWeightShrink(0.3), nw.PowerShrink(0.3, 2.0)])
@pytest.mark.one_in(2)
def test_replays_have_the_directions_of_the_decayed_run(rule: nw.Rule, mode: str, tmp_path: Path) -> None:
    to = nw.PowerShrink(1.0, 2.0) if isinstance(rule, nw.PowerShrink) else type(rule)
    run = replaying().with_rule(nw.theory.match(rule, to, momentum=0.9, to_mode=mode), mode=mode)
    summary = execute([run], Store(tmp_path))[run.identity]
    assert summary["replay"]["largest_angle"] < 1e-11
    assert summary["naive"]["largest_angle"] > 1e-3
    assert summary["twin"]["largest_angle"] > 0
    assert summary["replay"]["predictions_that_differ"] == 0
    assert len(Store(tmp_path).metrics(run)) == run.length


@pytest.mark.parametrize("mode", ["flow", "explicit"])
@pytest.mark.parametrize("rule", [nw.L2(10.0), nw.AdaptiveWeightShrink(10.0)])
@pytest.mark.one_in(2)
def test_replays_of_adam_have_the_directions_of_the_decayed_run(rule: nw.Rule, mode: str) -> None:
    run = replaying(optimizer="adam", lr=0.01).with_rule(rule, mode)
    summary = run.run(lambda line: None)
    assert summary["replay"]["largest_angle"] < 1e-11
    assert summary["naive"]["largest_angle"] > 1e-3
    assert summary["replay"]["predictions_that_differ"] == 0


def test_an_optimizer_without_a_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer='lion' has no replay: choose from sgd, adam"):
        replaying(optimizer="lion").with_rule(nw.L2(0.1)).run(lambda line: None)


def test_a_changed_data_set_is_noticed() -> None:
    with pytest.raises(ValueError, match="digits has changed since the job began"):
        Images(replace(training(), fingerprint="f" * 64))


def test_rates_relative_to_the_common_one_act_on_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units on a sphere of radius 1 at 1/n² of the rate turn as units on a sphere of radius n do."""
    norm = 4.0
    far = training(init_scale=norm, momentum=0.0).with_rule(nw.Sphere(norm))
    near = replace(training(momentum=0.0).with_rule(nw.Sphere(1.0)), relative_lr=((norm**-2, norm**-2),) * 3)
    lines: dict[str, list[dict[str, Any]]] = {"far": [], "near": []}
    found = {"far": far.run(lines["far"].append), "near": near.run(lines["near"].append)}
    assert found["far"]["test_loss"] == pytest.approx(found["near"]["test_loss"], rel=1e-4)
    for one, other in zip(lines["far"], lines["near"], strict=True):
        for layer, values in one["layers"].items():
            assert values["turn"] == pytest.approx(other["layers"][layer]["turn"], rel=1e-3)


def test_relative_rates_are_interpolated_geometrically() -> None:
    from normwise.lab.runs.train import _interpolated

    assert [
        _interpolated((1.0, 4.0, 64.0), position) for position in (0.0, 0.25, 0.5, 0.75, 1.0)
    ] == pytest.approx([1, 2, 4, 16, 64])


def test_a_validation_part_leaves_the_training_images_as_they_are() -> None:
    without, with_part = Images(training()), Images(training(), 40)
    assert torch.equal(without.train, with_part.train)
    assert len(with_part.validation) == len(with_part.validation_labels) == 40
    summary = training(validation_size=40).run(lambda line: None)
    assert 0 <= summary["validation_accuracy"] <= 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_differs_by_its_rounding(precision: str) -> None:
    exact = training().run(lambda line: None)
    rough = training(precision=precision).run(lambda line: None)
    assert rough["status"] == "finished"
    assert rough["test_loss"] != exact["test_loss"]
    assert rough["test_loss"] == pytest.approx(exact["test_loss"], rel=0.05)


def test_spikes_are_losses_far_above_those_before() -> None:
    from normwise.lab.runs.train import _spikes

    losses = [torch.tensor(1.0)] * 30
    assert _spikes(losses) == 0
    assert _spikes([*losses, torch.tensor(2.5), *losses, torch.tensor(3.0)]) == 2
    assert _spikes(losses[:5]) == 0


@pytest.mark.parametrize("optimizer", ["adam", "sgdp"])
def test_other_optimizers_train_with_the_rule_on_the_directions_alone(optimizer: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    run = training(optimizer=optimizer, lr=0.01, weight_decay=0.1 if optimizer == "sgdp" else 0.0)
    run = run if optimizer == "sgdp" else run.with_rule(nw.L2(5.0))
    decayed: list[dict[str, Any]] = []
    free: list[dict[str, Any]] = []
    summary = run.run(decayed.append)
    replace(run, weight_decay=0.0).with_rule(None).run(free.append)
    assert summary["status"] == "finished"
    for one, other in zip(decayed[-1]["layers"].values(), free[-1]["layers"].values(), strict=True):
        assert one["norm"] < other["norm"]
