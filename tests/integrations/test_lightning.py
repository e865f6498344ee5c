"""The callback in Lightning's Trainer: what it sets up, and resumed trainings equal to uninterrupted ones."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import normwise as nw

L = pytest.importorskip("lightning.pytorch")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning warns of loggers, workers and devices; normwise's own warnings stay errors."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.manual_seed(0)
        yield


class Net(L.LightningModule):  # type: ignore[misc, name-defined]
    """A network whose first weight is scale-invariant, with a head that is not."""

    def __init__(
        self, optimizer: str = "SGD", schedule: str | None = "step", weight_decay: float = 0.1, **config: Any
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.kind, self.schedule, self.weight_decay, self.config = optimizer, schedule, weight_decay, config

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.kind == "SGD":
            optimizer: Any = torch.optim.SGD(
                self.named_parameters(), lr=0.1, momentum=0.9, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=self.weight_decay)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule, **self.config},
        }


def data(n: int = 48, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = torch.randint(0, 3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def trainer(tmp_path: Path, callbacks: Any, epochs: int = 4, **settings: Any) -> Any:
    return L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        callbacks=callbacks if isinstance(callbacks, list) else [callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def made(seed: int = 0, **settings: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**settings)


def test_nothing_given(tmp_path: Path) -> None:
    module, callback = made(), nw.lightning.DecayCallback()
    fit = trainer(tmp_path, callback)
    fit.fit(module, data())
    (decay,) = callback.decays
    assert callback.plan is not None
    assert callback.plan.verdicts["net.0.weight"] == "shrink"
    assert decay.steps == 24
    assert [p is module.net[0].weight for unit in decay.units for p in unit.params] == [True]
    # weight_decay is off what the rule takes, with parameters and names kept
    groups = {
        name: group["weight_decay"]
        for group in fit.optimizers[0].param_groups
        for name in group["param_names"]
    }
    assert groups.pop("net.0.weight") == 0
    assert set(groups.values()) == {0.1}
    assert set(groups) == {name for name, _ in module.named_parameters()} - {"net.0.weight"}
    # all groups follow the schedule
    assert len({group["lr"] for group in fit.optimizers[0].param_groups}) == 1


def test_it_decays_as_the_same_by_hand(tmp_path: Path) -> None:
    module, callback = made(), nw.lightning.DecayCallback()
    trainer(tmp_path, callback).fit(module, data())
    other = made()
    plan = nw.plan(other, list(data())[:4], progress=False)
    groups = [
        {"params": [p for n, p in other.named_parameters() if n != "net.0.weight"], "weight_decay": 0.1},
        {"params": [other.net[0].weight], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    plan.attach(optimizer, scheduler=scheduler, total_steps=24)
    for _ in range(4):
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert same(weights(module), weights(other))


@pytest.mark.parametrize(
    ("schedule", "accumulated", "frequency", "batches"),
    [("epoch", 1, 1, 48), ("epoch", 4, 2, 48), ("step", 4, 1, 56), ("step", 2, 3, 56), ("step", 1, 5, 48)],
)
@pytest.mark.one_in(2)
def test_the_sum_of_rates_is_that_of_the_training(
    schedule: str, accumulated: int, frequency: int, batches: int, tmp_path: Path
) -> None:
    """Schedules per epoch or step, every so often, with accumulation: what is summed is what is used."""

    class Rates(L.Callback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.used: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.used.append(optimizer.param_groups[0]["lr"])

    callback, rates = nw.lightning.DecayCallback(), Rates()
    fit = trainer(tmp_path, [callback, rates], accumulate_grad_batches=accumulated)
    fit.fit(made(schedule=schedule, frequency=frequency), data(batches))
    (decay,) = callback.decays
    assert decay.steps == len(rates.used)
    (line,) = [note for note in decay._notes if note.startswith("time: ")]
    assert f"Σlr = {sum(rates.used):.4g} over {len(rates.used)} steps" in line


RULES: dict[str, dict[str, Any]] = {
    "nothing given": {},
    "scheduled": {"rule": nw.L2(lambda step: 0.5 / (1 + step))},
    "sphere": {"rule": nw.Sphere()},
    "peaks": {"rule": nw.AdaptiveWeightShrink(0.5), "clock": "lr^2/max_lr"},
    "coupled": {"rule": nw.EpsilonShiftedL2(0.5, 0.3), "mode": "coupled"},
    "every": {"rule": nw.AdaptiveWeightShrink(0.5), "every": 4},
    "weight_decay": {"weight_decay": 0.3},
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.one_in(2)
def test_resumed_equals_uninterrupted(name: str, optimizer: str, tmp_path: Path) -> None:
    def callback() -> Any:
        return nw.lightning.DecayCallback(**RULES[name])

    whole = made(optimizer=optimizer)
    trainer(tmp_path, callback()).fit(whole, data())
    interrupted = made(optimizer=optimizer)
    stopped = trainer(tmp_path, [callback(), StopAfter(2)])
    stopped.fit(interrupted, data())
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    resumed = made(seed=7, optimizer=optimizer)
    again = callback()
    fit = trainer(tmp_path, again)
    says = "weights_only" in inspect.signature(fit.fit).parameters  # else it is so from torch 2.6 on
    fit.fit(resumed, data(), ckpt_path=tmp_path / "a.ckpt", **({"weights_only": True} if says else {}))
    assert again.decays[0].steps == 24
    assert same(weights(resumed), weights(whole))
    assert not same(weights(interrupted), weights(whole))


class StopAfter(L.Callback):  # type: ignore[misc, name-defined]
    """Stops a training whose length stays as it was."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def checkpoint(tmp_path: Path, callbacks: list[Any], **settings: Any) -> Path:
    stopped = trainer(tmp_path, [*callbacks, StopAfter(2)])
    stopped.fit(made(**settings), data())
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


