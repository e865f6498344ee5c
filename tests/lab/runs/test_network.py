"""Training of the paper's networks, tiny and on made-up data of the published formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.small import text
from tests.lab.small_images import put_folder

import normwise as nw
from normwise.lab.data.catalog import load_images
from normwise.lab.data.datasets import Dataset
from normwise.lab.engine.run import Metrics
from normwise.lab.models.networks import filters
from normwise.lab.runs import network
from normwise.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from normwise.lab.runs.devices import Execution, available_memory, device_named, is_out_of_memory
from normwise.lab.runs.estimate import estimate
from normwise.lab.runs.feeds import MemoryFeed, feed
from normwise.lab.runs.memory import footprint
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.text import TextRun

pytest.importorskip("lightning")
CPU = Execution(device="cpu")


def small(**changes: Any) -> NetworkRun:
    values: dict[str, Any] = {"network": "resnet20", "width": 2, "batch_size": 16, "epochs": 2}
    values |= {"train_size": 64, "data": "digits", "fingerprint": load_images("digits").fingerprint}
    return NetworkRun(**(values | changes))


class Killed(BaseException):
    pass


def kill_after(steps: int) -> Callable[[int, int, Metrics], None]:
    def seen(step: int, steps_in_all: int, line: Metrics) -> None:
        if step == steps:
            raise Killed

    return seen


def without_time(summary: Metrics) -> Metrics:
    return {key: value for key, value in summary.items() if key != "training_seconds"}


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"rule": "aws"}, (3, 6)),  # within the start in equilibrium, and in the next epoch
        ({"rule": "epsilon", "optimizer": "sgd", "validation_size": 30}, (4,)),  # at the end of an epoch
        ({"rule": "aws", "optimizer": "adamw", "lr": 0.01, "member": "weight_standardization"}, (5,)),
        ({"rule": "l2", "network": "vgg16_small", "batch_norm": False, "precision": "bf16"}, (7,)),
    ],
)
@pytest.mark.one_in(2)
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], places: tuple[int, ...]
) -> None:
    if changes.get("network") == "vgg16_small":  # five poolings: digits are too small
        monkeypatch.setattr(network, "load_images", lambda name, **_: _larger_digits())
    run = small(**changes)
    execution = replace(CPU, checkpoint_steps=1)
    expected = list[Metrics]()
    whole = run.train(CPU, log=expected.append)
    path = tmp_path / "checkpoint.pt"
    for place in places:
        with pytest.raises(Killed):
            run.train(execution, checkpoint=path, seen=kill_after(place))
    lines = list[Metrics]()
    steps = list[int]()
    resumed = run.train(
        execution, checkpoint=path, log=lines.append, seen=lambda step, all_steps, line: steps.append(step)
    )
    assert steps[0] == places[-1] + 1  # it went on, and did not start again
    assert without_time(resumed) == without_time(whole)
    assert lines == expected
    assert whole["status"] == "finished"


def _larger_digits() -> Dataset:
    digits = load_images("digits")
    assert isinstance(digits, Dataset)
    grow = torch.nn.Upsample(scale_factor=4)
    return replace(digits, train_images=grow(digits.train_images), test_images=grow(digits.test_images))


@pytest.mark.thorough
def test_the_checkpoint_is_needed_for_that(tmp_path: Path) -> None:
    run = small(rule="aws")
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        run.train(replace(CPU, checkpoint_steps=1), checkpoint=path, seen=kill_after(6))
    content = torch.load(path, weights_only=True)
    for momentum in content["state"]["optimizer"]["state"].values():
        momentum["momentum_buffer"].zero_()
    torch.save(content, path)
    assert without_time(run.train(CPU, checkpoint=path)) != without_time(run.train(CPU))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path, {}) is None
    settings = {"lr": 0.1, "drops": (1, 2), "execution": {"device": "cpu"}}
    save_checkpoint(path, settings, {"step": 3})
    assert load_checkpoint(path, settings) == {"step": 3}
    with pytest.raises(ValueError, match=r"is of other settings: lr is 0.1 there and 0.2 now; give the"):
        load_checkpoint(path, settings | {"lr": 0.2})
    content = path.read_bytes()
    for damaged in (content[:-200], b"", b"no checkpoint", content[:500] + bytes(100) + content[600:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read \(.*\): delete it") as caught:
            load_checkpoint(path, settings)
        assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_a_training_learns(tmp_path: Path) -> None:
    run = small(width=4, train_size=512, epochs=4, batch_size=32, augment=False, lr=0.1)
    lines = list[Metrics]()
    summary = run.train(CPU, log=lines.append)
    assert summary["test_accuracy"] > 0.5
    assert summary["step"] == 64
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert summary["parameters"] == sum(p.numel() for p in run.build(10, 1).parameters())


@pytest.mark.parametrize("rule", network.RULES)
def test_each_rule_decays_what_it_should(rule: str) -> None:
    """With gradients of zero, one step shows the decay alone."""
    run = small(rule=rule, coefficient=0.01, weight_decay=0.02, momentum=0.0, epsilon=0.25)
    net = run.build(10, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    mine = {id(p) for p in filters(net).values()}
    optimizer = run.make_optimizer(net, total_time=5.0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in net.parameters()
    }
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        old = before[name]
        factor = torch.tensor(1.0)
        if id(p) in mine:
            unit = nw.Unit(old)
            norm = unit.broadcast(unit.norms().float(), old)
            if rule == "l2":
                factor = torch.tensor(1 - 0.1 * 0.01)
            elif rule == "l2-filters":
                factor = torch.tensor(math.exp(-0.1 * 0.01))
            elif rule == "aws-tuned":
                factor = 1 / (1 + 0.1 * 0.01 * norm)
            elif rule == "epsilon":
                factor = 1 - 0.1 * 0.01 * (1 - 0.25 / norm)
            elif rule == "aws":
                continue  # it waits for a gradient; nw.attach has its own tests
        elif rule == "l2":
            factor = torch.tensor(1 - 0.1 * 0.01)
        elif rule != "none" and name == "head.weight":
            factor = torch.tensor(1 - 0.1 * 0.02)
        torch.testing.assert_close(p.detach(), old * factor, msg=name)


def test_nothing_tuned_is_what_attach_chooses() -> None:
    optimizers = []
    for by_hand in (False, True):
        run = small(rule="none" if by_hand else "aws", weight_decay=0.0)
        net = run.build(10, 1)
        optimizer = run.make_optimizer(net, total_time=6.0)
        if by_hand:
            nw.attach(optimizer, filters(net).values(), 6.0)
        optimizers.append(optimizer)
    states = [optimizer.state_dict()["normwise"]["decay"] for optimizer in optimizers]
    assert str(states[0]) == str(states[1])


def test_the_schedules_sum_to_the_time_that_decay_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[float]()
    original = NetworkRun.make_optimizer

    def spy(self: NetworkRun, net: torch.nn.Module, total_time: float) -> torch.optim.Optimizer:
        given.append(total_time)
        return original(self, net, total_time)

    monkeypatch.setattr(NetworkRun, "make_optimizer", spy)
    rates = list[float]()
    run = small(epochs=3, train_size=32, schedule="steps", drops=(1, 2), rule="none")
    run.train(CPU, log=lambda line: rates.append(line["lr"]))
    assert rates == pytest.approx([0.1, 0.01, 0.001])
    assert given == [pytest.approx(2 * (0.1 + 0.01 + 0.001))]
    cosine = small(epochs=10)
    assert cosine.lr_at(0, 40) == 0.1
    assert cosine.lr_at(20, 40) == pytest.approx(0.05)
    assert 0 < cosine.lr_at(39, 40) < 0.001


def test_it_is_evaluated_as_often_as_asked_and_at_the_end() -> None:
    lines = list[Metrics]()
    rare = small(epochs=3, evaluate_every=2, rule="none")
    summary = rare.train(CPU, log=lines.append)
    assert ["test_accuracy" in line for line in lines] == [False, True, True]
    often = replace(rare, evaluate_every=1).train(CPU)
    assert without_time(often) == without_time(summary)
    assert summary["test_accuracy"] == lines[-1]["test_accuracy"]
    with pytest.raises(ValueError, match="--evaluate-every 0 is not possible"):
        small(evaluate_every=0).train(CPU)


def test_the_accuracy_on_training_images_is_that_of_the_final_network() -> None:
    run = small(train_size=48, epochs=4, width=4, rule="l2-filters", augment=True)
    kept = list[torch.nn.Module]()
    original = NetworkRun.build

    def spy(self: NetworkRun, *args: Any) -> torch.nn.Module:
        kept.append(original(self, *args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkRun, "build", spy)
        summary = run.train(CPU)
    data = feed(load_images("digits"), batch_size=48, seed=0, train_size=48)
    ((x, y),) = data.evaluation("train")
    hits = (kept[-1].eval()(x).argmax(1) == y).float().mean()
    assert summary["train_accuracy"] == pytest.approx(float(hits))


def test_at_most_ten_thousand_training_images_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.lab.runs.feeds._MOST_SEEN", 500)
    data = feed(load_images("digits"), batch_size=100, seed=0)
    labels = torch.cat([y for _, y in data.evaluation("train")])
    assert len(labels) == 479  # each third of 1437
    assert torch.bincount(labels).min() > 30


def test_a_loss_that_is_not_finite_is_a_result() -> None:
    summary = small(rule="none", lr=1e30, batch_norm=False, member="weight_norm").train(CPU)
    assert summary["status"] == "not finite"
    assert "loss was" in summary["reason"]


def test_the_initial_network_depends_on_the_seed_and_not_on_rule_or_scale() -> None:
    x = torch.randn(4, 1, 8, 8)
    torch.manual_seed(5)
    outputs = [run.build(10, 1).eval()(x) for run in (small(), small(rule="none"), small(init_scale=1e3))]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(small(seed=1).build(10, 1).eval()(x), outputs[0], atol=1e-2)


# data


@pytest.mark.thorough
def test_pictures_of_a_folder_are_trained_on(tmp_path: Path) -> None:
    put_folder(tmp_path / "pictures", classes=2, images=8)
    name = f"imagefolder:{tmp_path / 'pictures'}"
    run = small(
        data=name,
        fingerprint=load_images(name).fingerprint,
        network="resnet18",
        train_size=0,
        batch_size=4,
        image_size=32,
        width=8,
        lr=0.02,
        epochs=1,
    )
    whole = run.train(CPU)
    assert whole["status"] == "finished"
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        run.train(replace(CPU, checkpoint_steps=1), checkpoint=path, seen=kill_after(2))
    assert without_time(run.train(CPU, checkpoint=path)) == without_time(whole)
    (tmp_path / "pictures" / "train" / "class0" / "0.png").write_bytes(b"?" * 100)
    with pytest.raises(ValueError, match="has changed since the job began"):
        run.train(CPU)
    changed = replace(run, fingerprint=load_images(name).fingerprint)
    with pytest.raises(ValueError, match=r"train/class0/0.png is not a picture that can be decoded"):
        changed.train(CPU)


def test_processes_share_each_batch() -> None:
    data = load_images("digits")
    whole = feed(data, batch_size=8, seed=3, augment=True)
    shares = [feed(data, batch_size=8, seed=3, augment=True, rank=rank, world=2) for rank in (0, 1)]
    batches = [list(one.training(1, 170)) for one in (whole, *shares)]
    assert len(batches[0]) == 1437 // 8 - 170
    for (x, y), (x0, y0), (x1, y1) in zip(*batches, strict=True):
        for shared, parts in ((x, (x0, x1)), (y, (y0, y1))):
            assert torch.equal(shared[0::2], parts[0])
            assert torch.equal(shared[1::2], parts[1])
    tests = [sum(len(y) for _, y in one.evaluation("test")) for one in shares]
    assert sum(tests) == 360
    with pytest.raises(ValueError, match="--batch 8 cannot be shared by 3 processes: give a multiple"):
        feed(data, batch_size=8, seed=0, world=3)


def test_epochs_hold_each_image_once_in_another_order_and_resume_in_the_middle() -> None:
    data = load_images("digits")
    one = feed(data, batch_size=100, seed=0)
    assert isinstance(one, MemoryFeed)
    first, second = (torch.cat([x for x, _ in one.training(epoch)]) for epoch in (0, 1))
    assert first.shape == (1400, 1, 8, 8)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([x for x, _ in one.training(0, 5)]), first[500:])
    assert len(torch.unique(first.flatten(1), dim=0)) > 1390
    images = torch.cat([x for x, _ in one.evaluation("test")])
    assert images.shape == (360, 1, 8, 8)
    standardised = torch.cat([x for x, _ in feed(data, batch_size=1437, seed=0).training(0)])
    assert standardised.mean().abs() < 1e-4
    assert standardised.std() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="--batch 2000 is more than the 1437 training images"):
        feed(data, batch_size=2000, seed=0)


# devices and memory


def test_what_is_not_possible_is_one_line() -> None:
    for changes, message in (
        ({"rule": "l1"}, "--rule l1 is not known: choose from none, l2, l2-filters, aws, aws-tuned, epsilon"),
        ({"epochs": 0}, "--epochs 0 is not possible"),
        ({"lr": -1.0}, "--lr -1.0 is not possible: give a positive number"),
        ({"coefficient": math.nan}, "--coefficient nan is not possible"),
        ({"member": "plain", "batch_norm": False}, "where no weight is scale-invariant: give none or l2"),
        ({"schedule": "steps"}, "needs the epochs at which the rate falls: give --drops"),
        ({"network": "lenet"}, "network='lenet' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes).train(CPU)
    with pytest.raises(ValueError, match=r"--width 4 is not possible .*: give 8 or more, or --no"):
        small(network="resnet18", width=4).train(CPU)
    with pytest.raises(ValueError, match=r"--device cuda:99 is not possible: torch .* finds cpu"):
        small().train(Execution(device="cuda:99"))
    assert device_named("auto").type in ("cpu", "cuda", "mps")


def test_lightning_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightning.fabric", None)
    with pytest.raises(ValueError, match=r"needs the extra 'scale': pip install normwise\[scale\]"):
        small().train(CPU)


@pytest.mark.thorough
def test_too_large_a_batch_says_which_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(batch_size=64)
    with torch.device("meta"):
        size = footprint(run.build(10, 1, "plain"), (1, 8, 8))
    room = size.bytes_for(20) / 0.9
    monkeypatch.setattr(network, "available_memory", lambda device: room)
    with pytest.raises(
        ValueError, match=r"batch of 64 images is too large for cpu: .* free; 16 images would fit"
    ):
        run.train(CPU)
    replace(run, batch_size=16, epochs=1).train(CPU)

    monkeypatch.setattr(network, "available_memory", available_memory)

    def raises(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    monkeypatch.setattr(network, "cross_entropy", raises)
    with pytest.raises(ValueError, match=r"batch of 64 images is too large for cpu: .* --batch 32,"):
        run.train(CPU)
    assert not is_out_of_memory(RuntimeError("another error"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_footprint_counts_what_a_forward_pass_saves() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(10, 20, device="meta"), torch.nn.ReLU())
    found = footprint(layer, (1, 1, 10), buffers=1)
    assert found.fixed == 3 * 4 * 220
    # the input (10 numbers) and the output of the ReLU (20)
    assert found.per_image == pytest.approx(1.3 * 4 * 30)
    assert footprint(layer, (1, 1, 10), precision="bf16").per_image == pytest.approx(1.3 * 2 * 30)
    with torch.device("meta"):
        words = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.ReLU())
    # the indices (11 of 8 bytes) and the output of the ReLU (55 numbers)
    assert footprint(words, (11,), dtype=torch.long).per_image == pytest.approx(1.3 * (8 * 11 + 4 * 55))


def test_memory_of_linux_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:  100 kB\nMemAvailable:  64 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert available_memory(torch.device("cpu")) == 65536


# estimates


def test_an_estimate_adds_up_and_measures_each_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(epochs=3, fingerprint="", batch_size=16)
    built = list[str]()
    original = NetworkRun.build

    def spy(self: NetworkRun, *args: Any) -> torch.nn.Module:
        built.append(self.member)
        return original(self, *args)

    estimate([run], CPU, measured_steps=1)
    monkeypatch.setattr(NetworkRun, "build", spy)
    runs = [run, run, replace(run, seed=1, rule="l2"), replace(run, member="plain", train_size=0, epochs=2)]
    found = estimate(runs, CPU, measured_steps=1)
    assert built.count("weight_norm") == built.count("plain") == 1  # the footprint was known before
    assert found.runs == 3
    assert found.steps == 2 * 3 * (64 // 16) + 2 * (1437 // 16)
    assert found.seconds > found.steps * found.seconds_per_step > 0
    assert set(found.as_dict()) == {"runs", "steps", "seconds_per_step", "hours", "memory_gib"}


def test_an_estimate_holds_the_language_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = text(length=50, measured=30)
    other = replace(run, seed=1, length=70, scaled="stream", decayed="invariant")
    runs = [run, other, replace(run, width=64)]
    lengths = list[int]()
    original = TextRun.run_in

    def spy(self: TextRun, *args: Any) -> Metrics:
        lengths.append(self.length)
        return original(self, *args)

    monkeypatch.setattr(TextRun, "run_in", spy)
    found = estimate([*runs, run], CPU, measured_steps=2)
    assert lengths == [1, 1, 3] * 2  # once for each kind
    assert (found.runs, found.steps) == (3, 50 + 70 + 50)
    assert found.seconds == pytest.approx(sum(found.by_run.values()))
    assert found.memory > estimate([run], CPU, measured_steps=1).memory > 0  # of the wider network

    both = estimate([run, small(fingerprint="")], CPU, measured_steps=1)
    assert both.steps == 50 + 2 * (64 // 16)
