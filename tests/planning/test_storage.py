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
from normwise.planning.treatment import Cause, Treatment, Verdict


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


class _Model(nn.Module):
    """Parameters of these shapes, called w, v, …."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in zip("wvu", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def _shrunk(mask: list[bool]) -> Treatment:
    return Treatment("w", (len(mask), 3), Verdict.SHRINK, Cause.ALONE, dim=0, mask=tuple(mask))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_masks_survive_json(mask: list[bool]) -> None:
    treatments = [_shrunk(mask), Treatment("v", (2,))]
    model = _Model((len(mask), 3), (2,))
    text = to_json(treatments, [{"w": 1, "v": -2}])
    assert from_json(text, model) == (treatments, [{"w": 1, "v": -2}])


def test_an_override_survives_json() -> None:
    model, batches = made("qk_norm_packed")
    plan = nw.plan(model, batches, overrides={"*.qkv.weight": "L2", "head.*": "shrink"})
    assert any(t.overridden is not None and t.overridden.mask is not None for t in plan.treatments)
    assert from_json(plan.to_json(), model) == (plan.treatments, plan.symmetries)


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


def test_frozen_parameters_are_part_of_the_fit(tmp_path: Path) -> None:
    model, batches = made("resnet")
    model.get_submodule("fc").requires_grad_(False)
    plan = nw.plan(model, batches)
    plan.save(tmp_path / "plan.json")
    assert nw.Plan.load(tmp_path / "plan.json", model).treatments == plan.treatments
    with pytest.raises(ValueError, match=r"'fc\.weight' is frozen in the plan, unlike in the model"):
        nw.Plan.load(tmp_path / "plan.json", CASES["resnet"].build())


def _changed(*path: Any, to: Any = None, drop: bool = False) -> str:
    """Return a valid plan for :class:`_Model` with one value replaced, or dropped."""
    symmetry = {"w": 1, "v": -1}
    pair = Treatment("v", (2,), Verdict.BALANCE, Cause.PAIR, symmetry=symmetry, against=("w",))
    whole = json.loads(to_json([_shrunk([True, False]), pair], [symmetry]))
    *parents, last = path
    place = whole
    for key in parents:
        place = place[key]
    if drop:
        del place[last]
    else:
        place[last] = to
    return json.dumps(whole)


_W, _V = ("parameters", 0), ("parameters", 1)


def test_the_plan_that_is_changed_below_is_valid() -> None:
    from_json(_changed("format", to=2), _Model((2, 3), (2,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no plan"),
        (_changed("what", to="x"), "no plan"),
        (_changed("format", to=9), "format 9"),
        (_changed("parameters", to=3), "lacks its parameters"),
        (_changed("symmetries", 0, to=3), r"damaged entry \(not a mapping"),
        (_changed("symmetries", 0, "v", to=0), r"damaged entry \(a symmetry is"),
        (_changed("symmetries", 0, "x", to=1), "unknown parameter 'x'"),
        (_changed(*_W, to=3), "damaged entry"),
        (_changed(*_W, "name", to="v"), "'v' has shape"),
        (_changed(*_V, to=json.loads(_changed("format", to=2))["parameters"][0]), "'w' is in the plan twice"),
        (_changed(*_W, "name", to=1), "name 1"),
        (_changed(*_W, "role", to="rôle"), "role 'rôle'"),
        (_changed(*_W, "verdict", to="decay"), "'decay' is not a valid Verdict"),
        (_changed(*_W, "cause", drop=True), "no 'cause'"),
        (_changed(*_W, "cause", to="overridden"), "overridden None"),
        (_changed(*_W, "dim", to=2), "dim 2 of shape"),
        (_changed(*_W, "dim", drop=True), "2 units with dim None"),
        (_changed(*_W, "dim", to=None), "2 units with dim None"),
        (_changed(*_W, "dim", to=1), "2 units with dim 1"),
        (_changed(*_W, "mask", to=[[0, 9]]), "mask"),
        (_changed(*_W, "mask", to=[[1, 2], [0, 1]]), "mask"),
        (_changed(*_W, "mask", to=[]), "empty mask"),
        (_changed(*_W, "shape", to="x"), "'x' where a list of int"),
        (_changed(*_W, "shape", to=[2.0, 3]), r"\[2.0, 3\] where"),
        (_changed(*_W, "shape", to=["2", 3]), r"\['2', 3\] where"),
        (_changed(*_W, "shape", to=[10**9, 10**9]), "has shape .* in the plan and"),
        (_changed(*_W, "aliases", to="x"), "'x' where a list of str"),
        (_changed(*_V, "symmetry", drop=True), "lacks the parameter"),
        (_changed(*_V, "symmetry", to={"w": 1}), "lacks the parameter"),
        (_changed(*_V, "symmetry", "x", to=1), "unknown parameter 'x'"),
        (_changed(*_V, "against", to=["x"]), "unknown parameter 'x'"),
    ],
)
def test_a_damaged_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        nw.Plan.load(tmp_path / "p.json", _Model((2, 3), (2,)))
    assert "\n" not in str(caught.value)


def _places(value: Any, *path: Any) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *_places(inner, *path, key))]


_PLACES = _places(json.loads(_changed("format", to=2)))
_ODD: list[Any] = [None, True, 0, -1, 3, 10**9, 1.5, float("nan"), "", "w", "v", "shrink", "rôle\n"]
_ODD += [[], [[0, 1]], ["w"], {}, {"w": 1}, {"verdict": "none", "cause": "no effect"}]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_PLACES), st.sampled_from(_ODD), st.booleans())
def test_an_odd_value_anywhere_is_refused_or_harmless(path: tuple[Any, ...], odd: Any, drop: bool) -> None:
    model = _Model((2, 3), (2,))
    refusal = None
    try:
        treatments, symmetries = from_json(_changed(*path, to=odd, drop=drop), model)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        return
    plan = nw.Plan(model, treatments, symmetries)
    assert plan.explain()
    assert plan.param_groups(0.1, shrink_weight_decay=0.1)
    assert all(torch.isfinite(unit.norms()).all() for unit in plan.units)
    assert from_json(plan.to_json(), model) == (treatments, symmetries)


def test_a_missing_file_and_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        nw.Plan.load(tmp_path / "p.json", nn.Linear(3, 2))
    with pytest.raises(TypeError, match="model must be"):
        planned("mlp_gelu")[1].apply_to("model")  # type: ignore[arg-type]