class TestATrainingThatBeganWithoutNormwise:
    def test_it_is_refused(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, [])
        fit = trainer(tmp_path, nw.lightning.DecayCallback())
        with pytest.raises(ValueError, match=r"made without DecayCallback.*adopt=True"):
            fit.fit(made(), data(), ckpt_path=path)

    def test_it_is_adopted_knowingly(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, [])
        callback = nw.lightning.DecayCallback(adopt=True)
        fit = trainer(tmp_path, callback)
        module = made()
        fit.fit(module, data(), ckpt_path=path)
        (decay,) = callback.decays
        assert decay.steps == 12
        by_param = {id(p): g for g in fit.optimizers[0].param_groups for p in g["params"]}
        assert by_param[id(module.net[0].weight)]["weight_decay"] == 0
        assert by_param[id(module.net[3].weight)]["weight_decay"] == 0.1
        assert "over 12 steps" in decay.explain()


@pytest.mark.parametrize("extended", ["keep", "anew"])
def test_a_training_that_is_extended(extended: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = nw.lightning.DecayCallback()
    path = checkpoint(tmp_path, [first])
    callback = nw.lightning.DecayCallback(extended=extended)
    trainer(tmp_path, callback, epochs=8).fit(made(), data(), ckpt_path=path)
    (before,), (now,) = first.decays, callback.decays
    if extended == "keep":
        assert now.rule == before.rule
        assert now.steps == 48
        assert "made for 24 steps, and the training now has 48: λ is kept" in caplog.text
    else:
        assert now.rule != before.rule
        assert now.steps == 36
        assert "over 36 steps" in now.explain()


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, [nw.lightning.DecayCallback(rule=nw.L2(0.1))])
    fit = trainer(tmp_path, nw.lightning.DecayCallback(rule=nw.L2(0.2)))
    with pytest.raises(ValueError, match=r"made with the rule .*0.1.*give the same"):
        fit.fit(made(), data(), ckpt_path=path)


def test_a_second_fit(tmp_path: Path) -> None:
    callback = nw.lightning.DecayCallback()
    module = made()
    for _ in range(2):
        trainer(tmp_path, callback).fit(module, data())
        assert [decay.steps for decay in callback.decays] == [24]


