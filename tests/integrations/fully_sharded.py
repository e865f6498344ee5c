"""Trainings by trainers that shard the model with FSDP2, on two processes; run by test_fully_sharded.py."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.integrations.two_processes import Net, dataset, on_two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

import normwise as nw

STEPS = 16  # two epochs of 64 samples, 4 on each rank
RULES: dict[str, dict[str, Any]] = {
    "nothing given": {},
    "scheduled": {"rule": nw.L2(lambda step: 0.5 / (1 + step))},
    "sphere": {"rule": nw.Sphere()},
    "every": {"rule": nw.AdaptiveWeightShrink(0.5), "every": 3},
}


def built(module: nn.Module, schedule: Callable[[int], float]) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def planned(model: nn.Module) -> nw.Plan:
    return nw.plan(model, list(DataLoader(dataset(), batch_size=4))[:4], progress=False)


def wholes(model: nn.Module) -> list[Tensor]:
    params = [p.detach() for p in model.parameters()]
    return [p.full_tensor().clone() if isinstance(p, DTensor) else p.clone() for p in params]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def alone(name: str, schedule: Callable[[int], float]) -> list[Tensor]:
    """Return the weights after a training in one process, in a loop without a trainer."""
    net = Net()
    plan, settings = planned(net), dict(RULES[name])
    rest = [p for p in net.parameters() if p is not net.first.weight]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.1}, {"params": [net.first.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    if settings:
        nw.Decay(optimizer, settings.pop("rule"), plan.units, **settings)
    else:
        plan.attach(optimizer, scheduler=scheduler, total_steps=STEPS)
    for _ in range(2):
        for x, y in DataLoader(dataset(), batch_size=8):
            optimizer.zero_grad()
            net(x, y)[0].backward()
            optimizer.step()
            scheduler.step()
    return wholes(net)


def lightning_fit(folder: Path, seed: int, callbacks: list[Any], **settings: Any) -> tuple[Any, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(seed)

        def forward(self, *batch: Tensor) -> Any:
            return self.net(*batch)

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.first, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(*batch)[0]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = built(self, lambda step: 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Module()
    for callback in callbacks:
        if isinstance(callback, functools.partial):
            callbacks = [callback(plan=planned(module)), *(c for c in callbacks if c is not callback)]
    path, one_file = settings.pop("path", None), settings.pop("one_file", False)
    given = {"max_epochs": 2, **settings}
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not one_file)
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=2, strategy=strategy, logger=False,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, **given,
    )  # fmt: skip
    sampler: Any = DistributedSampler(dataset(), 2, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(dataset(), batch_size=4, sampler=sampler), ckpt_path=path)
    return module, trainer


def stop() -> Any:
    import lightning.pytorch as pl

    class Stop(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

    return Stop()


def with_lightning(name: str, folder: Path, one_file: bool = False) -> dict[str, Any]:
    callback = functools.partial(nw.lightning.DecayCallback, **RULES[name])
    path = folder / "a.ckpt"
    whole, _ = lightning_fit(folder, 0, [callback])
    _, trainer = lightning_fit(folder, 0, [callback, stop()], one_file=one_file)
    trainer.save_checkpoint(path)
    resumed, trainer = lightning_fit(folder, 3, [callback], path=path, one_file=one_file)
    (used,) = [c for c in trainer.callbacks if isinstance(c, nw.lightning.DecayCallback)]
    return {
        "off": difference(wholes(whole), alone(name, lambda step: 0.9**step)),
        "resumed": same(wholes(resumed), wholes(whole)),
        "sharded": all(isinstance(p, DTensor) for p in resumed.parameters()),
        "steps": used.decays[0].steps,
        "observed": used.monitor.steps,
        "weights": [float(w.double().sum()) for w in wholes(resumed)],
    }


def with_lightning_that_began_otherwise(folder: Path) -> dict[str, Any]:
    """A model without its plan; a checkpoint without the callback; and one of a training that is extended."""
    callback, said = nw.lightning.DecayCallback, {}
    path, partial = folder / "a.ckpt", functools.partial(nw.lightning.DecayCallback)
    try:
        lightning_fit(folder, 0, [callback()])
    except (RuntimeError, ValueError) as error:
        said["no plan"] = str(error)
    _, trainer = lightning_fit(folder, 0, [stop()])
    trainer.save_checkpoint(path)
    try:
        lightning_fit(folder, 0, [partial], path=path)
    except ValueError as error:
        said["without"] = str(error)
    adopted, trainer = lightning_fit(folder, 0, [functools.partial(partial, adopt=True)], path=path)
    (used,) = [c for c in trainer.callbacks if isinstance(c, callback)]
    decays = {
        name: group["weight_decay"]
        for name, p in adopted.named_parameters()
        for group in trainer.optimizers[0].param_groups
        if any(p is q for q in group["params"])
    }
    trainer.save_checkpoint(path)
    _, trainer = lightning_fit(folder, 0, [partial], path=path, max_epochs=3)
    (kept,) = [c for c in trainer.callbacks if isinstance(c, callback)]
    return {
        **said,
        "adopted": [used.decays[0].steps, decays["net.first.weight"], decays["net.head.weight"]],
        "extended": [kept.decays[0].steps, kept.decays[0].rule == used.decays[0].rule],
    }


def pretend_that_there_are_gpus(plugin: Any) -> None:
    """Make Accelerate shard: on CPUs it takes DDP, whatever the plugin."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def with_accelerate(name: str, folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    def job(seed: int) -> tuple[Any, ...]:
        net = Net(seed)
        plan, settings = planned(net), dict(RULES[name])
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, reshard_after_forward=True,
            auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=10,
        )  # fmt: skip
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        pretend_that_there_are_gpus(plugin)
        optimizer, scheduler = built(net, lambda step: 0.9**step)
        loader = DataLoader(dataset(), batch_size=4)
        model, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
        if not settings:
            settings = {"scheduler": scheduler, "total_steps": STEPS}
        decay = nw.accelerate.attach(accelerator, model, optimizer, plan=plan, **settings)
        return accelerator, model, optimizer, loader, scheduler, decay

    def train(parts: tuple[Any, ...]) -> None:
        accelerator, model, optimizer, loader, scheduler, _ = parts
        for x, y in loader:
            accelerator.backward(model(x, y)[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    whole, stopped, resumed = job(0), job(0), job(3)
    train(whole)
    train(whole)
    train(stopped)
    stopped[0].save_state(str(folder))
    stopped[0].wait_for_everyone()
    resumed[0].load_state(str(folder))
    train(resumed)
    return {
        # its schedule steps twice per step
        "off": difference(wholes(whole[1]), alone(name, lambda step: 0.9 ** (2 * step))),
        "resumed": same(wholes(resumed[1]), wholes(whole[1])),
        "sharded": all(isinstance(p, DTensor) for p in resumed[1].parameters()),
        "steps": resumed[5].steps,
        "weights": [float(w.double().sum()) for w in wholes(resumed[1])],
    }


def with_transformers(name: str, folder: Path) -> dict[str, Any]:
    import accelerate
    import transformers

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == 7:
                control.should_save = control.should_training_stop = True

    class Sequential(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer, self.lr_scheduler = built(self.model, lambda step: 0.9**step)
            return self.optimizer

    def accelerator(*arguments: Any, **settings: Any) -> Any:
        made = accelerate.Accelerator(*arguments, **settings)
        pretend_that_there_are_gpus(settings["fsdp_plugin"])
        return made

    transformers.trainer.Accelerator = accelerator

    def train(seed: int, where: Path, *more: Any, resume: bool = False) -> tuple[Any, Any]:
        model = Net(seed)
        callback = nw.transformers.DecayCallback(plan=planned(model), **RULES[name])
        args = transformers.TrainingArguments(
            output_dir=str(where), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=4,
            num_train_epochs=2, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            remove_unused_columns=False, max_grad_norm=0.0, fsdp=True,
            fsdp_config={"version": 2, "auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10},
        )  # fmt: skip
        trainer = Sequential(
            model=model,
            args=args,
            train_dataset=[{"x": x, "labels": y} for x, y in dataset()],  # type: ignore[attr-defined]
            callbacks=[callback, *more],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, callback

    whole, _ = train(0, folder / "whole")
    train(0, folder, Stop())
    resumed, callback = train(3, folder, resume=True)
    return {
        "off": difference(wholes(whole), alone(name, lambda step: 0.9**step)),
        "resumed": same(wholes(resumed), wholes(whole)),
        "sharded": all(isinstance(p, DTensor) for p in resumed.parameters()),
        "steps": callback.decays[0].steps,
        "observed": callback.monitor.steps,
        "weights": [float(w.double().sum()) for w in wholes(resumed)],
    }


JOBS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "lightning, began otherwise": ("lightning.pytorch", with_lightning_that_began_otherwise),
    "lightning, one file": (
        "lightning.pytorch",
        functools.partial(with_lightning, "nothing given", one_file=True),
    ),
    **{
        f"lightning, {name}": ("lightning.pytorch", functools.partial(with_lightning, name)) for name in RULES
    },
    **{
        f"transformers, {name}": ("transformers.trainer", functools.partial(with_transformers, name))
        for name in RULES
    },
    **{f"accelerate, {name}": ("accelerate", functools.partial(with_accelerate, name)) for name in RULES},
}

if __name__ == "__main__":
    imported, job = JOBS[sys.argv[1]]
    sys.exit(on_two_processes(job, imported, Path(sys.argv[2])))
