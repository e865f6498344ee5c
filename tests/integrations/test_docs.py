"""What docs/integrations.md shows works as it stands there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw

TEXT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text("utf-8")
LIGHTNING, FABRIC, TRANSFORMERS, ACCELERATE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.norm(self.first(x)))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def names(tmp_path: Path) -> dict[str, Any]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "nw": nw,
        "model": model,
        "batches": [torch.randn(8, 6)],
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000),
        "loader": DataLoader(TensorDataset(torch.randn(16, 6)), batch_size=8),
    }


def run(block: str, given: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|transformers|accelerate|torch")
        exec(compile(block, "integrations.md", "exec"), given)
    return given


def test_lightning(tmp_path: Path) -> None:
    given = run(LIGHTNING, {"nw": nw, "L": pytest.importorskip("lightning.pytorch")})
    assert any(isinstance(c, nw.lightning.DecayCallback) for c in given["trainer"].callbacks)


def test_fabric(tmp_path: Path) -> None:
    given = names(tmp_path)
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    given["model"], given["optimizer"] = fabric.setup(given["model"], given["optimizer"])
    assert run(FABRIC, given)["decay"].steps == 0


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given = names(tmp_path) | {"Trainer": transformers.Trainer}
    given["args"] = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, disable_tqdm=True
    )
    given["data"] = [{"x": torch.randn(6), "labels": torch.tensor(k % 3)} for k in range(16)]
    trainer = run(TRANSFORMERS, given)["trainer"]
    trainer.train()
    (callback,) = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, nw.transformers.DecayCallback)
    ]
    assert callback.decays[0].steps == 2


def test_accelerate(tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    one_call, by_hand = ACCELERATE.split("\n\n")
    for block in (one_call, by_hand):
        given = names(tmp_path) | {"accelerator": accelerator}
        given["plan"] = nw.plan(given["model"], given["batches"])
        parts = ("model", "optimizer", "scheduler", "loader")
        given |= dict(zip(parts, accelerator.prepare(*(given[part] for part in parts)), strict=True))
        run(block, given)
        assert accelerator._custom_objects.pop().steps == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