def test_the_random_state_is_as_without_a_plan(tmp_path: Path) -> None:
    plan = nw.plan(made(), list(data())[:4], progress=False)
    results = []
    choices: list[dict[str, Any]] = [{}, {"plan": plan}]
    for settings in choices:
        module = made()
        torch.manual_seed(3)
        trainer(tmp_path, nw.lightning.DecayCallback(**settings)).fit(module, data(shuffle=True))
        results.append(weights(module))
    assert same(*results)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*next(iter(data(64)))[:2], strict=True)
        yield from data(48).dataset  # type: ignore[misc]


def test_data_without_a_length(tmp_path: Path) -> None:
    loader = DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match=r"number of steps is unknown.*Trainer\(max_steps"):
        trainer(tmp_path, nw.lightning.DecayCallback(), epochs=2).fit(made(), loader)
    callback = nw.lightning.DecayCallback()
    trainer(tmp_path, callback, epochs=-1, max_steps=10).fit(made(), loader)
    assert callback.decays[0].steps == 10
    with pytest.raises(ValueError, match=r"once per epoch.*total_time="):
        trainer(tmp_path, nw.lightning.DecayCallback(), epochs=-1, max_steps=10).fit(
            made(schedule="epoch"), loader
        )
    callback = nw.lightning.DecayCallback(total_time=0.5)
    trainer(tmp_path, callback, epochs=-1, max_steps=10).fit(made(schedule="epoch"), loader)
    assert "0.5 as given" in callback.decays[0].explain()


class Adversaries(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.other = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.automatic_optimization = False

    def forward(self, x: Tensor) -> Any:
        return self.net(x), self.other(x)

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        x, y = batch
        for optimizer, outputs in zip(self.optimizers(), self(x), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(outputs, y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.net.parameters(), lr=0.01),
            torch.optim.SGD(self.other.parameters(), lr=0.1, weight_decay=0.2),
        ]


def test_several_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"manual optimization .*total_steps="):
        trainer(tmp_path, nw.lightning.DecayCallback()).fit(Adversaries(), data())
    callback = nw.lightning.DecayCallback(total_steps=24)
    module = Adversaries()
    fit = trainer(tmp_path, callback)
    fit.fit(module, data())
    assert [decay.steps for decay in callback.decays] == [24, 24]
    assert [type(decay.optimizer).__name__ for decay in callback.decays] == ["AdamW", "SGD"]


class WithoutForward(Net):
    forward = L.LightningModule.forward

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log_dict({"loss": loss})
        return loss


def test_a_plan_from_the_loss_of_training_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches: DataLoader[Any] = DataLoader([{"x": x, "y": y} for x, y in data()], batch_size=None)  # type: ignore[arg-type]
    callback = nw.lightning.DecayCallback()
    trainer(tmp_path, callback).fit(WithoutForward(), batches)
    assert callback.plan is not None
    assert callback.plan.verdicts["net.0.weight"] == "shrink"
    assert callback.decays[0].steps == 24


class Broken(Net):
    def forward(self, x: Tensor) -> Any:
        raise RuntimeError("no such layer")


def test_a_model_that_fails_on_its_batches(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no plan can be made.*no such layer.*give forward="):
        trainer(tmp_path, nw.lightning.DecayCallback()).fit(Broken(), data())


def test_nothing_to_decay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    module = Plain()
    callback = nw.lightning.DecayCallback()
    fit = trainer(tmp_path, callback)
    fit.fit(module, data())
    assert callback.decays == []
    assert len(fit.optimizers[0].param_groups) == 1
    assert "nothing in this model is scale-invariant" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
    ],
)
@pytest.mark.one_in(2)
def test_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = nw.lightning.DecayCallback()
    trainer(tmp_path, callback, **settings).fit(made(), data())
    assert callback.decays[0].steps == (12 if "accumulate_grad_batches" in settings else 24)


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    callback = nw.lightning.DecayCallback()
    averaging = L.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    trainer(tmp_path, [callback, averaging]).fit(made(), data())
    assert callback.decays[0].steps == 25  # the Trainer calls step() once more, without gradients


