from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.lab.engine.dask_cluster import PATIENCE, LocalCluster
from tests.lab.engine.odd_runs import OddRun
from tests.lab.small import fingerprint, replaying, training

import normwise as nw
import normwise.lab.engine.cluster as cluster_module
from normwise.cli import main
from normwise.lab.engine.cluster import Cluster, ClusterError, check_address, connected
from normwise.lab.engine.execution import RunError, attempt, execute
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store

distributed = pytest.importorskip("distributed")


def _files(store: Store, wanted: list[Run]) -> dict[str, Any]:
    """All that a store holds of the runs, but for the seconds that they took."""
    found = {}
    for settings in wanted:
        summary = store.summary(settings)
        assert summary is not None
        folder = store.run_folder(settings)
        texts = [(folder / name).read_text() for name in ("config.json", "metrics.jsonl")]
        found[settings.identity] = [*texts, {k: v for k, v in summary.items() if k != "seconds"}]
    return found


@pytest.mark.thorough
def test_a_worker_killed_half_way_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Run] = [
        *(training(seed=seed, epochs=20).with_rule(nw.AdaptiveWeightShrink(1.0)) for seed in range(7)),
        replaying(length=5).with_rule(nw.L2(0.5)),
    ]
    store = Store(tmp_path / "cluster")
    written: Counter[str] = Counter()
    write = Store.write_run

    def counted(self: Store, settings: Run, *rest: Any) -> None:
        written[settings.identity] += 1
        write(self, settings, *rest)

    monkeypatch.setattr(Store, "write_run", counted)
    (tmp_path / "dask").mkdir()
    with LocalCluster(tmp_path / "dask") as local:
        processes = {name: local.start_worker(name) for name in ("one", "two")}
        with distributed.Client(local.address, set_as_default=False) as observer:
            observer.wait_for_workers(2, timeout=PATIENCE)
            names = {address: w["name"] for address, w in observer.scheduler_info()["workers"].items()}
            killed: list[str] = []

            def kill_one_that_is_at_work(done: int, total: int, share: float) -> None:
                if done != 2:
                    return
                deadline = time.monotonic() + PATIENCE
                while not killed:
                    assert time.monotonic() < deadline
                    busy = [address for address, tasks in observer.processing().items() if tasks]
                    if busy:
                        killed.append(busy[0])
                        processes[names[busy[0]]].kill()
                        processes[names[busy[0]]].wait()

            with connected(local.address, patience=PATIENCE) as cluster:
                workers = cluster.workers("digits", fingerprint(), offline=True)
                summaries = execute(wanted, store, workers, kill_one_that_is_at_work)
            assert len(observer.scheduler_info()["workers"]) == 1
        assert written == Counter(summaries.keys())  # each once
        _the_scheduler_is_killed(local, Store(tmp_path / "cut"))
    assert set(summaries) == {settings.identity for settings in wanted}
    alone = Store(tmp_path / "alone")
    execute(wanted, alone)
    assert _files(store, wanted) == _files(alone, wanted)
    # the client alone has files: a worker's folder holds none of a run
    assert not list((tmp_path / "dask").rglob("summary.json"))


def _the_scheduler_is_killed(local: LocalCluster, store: Store) -> None:
    wanted = [
        OddRun(way="fine"),
        OddRun(way="fine", seed=1),
        OddRun(way="endless"),
    ]  # carried out in this order

    def cut(done: int, total: int, share: float) -> None:
        if done == 2:
            local.scheduler.kill()
            local.scheduler.wait()

    with (
        connected(local.address, patience=PATIENCE) as cluster,
        pytest.raises(RunError, match=r"the connection to the cluster was lost; 2 finished runs are kept"),
    ):
        execute(wanted, store, cluster.workers("digits", fingerprint(), offline=True, at_once=1), cut)
    assert [store.summary(settings) is not None for settings in wanted] == [True, True, False]


def test_a_cluster_gives_the_same_numbers_and_names_what_fails(tmp_path: Path) -> None:
    """Scheduler and worker are threads of this process, and talk through sockets all the same."""
    wanted: list[Run] = [training(), replaying(length=5).with_rule(nw.L2(0.5))]
    fine, failing = OddRun(way="fine"), OddRun(way="error")
    alone, store = Store(tmp_path / "alone"), Store(tmp_path / "out")
    execute(wanted, alone)
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=str(tmp_path),
        ) as local,
        connected(local.scheduler_address, patience=PATIENCE) as cluster,
    ):
        with pytest.raises(ClusterError, match="whose digits differs"):
            cluster.workers("digits", "f" * 64, offline=True)
        with pytest.raises(ClusterError, match=r"cannot execute runs: data set 'mnist' is not known"):
            cluster.workers("mnist", "f" * 64, offline=True)
        one, several = (cluster.workers("digits", fingerprint(), True, at_once) for at_once in (1, None))
        execute(wanted, store, several)
        assert _files(store, wanted) == _files(alone, wanted)
        with pytest.raises(
            RunError, match=r"\(OddRun: way=error, seed=0\) failed: ArithmeticError: the sum does"
        ):
            execute([fine, failing], store, one)
    # one at a time, in this order: the first is finished and kept
    assert store.summary(fine) is not None
    assert "run\n    raise ArithmeticError" in (store.run_folder(failing) / "failure.txt").read_text()


