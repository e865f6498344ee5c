from __future__ import annotations

import pytest
import torch
from tests.invariance.networks import CASES
from tests.planning.models import made, planned, shared
from torch import nn

import normwise as nw
from normwise.invariance import Evidence, parameter_of
from normwise.planning.parameters import parameter_aliases
from normwise.planning.plan import Plan
from normwise.planning.storage import from_json


def _verdicts(plan: nw.Plan, verdict: str) -> set[str]:
    return {name for name, found in plan.verdicts.items() if found == verdict}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(2)
def test_every_parameter_has_one_treatment_and_one_group(name: str) -> None:
    model, plan = shared(name)
    names = [n for n, _ in model.named_parameters()]
    assert [t.name for t in plan.treatments] == names
    assert all(t.reason for t in plan.treatments)
    grouped = [pair for group in plan.param_groups(0.1) for pair in group["params"]]
    assert sorted(n for n, _ in grouped) == sorted(names)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[n] for n, parameter in grouped)
    torch.optim.AdamW(plan.param_groups(0.1))  # torch refuses a parameter that is in two groups
    text = plan.explain()
    assert all(any(part in text for part in n.split(".")[-1:]) for n in names)


@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_invariant_alone_are_shrunk_in_their_units(name: str) -> None:
    _, plan = shared(name)
    case, found = CASES[name], {t.name: t for t in plan.treatments}
    for parameter, dim in case.scale_invariant.items():
        if found[parameter].role == "weight":
            assert (found[parameter].verdict, found[parameter].dim) == ("shrink", dim)
    for parameter, (dim, mask) in case.partial.items():
        assert (found[parameter].verdict, found[parameter].dim, found[parameter].mask) == (
            "shrink",
            dim,
            tuple(mask),
        )
    for parameter in case.no_effect:
        assert found[parameter].verdict == "none"
        assert "no effect" in found[parameter].reason
    units = plan.units
    assert len(units) == len(_verdicts(plan, "shrink"))


def test_gains_biases_and_vectors_are_never_decayed() -> None:
    for name in ("resnet", "weight_norm_batch_norm", "weight_norm_legacy", "prenorm_layer_norm", "lstm"):
        _, plan = shared(name)
        for t in plan.treatments:
            if "bias" in t.name or "norm" in t.name or t.name.endswith(("original0", "_g")) or "bn" in t.name:
                assert t.verdict == "none", t


def test_the_residual_stream_shrinks_its_writers_and_embeddings_and_nothing_else() -> None:
    # q and k only have directions; v and up are balanced against the writers, the head against a gain
    _, plan = planned("qk_norm_glu")
    layers = range(2)
    writers = {f"attn.{i}.o.weight" for i in layers} | {f"mlp.{i}.down.weight" for i in layers}
    assert _verdicts(plan, "shrink") == {
        "emb.weight",
        "pos",
        *writers,
        *(f"attn.{i}.{x}.weight" for i in layers for x in "qk"),
    }
    balanced = {f"attn.{i}.v.weight" for i in layers} | {
        f"mlp.{i}.{x}.weight" for i in layers for x in ("up", "gate")
    }
    assert _verdicts(plan, "balance") == balanced | {"head.weight"}
    of_v = next(t for t in plan.treatments if t.name == "attn.0.v.weight")
    assert of_v.together == ("attn.0.o.weight",)
    assert set(of_v.against) == {"attn.0.o.weight", "n1.0.weight"}
    assert "+1/−1 pair with attn.0.o.weight" in of_v.reason
    assert "regularises their product" in of_v.reason
    assert plan.symmetries[0] == dict.fromkeys(["emb.weight", "pos", *writers], 1)


@pytest.mark.parametrize("name", CASES)
def test_the_readable_symmetries_span_the_space_that_was_derived(name: str) -> None:
    from tests.invariance.checks import assert_same_space

    model, plan = shared(name)
    place = {t.name: k for k, t in enumerate(plan.treatments)}
    parts: dict[str, list[str]] = {}
    for symmetry in plan.symmetries:  # in the order of the model, the first member scaled up
        owners = [place[parameter_of(key)] for key in symmetry]
        assert owners == sorted(owners)
        assert next(iter(symmetry.values())) > 0
        for key in symmetry:
            if (owner := parameter_of(key)) != key and key not in parts.setdefault(owner, []):
                parts[owner].append(key)
    names = [n for n, _ in model.named_parameters()]
    assert_same_space([dict(s) for s in plan.symmetries], CASES[name].joint, names, parts)


