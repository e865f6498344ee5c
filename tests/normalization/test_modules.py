"""The family on modules: a drop-in for torch's weight_norm, every kind of layer, lost initialisations."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from tests.normalization.reference import KINDS, error_in_ulp, originals, reference, weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import normwise as nw
from normwise.normalization.fold import members

# Each layer with its inputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(5, 7), lambda: (torch.randn(3, 5),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: (torch.randn(2, 4, 9),)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: (torch.randn(2, 4, 7, 7),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), lambda: (torch.randn(1, 2, 4, 4, 4),)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: (torch.randn(2, 4, 5, 5),)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: (torch.randn(2, 4, 5),)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "embedding": (lambda: nn.Embedding(6, 5), lambda: (torch.tensor([0, 3, 3]),)),
}


def wrap_legacy(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: nn.Module = torch.nn.utils.weight_norm(layer, dim=dim)  # type: ignore[arg-type]
    return wrapped


@pytest.mark.parametrize("dim", [0, 1, -1, -2, None])
@pytest.mark.parametrize("layer", LAYERS)
def test_drop_in_for_torch_weight_norm(layer: str, dim: int | None) -> None:
    torch.manual_seed(0)
    build, inputs = LAYERS[layer]
    plain, x = build(), inputs()
    y = plain(*x)
    ours = nw.weight_norm(copy.deepcopy(plain), dim=dim)
    theirs = torch_parametrizations.weight_norm(copy.deepcopy(plain), dim=dim)  # type: ignore[arg-type]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    torch.testing.assert_close(ours(*x), y)
    for module in (ours, theirs):
        module(*x).square().sum().backward()
    for mine, other in zip(originals(ours), originals(theirs), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    nw.fold(ours)
    torch.testing.assert_close(ours(*x), y)


@pytest.mark.parametrize("layer", LAYERS)
def test_checkpoints_load_both_ways_and_from_the_older_form(layer: str) -> None:
    torch.manual_seed(0)
    build, inputs = LAYERS[layer]
    x = inputs()
    ours, theirs = nw.weight_norm(build()), torch_parametrizations.weight_norm(build())
    legacy = wrap_legacy(build())
    with torch.no_grad():
        for module in (ours, theirs, legacy):
            for p in module.parameters():
                p.mul_(torch.rand_like(p) + 0.5)
    for source, target in ((theirs, ours), (legacy, ours), (ours, theirs)):
        expected = source(*x)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(*x), expected)


@pytest.mark.parametrize(
    ("kind", "gain"),
    [(kind, gain) for kind in KINDS for gain in (False, True) if gain or kind != "weight_norm"],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_members_on_every_convolution_and_linear(kind: str, gain: bool, layer: str) -> None:
    torch.manual_seed(0)
    build, inputs = LAYERS[layer]
    plain = build()
    dim = 1 if "transposed" in layer else 0
    before = weight_of(plain).detach().clone()
    module = getattr(nw, kind)(plain, dim=dim, **({} if kind == "weight_norm" else {"gain": gain}))
    if gain:
        centered = (
            before
            if kind == "weight_norm"
            else before - before.mean([k for k in range(before.ndim) if k != dim], keepdim=True)
        )
        torch.testing.assert_close(weight_of(module), centered)
        assert originals(module)[0].shape == torch.Size(
            [s if k == dim else 1 for k, s in enumerate(before.shape)]
        )
    else:
        assert error_in_ulp(weight_of(module).detach(), reference(kind, before, dim), dim) < 4
    expected_keys = ["original0", "original1"] if gain else ["original"]
    assert [k.rpartition(".")[2] for k in module.state_dict() if "parametrizations" in k] == expected_keys
    module(*inputs()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in originals(module))


def test_scaled_standardization_of_normalizer_free_networks() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, groups=2)
    w = weight_of(conv).detach().clone()
    nw.weight_standardization(conv, fan_in_scale=True, gain=True)
    nn.init.ones_(originals(conv)[0])
    expected = reference("weight_standardization", w) / (3 * 3 * 3) ** 0.5
    torch.testing.assert_close(weight_of(conv), expected.float())
    deconv = nw.weight_standardization(nn.ConvTranspose1d(6, 8, 3, groups=2), dim=1, fan_in_scale=True)
    std = weight_of(deconv).transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(std, torch.full((4,), (3 * 3) ** -0.5))


def test_assigning_the_weight_sets_it() -> None:
    torch.manual_seed(0)
    layer, new = nw.weight_norm(nn.Linear(5, 3)), torch.randn(3, 5)
    layer.weight = new
    torch.testing.assert_close(weight_of(layer), new)


@pytest.mark.parametrize("kind", ["centered_weight_norm", "weight_standardization"])
@pytest.mark.parametrize("gain", [False, True])
def test_assigning_a_weight_that_the_member_cannot_hold_is_an_error(kind: str, gain: bool) -> None:
    torch.manual_seed(0)
    layer, other = (getattr(nw, kind)(nn.Linear(5, 3), gain=gain) for _ in range(2))
    before, key = weight_of(layer).detach(), f"parametrizations.weight.original{'1' if gain else ''}"
    with pytest.raises(ValueError, match=rf"'weight' of Linear.*mean 0.*set module\.{key}"):
        layer.weight = torch.randn(3, 5)
    torch.testing.assert_close(weight_of(layer), before, rtol=0, atol=0)
    layer.weight = weight_of(other).detach()
    torch.testing.assert_close(weight_of(layer), weight_of(other))
    nn.init.normal_(layer.get_parameter(key))  # the remedy
    layer(torch.randn(2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_row_and_a_huge_row_train_on(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 4)
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.weight[2] *= 1e25
    layer = getattr(nw, kind)(layer)
    layer(torch.randn(2, 9)).sum().backward()
    assert bool((weight_of(layer)[1] == 0).all())
    *_, weight = originals(layer)
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    assert bool((weight.grad[1] == 0).all())


@pytest.mark.parametrize(
    "initialise",
    [
        nn.init.normal_,
        nn.init.zeros_,
        nn.init.kaiming_uniform_,
        nn.init.orthogonal_,
        nn.init.trunc_normal_,
        lambda weight: weight.data.normal_(),
        lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_initialisation_is_never_silently_lost(kind: str, initialise: Callable[[Tensor], object]) -> None:
    x = torch.randn(2, 9)
    for use in (lambda m: m(x), lambda m: copy.deepcopy(m)(x), lambda m: m.state_dict(), nw.fold):
        layer = getattr(nw, kind)(nn.Linear(9, 4))
        initialise(layer.weight)
        with pytest.raises(RuntimeError, match="changed in place"):
            use(layer)


@pytest.mark.parametrize(
    ("build", "name", "use"),
    [
        (lambda: nn.Embedding(7, 4), "weight", lambda m, x: m(torch.tensor([1, 2]))),
        (lambda: nn.Bilinear(4, 4, 3), "weight", lambda m, x: m(x, x)),
        (lambda: nn.ConvTranspose1d(2, 4, 3, groups=2), "weight", lambda m, x: m(x)),
        (lambda: nn.LSTM(4, 5), "weight_hh_l0", lambda m, x: m(x)),
        (lambda: nn.GRUCell(4, 5), "weight_ih", lambda m, x: m(x[0])),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", lambda m, x: m(x, x, x)),
        (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight", lambda m, x: m(x, x, x)),
    ],
)
def test_an_initialisation_of_any_layer_is_never_silently_lost(
    build: Callable[[], nn.Module], name: str, use: Callable[[nn.Module, Tensor], object]
) -> None:
    layer, x = build(), torch.randn(3, 2, 4)
    nw.convert(layer, "weight_norm")
    owner, _, last = name.rpartition(".")
    nn.init.orthogonal_(weight_of(layer.get_submodule(owner), last))
    with pytest.raises(RuntimeError, match=f"{name}.* was changed in place"):
        use(layer, x)


def test_ordinary_use_of_the_weight_is_no_error() -> None:
    layer, x = nw.weight_norm(nn.Linear(9, 4)), torch.randn(2, 9)
    weight = weight_of(layer)
    weight.mul_(2)  # autograd's own operation on a result: allowed, as on torch's
    layer(x)
    with torch.no_grad():
        originals(layer)[1].normal_()
        layer(x)
    for original in originals(layer):
        weight = weight_of(layer)
        original.data.mul_(2)  # as optimizers do that predate no_grad
        layer(x)
    with parametrize.cached():
        layer(x)
        layer(x)
    layer.state_dict()
    limited = nw.weight_norm(nn.Embedding(10, 4, max_norm=0.1, padding_idx=0))
    for _ in range(3):
        limited(torch.tensor([0, 1, 2])).sum().backward()
    assert bool((weight_of(limited)[0] == 0).all())


def test_recurrent_layers() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(4, 5, 2, bidirectional=True), torch.randn(3, 2, 4)
    y = lstm(x)[0]
    for name in [n for n in lstm._parameters if n.startswith("weight")]:
        nw.weight_norm(lstm, name)
    torch.testing.assert_close(lstm(x)[0], y)
    lstm(x)[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())
    with torch.no_grad():
        originals(lstm, "weight_hh_l0")[0].zero_()
    changed = lstm(x)[0]
    assert not torch.allclose(changed, y)
    torch.testing.assert_close(copy.deepcopy(lstm)(x)[0], changed)


def test_attention_projections() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
    y = attention(x, x, x)[0]
    nw.weight_norm(attention, "in_proj_weight")
    nw.weight_norm(attention.out_proj)
    torch.testing.assert_close(attention(x, x, x)[0], y)
    attention.eval()
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], y)


def test_removal_by_torch_leaves_nothing_of_ours_behind() -> None:
    torch.manual_seed(0)
    layer, x = nw.weight_norm(nn.Linear(9, 4)), torch.randn(2, 9)
    y, copied = layer(x), copy.deepcopy(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert not any(value for key, value in vars(layer).items() if "hooks" in key)
    torch.testing.assert_close(layer(x), y)
    pickle.loads(pickle.dumps(layer.requires_grad_(False)))
    assert type(copied) is not nn.Linear


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: nw.weight_norm(nn.Linear(1, 4)),
            ValueError,
            r"'weight' of Linear\(in_features=1.*direction",
        ),
        (lambda: nw.weight_standardization(nn.Conv1d(1, 4, 2)), ValueError, r"Conv1d\(1, 4.*at least 3"),
        (lambda: nw.centered_weight_norm(nn.Linear(2, 4)), ValueError, "at least 3"),
        (
            lambda: nw.weight_norm(nn.Linear(3, 4), "wieght"),
            ValueError,
            r"choose one of \['bias', 'weight'\]",
        ),
        (lambda: nw.weight_norm(nn.Linear(3, 4), dim=2), ValueError, "out of range"),
        (lambda: nw.weight_norm(nw.weight_norm(nn.Linear(3, 4))), ValueError, "fold it first"),
        (lambda: nw.weight_norm(wrap_legacy(nn.Linear(3, 4))), ValueError, "fold it first"),
        (lambda: nw.weight_norm(nn.LazyLinear(3)), ValueError, "no shape yet"),
        (lambda: nw.weight_norm(torch.randn(3, 4)), TypeError, "nn.Module"),  # type: ignore[type-var]
        (lambda: nw.weight_standardization(nn.Linear(3, 4), eps=-1), ValueError, "eps"),
        (
            lambda: nw.weight_norm(
                nn.utils.skip_init(nn.Linear, 400, 2).half().requires_grad_(False).apply(_fill)
            ),
            ValueError,
            "wider type",
        ),
    ],
)
def test_errors_name_the_layer(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lazy layers are experimental
        with pytest.raises(error, match=words):
            call()


def _fill(module: nn.Module) -> None:
    weight_of(module).data.fill_(6e4)


def test_members_are_recognised_ours_and_torchs_old_and_new() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_spectral = torch.nn.utils.spectral_norm(nn.Linear(5, 5))
    model = nn.ModuleDict(
        {
            "ours": nw.centered_weight_norm(nn.ConvTranspose1d(4, 5, 3), dim=1),
            "new": torch_parametrizations.weight_norm(nn.Linear(5, 5), dim=None),  # type: ignore[arg-type]
            "spectral": torch_parametrizations.spectral_norm(nn.Linear(5, 5)),
            "orthogonal": torch_parametrizations.orthogonal(nn.Linear(5, 5)),
            "old": wrap_legacy(nn.Linear(5, 5), dim=1),
            "old_spectral": old_spectral,
            "plain": nn.Linear(5, 5),
        }
    )
    recognised = {name: (m.kind, m.dim, m.gain, m.form) for name, m in members(model).items()}
    assert recognised == {
        "ours.weight": ("centered_weight_norm", 1, True, "parametrization"),
        "new.weight": ("weight_norm", None, True, "parametrization"),
        "spectral.weight": ("spectral_norm", None, False, "parametrization"),
        "orthogonal.weight": ("orthogonal", None, False, "parametrization"),
        "old.weight": ("weight_norm", 1, True, "hook"),
        "old_spectral.weight": ("spectral_norm", None, False, "hook"),
    }
