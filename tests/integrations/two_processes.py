"""Trainings on two processes, run by test_two_processes.py; writes what the test compares.

The processes are forks of one, so that torch and the trainer are imported once, and have the environment that
torchrun gives to its workers.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw

IMPORTED = {
    "accelerate": "accelerate",
    "lightning": "lightning.pytorch",
    "transformers": "transformers.trainer",
}


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.head = nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.relu(self.norm(self.first(x))))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    )


def digest(model: nn.Module) -> list[float]:
    return [float(p.detach().double().sum()) for p in model.parameters()]


def with_accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    def job(seed: int) -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True)
        net = Net(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        loader = DataLoader(dataset(), batch_size=4)
        model, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
        decay = nw.accelerate.attach(
            accelerator, model, optimizer, loader, scheduler=scheduler, total_steps=16
        )
        return accelerator, model, optimizer, loader, scheduler, decay

    def train(parts: tuple[Any, ...]) -> list[float]:
        accelerator, model, optimizer, loader, scheduler, _ = parts
        used = []
        for x, y in loader:
            used.append(optimizer.param_groups[0]["lr"])
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return used

    whole, stopped, resumed = job(0), job(0), job(3)
    used = train(whole) + train(whole)
    train(stopped)
    stopped[0].save_state(str(folder))
    stopped[0].wait_for_everyone()
    resumed[0].load_state(str(folder))
    train(resumed)
    return {
        "whole": digest(whole[1]),
        "resumed": digest(resumed[1]),
        "steps": resumed[5].steps,
        "rates": sum(used),
        "said": whole[5].explain(),
    }


def with_lightning(folder: Path) -> dict[str, Any]:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = Net(seed)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.net(*batch)[0]
            self.log("loss", loss)
            return loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    class Stop(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

    def fit(seed: int, *more: Any, path: Path | None = None) -> tuple[Module, Any, Any]:
        module, callback = Module(seed), nw.lightning.DecayCallback()
        trainer = pl.Trainer(
            default_root_dir=folder, max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[callback, *more],
        )  # fmt: skip
        trainer.fit(module, DataLoader(dataset(), batch_size=4), ckpt_path=path)
        return module, callback, trainer

    whole, _, _ = fit(0)
    _, _, trainer = fit(0, Stop())
    trainer.save_checkpoint(folder / "a.ckpt")
    resumed, callback, _ = fit(3, path=folder / "a.ckpt")
    return {
        "whole": digest(whole),
        "resumed": digest(resumed),
        "steps": callback.decays[0].steps,
        "shrunk": [name for name, verdict in callback.plan.verdicts.items() if verdict == "shrink"],
    }


def with_transformers(folder: Path) -> dict[str, Any]:
    import transformers

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == 7:
                control.should_save = control.should_training_stop = True

    def train(seed: int, where: Path, *more: Any, resume: bool = False) -> tuple[Net, Any]:
        model, callback = Net(seed), nw.transformers.DecayCallback()
        args = transformers.TrainingArguments(
            output_dir=str(where), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=4,
            num_train_epochs=2, weight_decay=0.1, learning_rate=0.01, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        data = [{"x": x, "labels": y} for x, y in dataset()]  # type: ignore[attr-defined]
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=data, callbacks=[callback, *more]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    whole, _ = train(0, folder / "whole")
    train(0, folder, Stop())
    resumed, callback = train(3, folder, resume=True)
    return {"whole": digest(whole), "resumed": digest(resumed), "steps": callback.decays[0].steps}


def work(rank: int, port: int, job: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    result = job(folder)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


def on_two_processes(job: Callable[[Path], dict[str, Any]], imported: str, folder: Path) -> int:
    """Run a job on two ranks, in forks of this process, which has imported the trainer."""
    warnings.simplefilter("ignore")
    importlib.import_module(imported)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, port, job, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    name = sys.argv[1]
    sys.exit(on_two_processes(globals()[f"with_{name}"], IMPORTED[name], Path(sys.argv[2])))