def test_a_packed_tensor_is_balanced_as_a_whole_and_its_parts_are_shown() -> None:
    model, plan = planned("prenorm_packed_tied")
    qkv, o = (next(t for t in plan.treatments if t.name == f"attn.0.{n}.weight") for n in ("qkv", "o"))
    assert (qkv.verdict, qkv.mask) == ("balance", None)
    assert set(qkv.against) == {"n1.0.weight", "n1.0.bias", "attn.0.o.weight", "attn.0.qkv.bias"}
    assert "pair with n1.0.weight and n1.0.bias" in qkv.reason
    assert "its parts are in further pairs" in qkv.reason
    assert o.verdict == "balance"
    assert "attn.0.qkv.weight[16:24]" in o.reason
    assert set(o.against) == {"norm.weight", "norm.bias", "attn.0.qkv.weight", "attn.0.qkv.bias"}
    pair = {"attn.0.qkv.weight[0:8]": 1, "attn.0.qkv.weight[8:16]": -1, "attn.0.qkv.bias[0:8]": 1}
    assert pair in plan.symmetries
    again = Plan(model, *from_json(plan.to_json(), model))
    assert again.symmetries == plan.symmetries
    assert again.treatments == plan.treatments


def test_a_gated_unit_of_which_only_the_linear_half_is_in_a_pair() -> None:
    inv = nw.Invariances(
        not_invariant={"both", "down"},
        joint=[{"both[12:24]": 1, "down": -1}],
        parts={"both": ["both[0:12]", "both[12:24]"]},
    )
    inv.evidence = {name: Evidence("not invariant") for name in ("both", "down")}
    model = torch.nn.Module()
    model.both, model.down = (torch.nn.Parameter(torch.randn(s)) for s in ((24, 8), (8, 12)))
    both, down = nw.plan(model, invariances=inv).treatments
    assert (both.verdict, down.verdict) == ("balance", "balance")
    assert "its part [12:24] in a +1/−1 pair with down" in both.reason
    # in a group with one half only, a rule for the whole tensor would be wrong
    inv.joint = inv.groups = [{"both[12:24]": 1, "down": 1}]
    both, down = nw.plan(model, invariances=inv).treatments
    assert (both.verdict, down.verdict) == ("L2", "shrink")
    assert "its part [12:24] is scale-invariant jointly with down" in both.reason


def test_what_is_in_no_symmetry_gets_plain_l2() -> None:
    _, plan = planned("mlp_gelu")
    assert _verdicts(plan, "L2") == {"0.weight", "2.weight", "4.weight"}
    assert plan.units == []
    assert [g["name"] for g in plan.param_groups(0.1)] == ["L2", "none"]


def test_tied_weights_come_once_with_both_names() -> None:
    model, plan = planned("prenorm_packed_tied")
    tied = next(t for t in plan.treatments if t.name == "emb.weight")
    assert tied.aliases == ("head.weight",)
    assert "head.weight" not in plan.verdicts
    assert "emb.weight = head.weight" in plan.explain(width=200)
    assert parameter_aliases(model)["emb.weight"] == ("head.weight",)


