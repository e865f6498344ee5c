"""Decay beside every optimizer of the packages that are installed: without gradients, norms follow the flow.

An optimizer for which they do not must be refused by name. So this test finds the next optimizer that clears
gradients in its step, or keeps a second copy of the weights.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import normwise as nw

PACKAGES = (
    "torch.optim",
    "pytorch_optimizer",
    "schedulefree",
    "heavyball",
    "torchao.optim",
    "bitsandbytes.optim",
)
# They cannot take part: what they need beside a list of parameters and their gradients.
NEEDS = {
    "A2Grad": "no learning rate",
    "AdaHessian": "a graph of the gradients",
    "AdaLOMO": "a model",
    "AdamMini": "a model",
    "AdEMAMix32bit": "a GPU: on a CPU its own step fails",
    "AliG": "a closure",
    "CPUOffloadOptimizer": "a GPU",
    "DeMo": "another package",
    "DistributedMuon": "a process group",
    "GaLore": "gradients that are not zero",
    "Gravity": "steps without a gradient that are the same each time: its momentum begins at random",
    "HeavyKLShampoo": "a GPU: what torch compiles of its step fails on a CPU",
    "HeavyKLSOAP": "a GPU: what torch compiles of its step fails on a CPU",
    "KLShampoo": "a GPU: what torch compiles of its step fails on a CPU",
    "KLSOAP": "a GPU: what torch compiles of its step fails on a CPU",
    "LATHER": "gradients that are not zero",
    "LBFGS": "a closure",
    "LOMO": "a model",
    "PagedAdEMAMix32bit": "a GPU: on a CPU its own step fails",
    "PSGDBase": "a subclass",
    "PSGDKron": "gradients that are not zero",
    "PSGDLRA": "gradients that are not zero",
    "PSGDPRO": "gradients that are not zero",
    "PytorchLARS": "gradients that are not zero",
    "QSGD": "gradients that are not zero",
    "Ranger21": "the number of steps",  # tested in test_other_optimizers.py
    "SafeFP16Optimizer": "a copy of its own in float32, which is not the parameter",
    "SAMWrapper": "a closure",
    "SOAPBase": "a subclass",
    "SophiaH": "a graph of the gradients",
    "SparseAdam": "sparse gradients",
    "SplitOpt": "specifications of other optimizers",
    "SPlus": "a look at the weights that it steps: for evaluation it shows an average of earlier ones",
}
UNDECAYED = {"weight_decay": 0.0}


def _classes() -> Iterator[Any]:
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            continue
        marks = [pytest.mark.thorough] if package == "heavyball" else []  # it compiles each step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(package)
        for name, kind in sorted(vars(module).items()):
            usable = inspect.isclass(kind) and issubclass(kind, Optimizer) and kind.__name__ == name
            other_loop = name.endswith(("Closure", "SAM"))  # test_other_optimizers.py tests SAM
            if usable and kind is not Optimizer and name not in NEEDS and not other_loop:
                yield pytest.param(kind, id=f"{package}.{name}", marks=marks)


def _optimizer(kind: Any, weight: nn.Parameter) -> Optimizer:
    wrapped = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    with_momentum = {"lr": 0.01, "momentum": 0.9, **UNDECAYED}
    for settings in ({"lr": 0.01, **UNDECAYED}, {"lr": 0.01}, {}, with_momentum):
        for params in ([weight], [{"params": [weight], "use_muon": True}], wrapped):
            try:
                optimizer: Optimizer = kind(params, **settings)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                continue
            for group in optimizer.param_groups:
                group.update(UNDECAYED if "weight_decay" in group else {})
            return optimizer
    raise AssertionError(f"{kind.__name__} cannot be constructed: say in NEEDS why")


def _norms(kind: Any, steps: int, *, decayed: bool) -> tuple[torch.Tensor, float]:
    """Return the norms after some steps without gradient over those before, and the sum of learning rates."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = _optimizer(kind, weight)
    if decayed:
        nw.Decay(optimizer, nw.L2(1.0), weight)
    getattr(optimizer, "train", lambda: None)()
    before, passed = weight.detach().norm(dim=1).clone(), 0.0
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        passed += float(optimizer.param_groups[0]["lr"])
    getattr(optimizer, "eval", lambda: None)()
    return weight.detach().norm(dim=1) / before, passed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", list(_classes()))
def test_norms_follow_the_flow_or_the_optimizer_is_refused(kind: Any, steps: int) -> None:
    plain, _ = _norms(kind, steps, decayed=False)
    try:
        found, passed = _norms(kind, steps, decayed=True)
    except ValueError as error:
        assert f"{kind.__name__} " in str(error)  # noqa: PT017 it may also pass
        assert "undoes what a rule does" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found / plain, torch.full((6,), math.exp(-passed)), rtol=1e-3, atol=0.0)
