from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.invariance.networks import CASES
from tests.planning.models import made, planned
from torch import nn

import normwise as nw
from normwise.planning.storage import from_json, to_json
from normwise.planning.treatment import Treatment


@pytest.mark.parametrize("name", ["resnet", "qk_norm_packed", "prenorm_packed_tied", "unet"])
def test_a_saved_plan_is_the_same_on_another_copy(name: str, tmp_path: Path) -> None:
    _, plan = planned(name)
    plan.save(tmp_path / "plan.json")
    other = CASES[name].build()
    loaded = nw.Plan.load(tmp_path / "plan.json", other)
    assert loaded.treatments == plan.treatments
    assert loaded.symmetries == plan.symmetries
    mine = {id(p) for p in other.parameters()}
    assert all(id(p) in mine for unit in loaded.units for p in unit.params)
    assert [u.describe() for u in loaded.units] == [u.describe() for u in plan.units]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_masks_survive_json(mask: list[bool]) -> None:
    treatment = Treatment("w", (len(mask), 3), "shrink", "why", dim=0, mask=tuple(mask))
    assert from_json(to_json([treatment], [{"w": 1, "v": -2}])) == ([treatment], [{"w": 1, "v": -2}])


class _Wrapped(nn.Module):
    """Names parameters as DistributedDataParallel ("module") and torch.compile ("_orig_mod") do."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, module)


def test_wrappers_do_not_change_what_a_parameter_is() -> None:
    model, plan = planned("resnet")
    for wrapped in (_Wrapped(model, "module"), _Wrapped(_Wrapped(model, "_orig_mod"), "module")):
        moved = plan.apply_to(wrapped)
        names = [n for group in moved.param_groups() for n, _ in group["params"]]
        assert sorted(names) == sorted(n for n, _ in wrapped.named_parameters())
        assert all(a.params[0] is b.params[0] for a, b in zip(moved.units, plan.units, strict=True))


def test_a_model_that_does_not_fit_is_refused_with_the_difference() -> None:
    model, plan = planned("resnet")
    model.fc = nn.Linear(9, 5)
    with pytest.raises(
        ValueError, match=r"'fc\.weight' has shape \(5, 8\) in the plan and \(5, 9\) in the model"
    ):
        plan.apply_to(model)
    model.fc = nn.Linear(8, 5, bias=False)
    with pytest.raises(ValueError, match=r"'fc\.bias' is not in the model"):
        plan.apply_to(model)
    model.fc = nn.Linear(8, 5)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra\.weight' is in the model and not in the plan"):
        plan.apply_to(model)


def test_ties_are_part_of_the_fit() -> None:
    tied, plan = planned("prenorm_packed_tied")
    untied, batches = made("prenorm_packed_tied")
    untied.get_submodule("head").weight = nn.Parameter(torch.zeros(11, 8))
    with pytest.raises(
        ValueError, match=r"'emb\.weight' is shared with head\.weight in the plan and with nothing"
    ):
        plan.apply_to(untied)
    other_plan = nw.plan(untied, batches)
    with pytest.raises(
        ValueError, match=r"shared with nothing in the plan and with head\.weight in the model"
    ):
        other_plan.apply_to(tied)


def _changed(**changes: Any) -> str:
    whole = json.loads(to_json([Treatment("w", (2, 3), "shrink", "why", dim=0, mask=(True, False))], []))
    for key, value in changes.items():
        if key in whole:
            whole[key] = value
        else:
            whole["parameters"][0][key] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no plan"),
        (_changed(what="x"), "no plan"),
        (_changed(format=9), "format 9"),
        (_changed(parameters=3), "lacks its parameters"),
        (_changed(symmetries=[3]), "a symmetry that is none"),
        (_changed(parameters=[3]), "an entry that is none"),
        (_changed(verdict="decay"), "an entry that is none"),
        (_changed(dim=2), "an entry that is none"),
        (_changed(mask=[[0, 9]]), "an entry that is none"),
        (_changed(shape="x"), "an entry that is none"),
    ],
)
def test_a_damaged_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        nw.Plan.load(tmp_path / "p.json", nn.Linear(3, 2))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        nw.Plan.load(tmp_path / "p.json", nn.Linear(3, 2))
    with pytest.raises(TypeError, match="model must be"):
        planned("mlp_gelu")[1].apply_to("model")  # type: ignore[arg-type]