def test_an_exponential_average_of_the_weights(tmp_path: Path) -> None:
    """The average is of the decayed weights, and the training is as without it."""
    averaging = getattr(L.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("EMAWeightAveraging is of Lightning 2.6")
    alone = made()
    trainer(tmp_path, nw.lightning.DecayCallback()).fit(alone, data())
    module, callback, seen = made(), nw.lightning.DecayCallback(), []

    class Note(L.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(weights(module)[0])

    trainer(tmp_path, [callback, averaging(decay=0.5), Note()]).fit(module, data())
    assert callback.decays[0].steps == 24
    assert torch.equal(seen[-1], weights(alone)[0])
    average = seen[0]
    for weight in seen:
        average = torch.lerp(weight, average, 0.5)
    torch.testing.assert_close(weights(module)[0], average, rtol=1e-3, atol=1e-4)


def test_steps_that_a_scaler_skips_are_not_decayed(tmp_path: Path) -> None:
    """In precision 16-mixed: gradients overflow until the scale has been halved often enough."""
    precision = pytest.importorskip("lightning.pytorch.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, growth_interval=1000)
    before, norms = made(), []

    class Note(L.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            norms.append(float(weights(module)[0].norm()))

    module, callback = made(), nw.lightning.DecayCallback(start="as is")
    plugin = precision.MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer(tmp_path, [callback, Note()], plugins=[plugin]).fit(module, data())
    skipped = round(28 - torch.tensor(scaler.get_scale()).log2().item())
    assert 0 < skipped < 24
    assert callback.decays[0].steps == 24 - skipped
    assert norms[:skipped] == [float(weights(before)[0].norm())] * skipped
    assert norms[skipped] != norms[skipped - 1]


def test_fabric_in_two_lines() -> None:
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)

    def job() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))
        plan = nw.plan(net, list(data())[:4], progress=False)
        optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1, momentum=0.9)
        model, wrapped = fabric.setup(net, optimizer)
        return model, wrapped, plan.attach(wrapped, total_steps=12)

    def train(model: nn.Module, optimizer: Any, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in data():
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()

    whole, stopped, resumed = job(), job(), job()
    train(*whole[:2], 2)
    train(*stopped[:2], 1)
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(stopped[1].state_dict())
    assert resumed[2].steps == 6
    train(*resumed[:2], 1)
    assert same(weights(whole[0]), weights(resumed[0]))
    assert whole[2].steps == 12


def test_bad_arguments() -> None:
    for settings, message in (
        ({"plan": 3}, "plan must be"),
        ({"rule": 3}, "rule must be"),
        ({"extended": "no"}, "extended='no'"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"monitor": 0}, "monitor=0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message), contextlib.nullcontext():
            nw.lightning.DecayCallback(**settings)


def test_the_monitor_goes_to_the_trainers_loggers(tmp_path: Path) -> None:

    class Rows(L.loggers.logger.DummyLogger):  # type: ignore[misc, name-defined]
        rows: dict[int, dict[str, float]]

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("normwise/") for name in metrics):
                self.rows[step] = metrics

    def fit(epochs: int, *more: Any, monitor: int | None = 5, **settings: Any) -> tuple[Any, Any]:
        logger = Rows()
        logger.rows = {}
        callback = nw.lightning.DecayCallback(monitor=monitor)
        made_by = L.Trainer(
            default_root_dir=tmp_path, max_epochs=4, accelerator="cpu", logger=logger,
            callbacks=[callback, *more], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        made_by.fit(made(), data(), **settings)
        made_by.save_checkpoint(tmp_path / "monitored.ckpt")
        return callback, logger.rows

    callback, rows = fit(4)
    assert sorted(rows) == [1, 5, 10, 15, 20]
    assert callback.monitor.steps == 24
    fit(4, StopAfter(2))
    resumed, rest = fit(4, ckpt_path=tmp_path / "monitored.ckpt")
    assert sorted(rest) == [15, 20]
    assert rest[20] == rows[20]
    assert resumed.monitor.steps == 24
    none, _ = fit(4, monitor=None)
    assert none.monitor is None