@pytest.mark.thorough
def test_processes_of_a_cluster_that_are_missing_or_other_or_killed_are_said_in_a_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "dask").mkdir()
    with LocalCluster(tmp_path / "dask", SCHEDULER__ALLOWED_FAILURES="0") as local:
        with (
            pytest.raises(
                ClusterError, match=r"has no workers \(waited 0 s\): start some with dask worker tcp:"
            ),
            connected(local.address, patience=0.4),
        ):
            pass
        odd = local.start_worker("odd", before="import normwise; normwise.__version__ = '9.9'")
        local.start_worker("good")
        with distributed.Client(local.address, set_as_default=False) as observer:
            observer.wait_for_workers(2, timeout=PATIENCE)
            with (
                pytest.raises(
                    ClusterError, match=r"has a worker, tcp://.*, with normwise 9\.9, and here it is 0"
                ),
                connected(local.address, patience=PATIENCE),
            ):
                pass
            odd.kill()
            deadline = time.monotonic() + PATIENCE
            while len(observer.scheduler_info()["workers"]) > 1:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with connected(local.address, patience=PATIENCE) as cluster:
            workers = cluster.workers("digits", fingerprint(), offline=True)
            with pytest.raises(RunError, match=r"\(OddRun: way=killed, seed=0\) failed: KilledWorker"):
                execute([OddRun(way="killed")], Store(tmp_path / "out"), workers)


@pytest.mark.parametrize(
    "address",
    ["localhost:8786", "tcp://localhost", "tcp://:8786", "http://a:1", "tcp://a:0", "tcp://a:70000", ""],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="is no address: give tcp://HOST:PORT"):
        check_address(address)


def test_addresses_of_both_families_are_taken() -> None:
    for address in ("tcp://127.0.0.1:8786", "tls://head.cluster:8786", "tcp://[::1]:8786"):
        check_address(address)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install normwise\[cluster\]"):
        check_address("tcp://127.0.0.1:8786")


def test_where_nobody_listens_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(cluster_module, "PATIENCE", 0.3)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "normwise",
                "reproduce",
                "--data",
                "digits",
                "--out",
                str(tmp_path / "out"),
                "--cluster",
                address,
            ],
        )
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"normwise: --cluster {address} does not answer")
    assert not (tmp_path / "out").exists()


class _Client:
    """Answers what Cluster asks, for a worker with the given number of threads and other versions."""

    def __init__(self, threads: int = 1, **versions: str | None) -> None:
        self.threads, self.versions = threads, versions

    def wait_for_workers(self, n: int, timeout: float) -> None:
        pass

    def nthreads(self) -> dict[str, int]:
        return {"tcp://w:1": self.threads}

    def run(self, function: Any, *arguments: Any, on_error: str) -> dict[str, Any]:
        answer = function(*arguments)
        return {"tcp://w:1": answer | self.versions if isinstance(answer, dict) else answer}


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (_Client(Python="2.7"), r"with Python 2\.7, and here it is 3"),
        (_Client(torch="1.0"), r"with torch 1\.0, and here it is"),
        (
            _Client(normwise=None),
            r"with normwise \(none\), and here it is 0\.1\.0: its .* same version there",
        ),
        (
            _Client(threads=4),
            "of 4 threads, .*: start dask worker tcp://h:1 --nthreads 1 --nworkers 4 in its",
        ),
    ],
)
def test_workers_that_would_give_other_numbers_are_refused(client: _Client, message: str) -> None:
    with pytest.raises(ClusterError, match=f"has a worker, tcp://w:1, {message}"):
        Cluster("tcp://h:1", client).check_workers(patience=0)


def test_a_like_worker_is_taken_and_another_processor_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("tcp://h:1", _Client())
    cluster.check_workers(patience=0)
    assert cluster.other_processors() == []
    names = iter(["AVX2", "AVX512"])
    monkeypatch.setattr(cluster_module, "_processor", lambda: next(names))
    assert "computes with AVX512, this machine with AVX2" in cluster.other_processors()[0]


def test_a_run_that_another_version_asked_for_is_not_begun() -> None:
    outcome = attempt(OddRun(way="killed"), "0123456789abcdef")
    assert outcome.summary is None
    assert "other versions than asked for" in outcome.error
