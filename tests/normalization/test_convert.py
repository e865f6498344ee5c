"""convert and fold on whole models, with and without an optimizer."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from tests.normalization.reference import KINDS, originals, weight_of
from tests.normalization.test_modules import wrap_legacy
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import normwise as nw
from normwise.normalization.convert import Conversion


class Everything(nn.Module):
    """A small model with every kind of layer that convert knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3)
        self.attention = nn.MultiheadAttention(6, 2)
        self.cross = nn.MultiheadAttention(6, 2, kdim=4, vdim=4)
        self.bilinear = nn.Bilinear(6, 6, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.transposed = nn.ConvTranspose1d(6, 4, 3, groups=2)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.attention(x, x, x)
        x, _ = self.cross(x, x[..., :4], x[..., :4])
        z = self.cell(x[0])
        x = self.norm(self.conv(self.bilinear(x, x).transpose(1, 2)))
        out: Tensor = self.head(self.transposed(x).transpose(1, 2)).square().mean() + z.square().mean()
        return out


TOKENS = torch.arange(14).reshape(7, 2) % 11


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gain", [None, False, True])
def test_round_trip_of_a_model_with_every_layer(kind: str, gain: bool | None) -> None:
    torch.manual_seed(0)
    model = Everything()
    keys, order = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    y = model(TOKENS)
    names = nw.convert(model, kind, skip=["head"], gain=gain)
    assert len(names) == 24
    assert not any("head" in n or "norm" in n or "bias" in n for n in names)
    preserved = kind == "weight_norm" and gain is not False
    assert names.not_preserved == (() if preserved else tuple(names))
    if preserved:
        torch.testing.assert_close(model(TOKENS), y)
    converted = model(TOKENS)
    copied = copy.deepcopy(model)
    assert nw.fold(copied) == names
    torch.testing.assert_close(copied(TOKENS), converted)
    torch.testing.assert_close(model(TOKENS), converted)  # folding a copy leaves the original alone
    assert list(copied.state_dict()) == keys
    assert [n for n, _ in copied.named_parameters()] == order
    assert nw.convert(copied, "weight_norm", skip=["head"]) == names
    torch.testing.assert_close(copied(TOKENS), converted)


def test_nothing_is_left_after_folding() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_spectral = torch.nn.utils.spectral_norm(nn.Linear(5, 5))
    model = nn.Sequential(
        nw.weight_norm(nn.Linear(5, 5)),
        nw.weight_standardization(nn.Linear(5, 5), gain=True),
        torch_parametrizations.weight_norm(nn.Linear(5, 5)),
        torch_parametrizations.spectral_norm(nn.Linear(5, 5)),
        torch_parametrizations.orthogonal(nn.Linear(5, 5)),
        wrap_legacy(nn.Linear(5, 5)),
        old_spectral,
    )
    x = torch.randn(3, 5)
    model(x)
    model.eval()
    y = model(x)
    model.train()
    with torch.no_grad():
        assert len(nw.fold(model)) == 7
    torch.testing.assert_close(model(x), y)
    for layer in model:
        assert type(layer) is nn.Linear
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.requires_grad
        hooks = [value for key, value in vars(layer).items() if "hook" in key and isinstance(value, dict)]
        assert not any(hooks)
        assert set(vars(layer)) == set(vars(nn.Linear(5, 5)))
    buffer = BytesIO()
    torch.save(model, buffer)
    restored: nn.Module = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(restored(x), y)


def test_folding_exact_where_torchs_is_not() -> None:
    layer = wrap_legacy(nn.Linear(4, 3))
    with torch.no_grad():
        weight_of(layer, "weight_v")[0] = 0.0
        weight_of(layer, "weight_v")[1] *= 1e25
    nw.fold(layer)
    assert bool(weight_of(layer).isfinite().all())
    assert bool((weight_of(layer)[0] == 0).all())


def test_folding_keeps_frozen_weights_frozen_and_other_parametrizations() -> None:
    layer = nw.weight_norm(nn.Linear(4, 3).requires_grad_(False))
    nw.fold(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    both = nn.Linear(4, 3)
    torch.nn.utils.parametrize.register_parametrization(both, "bias", nn.Tanh())
    plain = copy.deepcopy(both)  # shares the class with the original
    nw.weight_norm(both)
    assert isinstance(plain.weight, nn.Parameter)
    bias = both.bias.detach().clone()
    copied = copy.deepcopy(both)
    assert nw.fold(both) == ["weight"]
    assert torch.nn.utils.parametrize.is_parametrized(both, "bias")
    torch.testing.assert_close(both.bias, bias)
    copied(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: nw.convert(_sequence(nw.weight_norm(nn.Linear(4, 3))), "weight_norm"),
            "'1.weight'.*fold it",
        ),
        (lambda: nw.convert(_sequence(wrap_legacy(nn.Linear(4, 3))), "weight_norm"), "'1.weight'.*fold it"),
        (lambda: nw.convert(_tied(), "weight_norm"), "0.weight and 1.weight are one parameter"),
        (lambda: nw.convert(_tied(), "weight_norm", skip=["1"]), "0.weight and 1.weight are one parameter"),
        (lambda: nw.convert(_sequence(nn.Linear(1, 4)), "weight_norm"), "'1.weight'.*no direction"),
        (
            lambda: nw.convert(nn.Linear(4, 3), "weight_standardization", preserve=True),
            "would change.* weight",
        ),
        (lambda: nw.convert(nn.Linear(4, 3), "wn"), "give one of weight_norm"),
        (lambda: nw.convert(nn.Linear(4, 3), "weight_norm", skip=["haed"]), "haed"),
        (lambda: nw.convert(nn.Linear(4, 3), "weight_norm", eps=1e-5), "eps"),
        (lambda: nw.convert(nn.Linear(4, 3), "weight_norm", variant="pytorch_insight"), "omit gain"),
        (
            lambda: nw.convert(nn.Linear(4, 3), "weight_standardization", variant="insight"),
            "'insight' is unk",
        ),
        (
            lambda: nw.convert(_sequence(nn.Embedding(9, 4, sparse=True)), "weight_norm"),
            "'1.weight'.*sparse=F",
        ),
        (
            lambda: nw.convert(_sequence(nn.EmbeddingBag(9, 4, sparse=True)), "weight_norm"),
            "'1.weight'.*sparse",
        ),
        (lambda: nw.weight_standardization(nn.Embedding(9, 4, sparse=True)), "'weight'.*sparse gradients"),
    ],
)
def test_refusals_name_the_layer(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def _sequence(second: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), second)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_a_refusal_changes_nothing_and_skipping_tied_weights_works() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(1, 4))
    with pytest.raises(ValueError, match="no direction"):
        nw.convert(model, "weight_norm")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert nw.convert(_tied(), "weight_norm", skip=["0", "1"]) == []