def test_groups_carry_the_decay_of_their_verdict_and_names() -> None:
    _, plan = planned("qk_norm_packed")
    groups = {g["name"]: g for g in plan.param_groups(0.1)}
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"shrink": 0, "balance": 0.1, "none": 0}
    own = {g["name"]: g for g in plan.param_groups(0.1, shrink_weight_decay=0.2)}
    assert own["shrink"]["weight_decay"] == 0.2
    # weight_decay cannot tell rows apart: what is invariant in part is left out of it
    assert [n for n, _ in own["shrink in part"]["params"]] == ["attn.0.qkv.weight", "attn.1.qkv.weight"]
    assert own["shrink in part"]["weight_decay"] == 0
    optimizer = torch.optim.SGD(plan.param_groups(0.1), lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == groups["shrink"]["params"][0][0]


def test_auto_decays_nothing_by_the_optimizer() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    result = nw.plan(net, [torch.randn(8, 3)], progress=False)
    assert result.param_groups(weight_decay="auto") == result.param_groups(0.0) == result.param_groups()
    with pytest.raises(TypeError, match="weight_decay"):
        result.param_groups(weight_decay="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_a_wrong_weight_decay_is_refused(weight_decay: float) -> None:
    _, plan = planned("mlp_gelu")
    with pytest.raises(ValueError, match="weight_decay"):
        plan.param_groups(weight_decay)


def test_overrides_by_pattern_the_last_one_wins() -> None:
    _, plan = planned("resnet", overrides={"*.weight": "L2", "one.*": "none", "one.conv1.*": "shrink"})
    assert plan.verdicts["fc.weight"] == "L2"
    assert plan.verdicts["one.conv2.weight"] == "none"
    kept = next(t for t in plan.treatments if t.name == "one.conv1.weight")
    assert (kept.verdict, kept.dim) == ("shrink", 0)
    assert "overridden" not in kept.reason
    changed = next(t for t in plan.treatments if t.name == "one.conv2.weight")
    assert "'one.*'" in changed.reason
    assert "found: shrink" in changed.reason


def test_an_alias_can_be_overridden_and_the_whole_tensor_is_the_unit_where_none_was_found() -> None:
    _, plan = planned("prenorm_packed_tied", overrides={"head.weight": "shrink"})
    assert plan.verdicts["emb.weight"] == "shrink"
    assert plan.units[0].dim is None


def test_wrong_overrides_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'heads\.\*' matches no parameter: the first are pos"):
        planned("qk_norm_glu", overrides={"heads.*": "none"})
    with pytest.raises(ValueError, match=r"'decay' is not a verdict: choose from 'shrink', 'balance'"):
        planned("qk_norm_glu", overrides={"head.*": "decay"})
    with pytest.raises(TypeError, match="overrides must be a mapping"):
        planned("qk_norm_glu", overrides=["head.*"])


def test_invariances_found_before_are_used_and_must_be_of_this_model() -> None:
    model, batches = made("resnet")
    inv = nw.find_invariances(model, batches)
    assert nw.plan(model, invariances=inv).verdicts == nw.plan(model, batches).verdicts
    with pytest.raises(ValueError, match="another model"):
        nw.plan(made("vgg")[0], invariances=inv)
    with pytest.raises(TypeError, match="find_invariances"):
        nw.plan(model, invariances={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches is missing"):
        nw.plan(model)


def test_what_is_undetermined_is_left_alone_and_says_so() -> None:
    model, batches = made("resnet")
    inv = nw.find_invariances(model, batches)
    del inv.scale_invariant["one.conv1.weight"]
    inv.undetermined["one.conv1.weight"] = "too noisy"
    plan = nw.plan(model, invariances=inv)
    treatment = next(t for t in plan.treatments if t.name == "one.conv1.weight")
    assert treatment.verdict == "none"
    assert "undetermined, so left alone (too noisy)" in treatment.reason


class Adapter(nn.Module):
    """A linear map W + BA before a norm."""

    W: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        shapes = {"W": (8, 6), "A": (2, 6), "B": (8, 2)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ (self.W + self.B @ self.A).T)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("frozen", "verdicts", "symmetries"),
    [
        ("", {"W": "shrink", "A": "shrink", "B": "shrink"}, 2),  # W with A and W with B
        ("W", {"W": "none", "A": "balance", "B": "balance"}, 1),
        ("A", {"W": "shrink", "A": "none", "B": "shrink"}, 1),
        ("AB", {"W": "L2", "A": "none", "B": "none"}, 0),
    ],
)
def test_symmetries_of_a_plan_leave_frozen_parameters_alone(
    frozen: str, verdicts: dict[str, str], symmetries: int
) -> None:
    torch.manual_seed(0)
    model, x = Adapter().double(), torch.randn(16, 6, dtype=torch.float64)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    plan = nw.plan(model, [x])
    assert {name: plan.verdicts[name] for name in "WAB"} == verdicts
    assert len(plan.symmetries) == symmetries
    assert all(plan.treatments["WAB".index(name)].cause == "frozen" for name in frozen)
    before = model(x)
    for symmetry in plan.symmetries:  # each changes nothing, without the frozen parameters
        assert not set(frozen) & set(symmetry)
        with torch.no_grad():
            for name, exponent in symmetry.items():
                model.get_parameter(name).mul_(1.7**exponent)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_frozen_gain_leaves_its_partner_without_a_symmetry() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    plan = nw.plan(model, [torch.randn(16, 4)], overrides={"*": "L2", "0.*": "shrink"})
    assert plan.verdicts["0.weight"] == "shrink"
    last = plan.treatments[-2]
    assert (last.name, last.cause, last.reason) == ("3.weight", "in no symmetry", last.reason)
    assert plan.verdicts["1.weight"] == "none"  # overrides do not reach frozen parameters
    assert "no optimizer step" in plan.treatments[1].reason


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.cfloat])
def test_parameters_that_are_not_real_numbers_are_left_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5))
    model.table = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=dtype.is_complex)
    plan = nw.plan(model, [torch.randn(16, 4)])
    assert plan.verdicts["table"] == "none"
    assert plan.verdicts["0.weight"] == "shrink"
    assert plan.treatments[0].cause == ("not real numbers" if dtype.is_complex else "frozen")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert nw.audit(model, optimizer, plan=plan).rows[0].decayed_by in ("–", "frozen")


def test_a_module_may_mark_its_parameters() -> None:
    layer = nn.Linear(4, 5, bias=False)
    layer.weight._no_weight_decay = True  # type: ignore[attr-defined]
    model = nn.Sequential(layer, nn.LayerNorm(5))
    plan = nw.plan(model, [torch.randn(8, 4)])
    assert plan.verdicts["0.weight"] == "none"
    assert "_no_weight_decay" in plan.treatments[0].reason


def test_explain_fits_its_width_and_groups_layers_of_one_pattern() -> None:
    _, plan = planned("qk_norm_glu")
    for width in (80, 120):
        assert max(map(len, plan.explain(width=width).splitlines())) <= width
    grouped = plan.explain(grouped=True)
    assert "attn.{0-1}.q.weight ×2" in grouped
    assert "attn.*.o.weight" in grouped
    assert str(plan) == grouped
    assert repr(plan) == "Plan(shrink: 10, none: 5, balance: 7)"
