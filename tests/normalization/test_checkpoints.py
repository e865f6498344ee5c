"""upgrade_state_dict: every form of a weight into every other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.normalization.reference import weight_of
from tests.normalization.test_modules import wrap_legacy
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import normwise as nw


def whole(layer: nn.Module) -> nn.Module:
    return nw.weight_norm(layer, dim=None)


def hook_spectral_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: nn.Module = nn.utils.spectral_norm(layer)
    return wrapped


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "hook": wrap_legacy,
    "torch": torch_parametrizations.weight_norm,
    "normwise": nw.weight_norm,
    "whole": whole,
}
SPECTRAL_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": hook_spectral_norm,
    "torch": torch_parametrizations.spectral_norm,
    "plain": lambda layer: layer,
    "normwise": nw.weight_norm,
}


def build(form: str) -> nn.Module:
    wrap = FORMS[form]
    return nn.Sequential(wrap(nn.Conv1d(3, 4, 3)), nn.BatchNorm1d(4), nn.Sequential(wrap(nn.Conv1d(4, 2, 1))))


def trained(form: str) -> nn.Module:
    model = build(form)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))
    return model.eval()


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_every_form_loads_into_every_other(source: str, to: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, model, x = trained(source), build(to).eval(), torch.randn(2, 3, 8)
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    keys = list(stored)
    new, report = nw.upgrade_state_dict(stored, model)
    model.load_state_dict(new)
    torch.testing.assert_close(model(x), old(x))
    assert list(stored) == keys
    assert not report.missing
    assert not report.unexpected
    same = {source, to} <= {"torch", "normwise"} or source == to
    assert bool(report.renamed) != same
    if (source, to) == ("hook", "torch"):
        assert report.renamed["0.parametrizations.weight.original0"] == ("0.weight_g", "0.weight_v")
        torch.testing.assert_close(
            new["0.parametrizations.weight.original0"], stored["0.weight_g"], rtol=0, atol=0
        )


@pytest.mark.parametrize("kind", ["centered_weight_norm", "weight_standardization"])
@pytest.mark.parametrize("gain", [False, True])
def test_plain_weights_into_the_centered_members(kind: str, gain: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 4)
    new, report = nw.upgrade_state_dict(plain.state_dict(), getattr(nw, kind)(nn.Linear(5, 4), gain=gain))
    model = getattr(nw, kind)(nn.Linear(5, 4), gain=gain)
    model.load_state_dict(new)
    torch.testing.assert_close(model.weight, getattr(nw, kind)(plain, gain=gain).weight)
    assert set(report.renamed.values()) == {("weight",)}


@pytest.mark.parametrize("to", SPECTRAL_FORMS)
@pytest.mark.parametrize("source", ["hook", "torch", "plain"])
def test_forms_of_spectral_norm_load_into_each_other(source: str, to: str) -> None:
    torch.manual_seed(0)

    def build(form: str) -> nn.Sequential:
        wrap = SPECTRAL_FORMS[form]
        model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 4, 1))  # a square one
        return nn.Sequential(*(wrap(layer) for layer in model)).train()

    old, model, x = build(source), build(to), torch.randn(2, 3, 8)
    for _ in range(50):
        old(x)
    if source == "plain":
        for layer in old:
            weight = weight_of(layer)
            matrix = (
                weight.detach().transpose(0, 1 if isinstance(layer, nn.ConvTranspose1d) else 0).flatten(1)
            )
            weight.data.div_(torch.linalg.matrix_norm(matrix, 2))
    new, report = nw.upgrade_state_dict(old.state_dict(), model)
    model.load_state_dict(new)
    torch.testing.assert_close(model.eval()(x), old.eval()(x))
    assert bool(report.renamed) == (source != to)
    assert not report.missing
    assert not report.unexpected


def test_dims_other_than_the_models_and_the_meta_device() -> None:
    torch.manual_seed(0)
    dims = (0, 1, None)
    for dim in dims:
        old = nw.weight_norm(nn.ConvTranspose1d(4, 3, 3), dim=dim)
        nn.init.normal_(old.get_parameter("parametrizations.weight.original0"))
        legacy = {
            "weight_g": old.state_dict()["parametrizations.weight.original0"],
            "weight_v": old.state_dict()["parametrizations.weight.original1"],
        }
        with torch.device("meta"):
            plain = nn.ConvTranspose1d(4, 3, 3)
            models = [nw.weight_norm(nn.ConvTranspose1d(4, 3, 3), dim=other) for other in dims]
        for state in (old.state_dict(), {**legacy, "bias": old.state_dict()["bias"]}):
            new, _ = nw.upgrade_state_dict(state, plain)
            torch.testing.assert_close(new["weight"], weight_of(old))
            for model in models:
                new, report = nw.upgrade_state_dict(state, model)
                loaded = model.to_empty(device="cpu")
                loaded.load_state_dict(new)
                torch.testing.assert_close(weight_of(loaded), weight_of(old))
                assert report.missing == report.unexpected == []
    with pytest.raises(ValueError, match=r"gain of weight .*centered_weight_norm does not convert"):
        nw.upgrade_state_dict(old.state_dict(), nw.centered_weight_norm(nn.ConvTranspose1d(4, 3, 3)))


def test_nested_checkpoints_and_prefixes_are_recognised_and_reported() -> None:
    torch.manual_seed(0)
    old, model = trained("hook"), build("torch")
    state = old.state_dict()
    expected, _ = nw.upgrade_state_dict(state, model)
    prefixed = {f"module.{key}": value for key, value in state.items()}
    compiled = {key.replace("2.0.", "2._orig_mod.0."): value for key, value in state.items()}
    other = {"conv.weight": torch.ones(2, 2)}
    for checkpoint, path, prefix in (
        (prefixed, (), "module."),
        ({f"_orig_mod.{key}": value for key, value in prefixed.items()}, (), "_orig_mod.module."),
        ({"generator": prefixed, "discriminator": other, "steps": 7}, ("generator",), "module."),
        ({"epoch": 1, "state": {"model": state, "optimizer": {"state": {0: 1}}}}, ("state", "model"), ""),
        ({f"generator.{key}": v for key, v in state.items()} | other, (), "generator."),
        (compiled, (), ""),
    ):
        new, report = nw.upgrade_state_dict(checkpoint, model)
        assert (report.path, report.prefix) == (path, prefix)
        assert not report.missing
        for key, value in expected.items():
            torch.testing.assert_close(new[key], value, rtol=0, atol=0)
        assert (not path) or f"taken from: {' / '.join(path)}" in str(report)
        assert (not prefix) or f"prefix removed: {prefix}" in str(report)
    for ambiguous in (
        {"model": state, "ema": state},
        prefixed | {f"ema.{key}": v for key, v in state.items()},
    ):
        with pytest.raises(ValueError, match=r"\['(model', 'ema|module\.', 'ema\.)'\]"):
            nw.upgrade_state_dict(ambiguous, model)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (None, TypeError, "not NoneType: load the file first"),
        ([torch.ones(3, 4)], TypeError, "not list"),
        (7, TypeError, "not int"),
        ({0: torch.ones(3, 4)}, TypeError, "names as keys, not 0"),
        ({"weight": None}, TypeError, r"\['weight'\] must be a tensor, not NoneType"),
        ({"bias": [0.0] * 3}, TypeError, r"\['bias'\] must be a tensor, not list"),
        ({"weight_g": 1.0, "weight_v": torch.ones(3, 4)}, TypeError, r"\['weight_g'\].*not float"),
        (
            {"weight_g": torch.ones(3, 4), "weight_v": torch.ones(3, 4)},
            ValueError,
            r"gain of weight, of shape \(3, 4\)",
        ),
        (
            {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(3, 4)},
            ValueError,
            r"gain of weight, of shape \(2, 1\)",
        ),
        (
            {"weight_g": torch.ones(3), "weight_v": torch.ones(3, 4)},
            ValueError,
            r"gain of weight, of shape \(3,\)",
        ),
        (
            {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 5)},
            ValueError,
            r"\(3, 5\).*\(3, 4\) in the model",
        ),
        ({"weight_g": torch.ones(3, 1).int(), "weight_v": torch.ones(3, 4)}, ValueError, "torch.int32"),
        (
            {"weight_orig": torch.ones(3, 4), "weight_u": torch.ones(9), "weight_v": torch.ones(4)},
            ValueError,
            "of 9 elem",
        ),
        (
            {"weight_orig": torch.ones(3, 4), "weight_u": torch.ones(3), "weight_v": torch.ones(5)},
            ValueError,
            r"\(5,\)",
        ),
        (
            {"module.weight": torch.ones(3, 4), "module.bias": torch.ones(3), "weight": torch.ones(3, 4)},
            ValueError,
            "prefix 'mod",
        ),
    ],
)
def test_what_is_no_state_dict_of_the_model_is_one_clear_error(
    state: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        nw.upgrade_state_dict(state, nn.Linear(4, 3))


KEYS = st.sampled_from(
    ["weight", "weight_g", "weight_v", "weight_u", "weight_orig", "bias", "module", "module.weight", "x"]
    + [f"parametrizations.weight.{key}" for key in ("original", "original0", "original1", "0._u", "0._v")]
)
SHAPES = st.lists(st.sampled_from([0, 1, 3, 4]), max_size=3)
LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.just("text"),
    st.builds(torch.ones, SHAPES),
    st.builds(torch.ones, SHAPES, dtype=st.just(torch.int8)),
)
FORM = st.sampled_from([*FORMS.values(), *SPECTRAL_FORMS.values(), nw.centered_weight_norm])


@settings(max_examples=300, deadline=None)
@given(
    state=st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=6), max_leaves=12),
    wrap=FORM,
)
def test_any_input_gives_a_state_dict_or_one_line(state: Any, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(nn.Linear(4, 3))
    try:
        new, report = nw.upgrade_state_dict(state, model)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        assert set(report.missing) == set(model.state_dict()) - set(new)
        assert set(report.unexpected) == set(new) - set(model.state_dict())
        message = "weight"
    assert "weight" in message or "state_dict" in message
    assert "\n" not in message


def test_unknown_and_missing_keys_are_listed_not_dropped() -> None:
    state: dict[str, Tensor] = {
        "weight_g": torch.ones(3, 1),
        "weight_v": torch.ones(3, 4),
        "extra": torch.ones(1),
    }
    new, report = nw.upgrade_state_dict(state, nw.weight_norm(nn.Linear(4, 3)))
    assert report.missing == ["bias"]
    assert report.unexpected == ["extra"]
    assert "extra" in new
    assert "missing: bias" in str(report)
    orthogonal = torch_parametrizations.orthogonal(nn.Linear(4, 3))
    new, report = nw.upgrade_state_dict(nn.Linear(4, 3).state_dict(), orthogonal)
    assert report.unexpected == ["weight"]
    assert "parametrizations.weight.original" in report.missing
