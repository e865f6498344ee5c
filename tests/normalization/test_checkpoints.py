"""upgrade_state_dict: every form of a weight into every other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.normalization.test_modules import wrap_legacy
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import normwise as nw

FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "hook": wrap_legacy,
    "torch": torch_parametrizations.weight_norm,
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
def test_plain_weights_into_the_sisters(kind: str, gain: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 4)
    new, report = nw.upgrade_state_dict(plain.state_dict(), getattr(nw, kind)(nn.Linear(5, 4), gain=gain))
    model = getattr(nw, kind)(nn.Linear(5, 4), gain=gain)
    model.load_state_dict(new)
    torch.testing.assert_close(model.weight, getattr(nw, kind)(plain, gain=gain).weight)
    assert set(report.renamed.values()) == {("weight",)}


def test_dims_other_than_zero_and_the_meta_device() -> None:
    torch.manual_seed(0)
    for dim in (1, None):
        old = nw.weight_norm(nn.ConvTranspose1d(4, 3, 3), dim=dim)
        with torch.device("meta"):
            model = nn.ConvTranspose1d(4, 3, 3)
        new, _ = nw.upgrade_state_dict(old.state_dict(), model)
        torch.testing.assert_close(new["weight"], old.weight)


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
    spectral = torch_parametrizations.spectral_norm(nn.Linear(4, 3))
    new, report = nw.upgrade_state_dict(nn.Linear(4, 3).state_dict(), spectral)
    assert report.unexpected == ["weight"]
    assert "parametrizations.weight.original" in report.missing
    with pytest.raises(ValueError, match="does not fit"):
        nw.upgrade_state_dict({"weight_g": torch.ones(3, 4), "weight_v": torch.ones(3, 4)}, nn.Linear(4, 3))
