"""Batches as people have them: loaders of pairs, of mappings, and models that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def _pairs() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, 3, 4, 4), torch.randint(0, 5, (16,))), 8)


def test_a_loader_of_pairs_serves_a_model_of_inputs_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = _net()
    plan = nw.plan(model, _pairs())
    (message,) = caplog.messages  # once, not for every pass
    assert "takes the first of the 2 parts" in message
    assert "forward=" in message
    assert plan.verdicts == nw.plan(model, [x for x, _ in _pairs()]).verdicts


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.net(x)
        return y if labels is None else nn.functional.cross_entropy(y, labels)


def test_a_model_that_takes_both_parts_gets_both(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = WithLoss(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    nw.plan(model, _pairs())
    assert set(seen) == {2}
    assert caplog.messages == []


class Failing(nn.Module):
    """Raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(3, 2), error

    def forward(self, *parts: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("image"),
        AssertionError(),
        AttributeError("a\nb"),
        ZeroDivisionError("x"),
        RuntimeError("x\ny"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("batch", "remedy"),
    [
        (torch.ones(4, 3), "or forward=:"),
        ((torch.ones(4, 3), torch.ones(4)), r"or forward=lambda model, batch: model\(batch\[0\]\)"),
    ],
    ids=["tensor", "pair"],
)
def test_whatever_the_model_raises_is_one_line_with_the_place(
    error: Exception, batch: Any, remedy: str
) -> None:
    with pytest.raises(RuntimeError, match=remedy) as caught:
        nw.plan(Failing(error), [batch])
    text = str(caught.value)
    assert "\n" not in text
    assert type(error).__name__ in text or type(error) is RuntimeError
    assert "(test_batches.py, line " in text


def test_a_mapping_that_the_model_does_not_take_is_one_line_with_the_exact_forward() -> None:
    x = torch.randn(16, 3, 4, 4)
    batch = {"image": x, "label": torch.zeros(16)}
    with pytest.raises(TypeError, match=r"forward=lambda model, batch: model\(batch\['image'\]\)"):
        nw.plan(_net(), [batch])
    model = _net()
    plan = nw.plan(model, [batch], forward=lambda model, batch: model(batch["image"]))
    assert plan.verdicts == nw.plan(model, [x]).verdicts


class OnlySingle(nn.Module):
    """Needs its mask, and computes in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and mask.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found Double")
        y: Tensor = self.norm(self.layer(x))
        return y if mask is None else y * mask


def test_a_mask_is_not_dropped_because_of_the_precision_of_the_probe(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inv = nw.find_invariances(OnlySingle(), [(torch.randn(8, 3), torch.ones(8, 1))])
    assert inv.stats.dtype == "float32"
    assert caplog.messages == []
