"""Where converted and folded models go: copies, averages, exports, other devices."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.normalization.reference import KINDS, network, originals, weight_of
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import normwise as nw


@pytest.mark.parametrize("kind", KINDS)
def test_copies_averages_and_recomputation(kind: str) -> None:
    model, x = network(kind), torch.randn(2, 3, 5, 5)
    y = model(x)
    y.sum().backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(x), y)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    values = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, values, (x,)), y)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exponential_average_during_training_averages_the_originals(kind: str) -> None:
    model, x = network(kind), torch.randn(4, 3, 5, 5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected: list[Tensor] = []
    for k in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        values = [p.detach().clone() for p in model.parameters()]
        expected = values if k == 0 else [(e + v) / 2 for e, v in zip(expected, values, strict=True)]
    torch.testing.assert_close([p.detach() for p in averaged.module.parameters()], expected)
    assert bool(averaged(x).isfinite().all())
    nw.fold(averaged.module)
    torch.testing.assert_close(copy.deepcopy(averaged)(x), averaged(x))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_then_materialised(kind: str) -> None:
    with torch.device("meta"):
        model = network(kind)
    state = network(kind).state_dict()
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(x), network(kind)(x))


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # export of torch 2.6 speaks of its own nodes
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str, fold: bool) -> None:
    model, x = network(kind).eval(), torch.randn(2, 3, 5, 5)
    y = model(x)
    if fold:
        nw.fold(model)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), y, rtol=1e-5, atol=1e-4)  # rounded differently


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_export_after_folding(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, x = network("weight_standardization").eval(), torch.randn(2, 3, 5, 5)
    y = model(x)
    nw.fold(model)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    graph = onnx.load(tmp_path / "model.onnx")
    (computed,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(np.asarray(computed, np.float32), y.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_double_conversion_of_a_copy_leaves_the_original_alone() -> None:
    model = network("weight_norm")
    copied = copy.deepcopy(model)
    nw.fold(copied)
    nw.convert(copied, "centered_weight_norm")
    assert len(originals(model[0])) == 2
    assert weight_of(model[0]).shape == weight_of(copied[0]).shape
