"""Where the language model is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.lab.small import text
from torch import Tensor

from normwise.lab.engine.run import Metrics
from normwise.lab.models.gpt import GPT
from normwise.lab.runs import text as text_module
from normwise.lab.runs.devices import Execution


def test_the_cpu_is_the_default() -> None:
    lines: list[list[Metrics]] = [[], []]
    run = text(decayed="matrices")
    assert run.run(lines[0].append) == run.run_in(None, Execution(device="cpu"), lines[1].append)
    assert lines[0] == lines[1]


def test_a_device_that_is_not_here_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"--device cuda:99 is not possible: torch .* finds cpu"):
        text().run_in(None, Execution(device="cuda:99"), lambda line: None)


@pytest.mark.parametrize(
    "changes",
    [
        {"decayed": "matrices"},
        {"decayed": "invariant", "start": "equilibrium"},
        {"decayed": "invariant", "scaled": "stream", "init_scale": 100.0},
        {"optimizer": "muon"},
    ],
)
def test_nothing_stays_on_the_cpu(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", which has no values, an operation with a tensor of the CPU raises."""
    real = text_module._loss
    losses: list[Tensor] = []

    def loss(model: GPT, sequences: Tensor) -> Tensor:
        losses.append(real(model, sequences))
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "device_named", lambda name: torch.device("meta"))
    monkeypatch.setattr(text_module, "_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        text(**changes).run_in(None, Execution(device="cuda"), lambda line: None)
    assert losses[0].device.type == "meta"