def test_skip_by_names_of_modules_and_weights_and_by_predicates() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))

    assert nw.convert(model(), "weight_norm", skip=["0"]) == ["1.weight"]
    assert nw.convert(model(), "weight_norm", skip={"0.1", "1.weight"}) == ["0.0.weight"]
    assert nw.convert(model(), "weight_norm", skip=lambda name: name.startswith("0.")) == ["1.weight"]
    assert nw.convert(model(), "weight_norm", skip=lambda name, module: module.in_features == 4) == []
    with pytest.raises(TypeError, match="not a string"):
        nw.convert(model(), "weight_norm", skip="0")
    zero_mean = nn.Linear(4, 2)
    with torch.no_grad():
        zero_mean.weight.copy_(torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.5, 0.5, -0.5, -0.5]]))
    names = nw.convert(zero_mean, "weight_standardization", gain=True, preserve=True)
    assert isinstance(names, Conversion)
    assert names.not_preserved == ()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.01),
}


def _groups(model: nn.Module, decayed: bool) -> Any:
    """Return the groups of a new optimizer: if it decays weights, gains stand in a group without decay."""
    named = list(model.named_parameters())
    gains = [(name, p) for name, p in named if name.endswith("original0")]
    if not (decayed and gains):
        return named
    rest = [(name, p) for name, p in named if not name.endswith("original0")]
    return [{"params": rest}, {"params": gains, "weight_decay": 0.0}]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_moves_along(optimizer_name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 6)
    optimizer = OPTIMIZERS[optimizer_name](model.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    state = optimizer.state[weight_of(model[0])]
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    nw.convert(model, kind, skip=["2"], optimizer=optimizer)
    fresh = OPTIMIZERS[optimizer_name](_groups(model, optimizer_name == "adamw"))
    for group, expected_group in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected_group["params"]]
        assert {**group, "params": None} == {**expected_group, "params": None}
    assert set(optimizer.state) <= set(model.parameters())
    weight = originals(model[0])[-1]
    assert set(optimizer.state[weight]) == set(state)
    if kind == "weight_norm" and optimizer_name == "adamw":
        gain = originals(model[0])[0]
        w, m = weight.detach(), state["exp_avg"]
        unit = w / w.norm(dim=1, keepdim=True)
        along = (unit * m).sum(1, keepdim=True)
        torch.testing.assert_close(optimizer.state[gain]["exp_avg"], along)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], m - unit * along)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], state["exp_avg_sq"])
        expected = (unit.square() * state["exp_avg_sq"]).sum(1, keepdim=True)
        torch.testing.assert_close(optimizer.state[gain]["exp_avg_sq"], expected)
        assert optimizer.state[gain]["step"] == state["step"]
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    rebuilt = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    nw.convert(rebuilt, kind, skip=["2"])
    resumed = OPTIMIZERS[optimizer_name](_groups(rebuilt, optimizer_name == "adamw"))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_momentum_carries_on_as_if_it_had_always_been_the_converted_model() -> None:
    """Momentum is linear in gradients, so the next step of the directions has the old momentum, projected."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-4, momentum=0.9)
    layer(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    before, momentum = layer.weight.detach().clone(), optimizer.state[layer.weight]["momentum_buffer"].clone()
    nw.convert(layer, "weight_norm", optimizer=optimizer)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close((weight_of(layer) - before) / 1e-4, -0.9 * momentum, rtol=1e-2, atol=1e-2)


def test_gains_go_to_a_group_without_decay_in_the_order_of_the_model() -> None:
    model = Everything()
    scale = nn.Parameter(torch.ones(1))
    free: dict[str, Any] = {"params": [scale], "weight_decay": 0.0}
    groups = [{"params": list(model.parameters())}, {**free, "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, 0.1, weight_decay=0.1)
    names = nw.convert(model, "weight_norm", optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert optimizer.param_groups[1]["params"] == [scale]  # its learning rate is another
    added = optimizer.param_groups[2]
    expected = [p for name, p in model.named_parameters() if name.endswith("original0")]
    assert len(expected) == len(names)
    assert all(p is q for p, q in zip(added["params"], expected, strict=True))
    assert added["lr"] == 0.1
    nw.fold(model)
    groups = [{"params": list(model.parameters())}, free]
    optimizer = torch.optim.SGD(groups, 0.1, weight_decay=0.1)
    nw.convert(model, "weight_norm", optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups][1:] == [1 + len(names)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
def test_an_optimizer_that_cannot_take_the_gains_is_refused_before_anything_changes() -> None:
    model = nn.Linear(6, 5, bias=False)
    keys = list(model.state_dict())
    muon = torch.optim.Muon(model.parameters())
    scheduled = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.ConstantLR(scheduled)
    for optimizer, words in (
        (muon, "Muon would orthogonalise"),
        (scheduled, "before building the scheduler"),
    ):
        with pytest.raises(ValueError, match=words):
            nw.convert(model, "weight_norm", optimizer=optimizer)
        assert list(model.state_dict()) == keys
    nw.convert(model, "weight_norm", gain=False, optimizer=muon)
    assert muon.param_groups[0]["params"] == originals(model)


def test_checkpoints_of_pytorch_insights_weight_standardization_keep_their_outputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3)), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        weight_of(model[0]).mul_(1e-4)  # where the 1e-5 matters
    trained = []
    for layer, dim in zip(model, (0, 1), strict=True):
        w = weight_of(layer).detach().transpose(0, dim)
        centered = w - w.mean((1, 2, 3), keepdim=True)
        std = centered.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        trained.append((centered / std).transpose(0, dim))
    names = nw.convert(model, "weight_standardization", variant="pytorch_insight")
    assert names.not_preserved == tuple(names)
    for layer, expected in zip(model, trained, strict=True):
        torch.testing.assert_close(weight_of(layer), expected)
    y = model(x)
    assert nw.fold(model) == names
    torch.testing.assert_close(model(x), y)
