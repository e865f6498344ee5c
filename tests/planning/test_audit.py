"""What the grouping of common recipes decays, written anew here; each finding is derived by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tests.planning.models import made, planned, shared
from torch import nn

import normwise as nw


def by_name_and_type(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As transformers' Trainer groups: no decay for LayerNorms by type, nor for biases and norms by name."""
    spared = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    decayed = {n for n, _ in model.named_parameters() if n not in norms and not spared.search(n.lower())}
    return [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]


def by_dimensions(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As small GPT trainers and image recipes group: decay for what has two dimensions or more."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def found(audit: nw.Audit) -> dict[str, set[str]]:
    return {finding.kind: set(finding.parameters) for finding in audit.findings}


def test_grouping_by_name_decays_norms_of_other_classes() -> None:
    # its norms are an RMSNorm class of the model's own: neither a LayerNorm nor called bias
    model, _ = shared("prenorm_rms_norm")
    optimizer = torch.optim.AdamW(by_name_and_type(model, 0.1), lr=1e-3)
    audit = nw.audit(model, optimizer)
    gains = {f"n{j}.{i}.weight" for i in (0, 1) for j in (1, 2)}  # the last, "norm", goes by its name
    assert found(audit) == {"decayed vectors": gains}
    assert audit.plan is None
    assert "n1.{0-1}.weight (2)" in audit.findings[0].message


def test_grouping_by_name_of_a_layer_norm_transformer_is_clean_but_what_it_does_is_said() -> None:
    model, plan = shared("prenorm_layer_norm")
    optimizer = torch.optim.AdamW(by_name_and_type(model, 0.1), lr=1e-3)
    audit = nw.audit(model, optimizer, plan=plan)
    assert not any(finding.serious for finding in audit.findings)
    stream = {"emb.weight", "pos"}
    stream |= {f"{x}.{i}.{y}.weight" for i in (0, 1) for x, y in (("attn", "o"), ("mlp", "2"))}
    assert found(audit)["effective learning rate only"] == stream
    # gains are not decayed and what balances them alone is: the first matrix of each mlp, the head
    assert found(audit)["one side of a pair"] == {"mlp.0.0.weight", "mlp.1.0.weight", "head.weight"}
    by_name = {p.name: p for p in audit.rows}
    angle = math.sqrt(2 * 1e-3 * 0.1 * (1 - 0.9) / (1 + 0.9))  # κ of AdamW
    assert by_name["emb.weight"].pulls[0].rotation == pytest.approx(angle)
    assert by_name["emb.weight"].pulls[0].settling == pytest.approx(1e4)
    assert f"{math.degrees(angle):.2g}° a step" in by_name["emb.weight"].effect
    assert "balances" in by_name["attn.0.v.weight"].effect


def test_grouping_by_name_decays_batch_norms_that_are_not_called_norm() -> None:
    model, plan = shared("resnet")
    optimizer = torch.optim.AdamW(by_name_and_type(model, 0.1), lr=1e-3)
    gains = {t.name for t in plan.treatments if t.role == "gain"}
    assert found(nw.audit(model, optimizer, plan=plan))["decayed vectors"] == gains


def test_grouping_by_dimensions_decays_the_gains_of_a_weight_norm() -> None:
    model, plan = shared("weight_norm")
    optimizer = torch.optim.SGD(by_dimensions(model, 5e-4), lr=0.1, momentum=0.9)
    audit = nw.audit(model, optimizer, plan=plan)
    assert found(audit)["decayed vectors"] == {
        f"{x}.parametrizations.weight.original0" for x in ("one", "two")
    }
    assert found(audit)["effective learning rate only"] == {
        f"{x}.parametrizations.weight.original1" for x in ("one", "two")
    }
    assert audit.findings[0].kind == "decayed vectors"  # the serious first


def test_decay_on_everything_says_which_part_of_it_regularises() -> None:
    model, plan = shared("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    audit = nw.audit(model, optimizer, plan=plan)
    convolutions = {t.name for t in plan.treatments if "conv" in t.name or t.name.endswith("short.0.weight")}
    kinds = found(audit)
    assert kinds["effective learning rate only"] == convolutions | {"stem.weight"}
    assert {n for n in plan.verdicts if "bn" in n} < kinds["decayed vectors"]
    assert "stem.bias" not in kinds["decayed vectors"]
    assert kinds["no effect"] == {"stem.bias"}
    by_name = {p.name: p for p in audit.rows}
    angle = math.sqrt(2 * 0.1 * 5e-4 / (1 + 0.9))  # κ of coupled SGD
    assert by_name["stem.weight"].pulls[0].rotation == pytest.approx(angle)
    assert by_name["stem.weight"].pulls[0].coupling == "coupled"
    assert by_name["stem.weight"].pulls[0].settling == pytest.approx((1 - 0.9) / (0.1 * 5e-4))


def test_the_plan_with_its_decay_leaves_nothing_serious() -> None:
    _, plan = planned("qk_norm_glu")
    model, batches = made("qk_norm_glu")
    plan = plan.apply_to(model)
    optimizer = torch.optim.AdamW(plan.param_groups(0.1), lr=1e-3)
    before = nw.audit(model, optimizer, plan=plan)
    assert found(before)["falling learning rate"] == {n for n, v in plan.verdicts.items() if v == "shrink"}
    plan.attach(optimizer, total_steps=100)
    audit = nw.audit(model, optimizer, batches)
    assert not any(finding.serious for finding in audit.findings)
    embedding = next(p for p in audit.rows if p.name == "emb.weight")
    assert embedding.decayed_by.startswith("AdaptiveWeightShrink ")
    assert set(found(audit)) == {"one side of a pair"}
    assert embedding.pulls[0].rotation is None  # it depends on the gradient


def test_missing_duplicate_strange_and_double() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, second)
    stray = nn.Parameter(torch.zeros(7, 7))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([first.weight, first.weight, second.weight, stray], lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.warns(UserWarning, match="decayed twice"):
        nw.Decay(optimizer, nw.L2(0.1), second.weight)
    audit = nw.audit(model, optimizer)
    assert found(audit) == {
        "missing": {"0.bias", "1.bias"},
        "duplicate": {"0.weight"},
        "stranger": set(),
        "decayed twice": {"1.weight"},
    }
    assert "(7, 7)" in str(audit)
    assert "weight_decay 0.1, decoupled and L2 0.1" in str(audit)


def test_a_frozen_parameter_is_not_missing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    audit = nw.audit(model, optimizer)
    assert found(audit) == {"undecayed weights": {"1.weight"}}
    assert audit.rows[0].decayed_by == "frozen"


def test_frozen_parameters_in_the_optimizer_are_not_decayed() -> None:
    first = nn.Linear(6, 8, bias=False)
    model = nn.Sequential(first, nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[:2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    audit = nw.audit(model, optimizer, [torch.randn(16, 6)])
    assert found(audit) == {"decayed vectors": {"2.bias"}}
    assert [p.decayed_by for p in audit.rows[:3]] == ["frozen"] * 3
    assert audit.rows[3].effect == "regularises"  # its partner in the pair is frozen
    before = first.weight.clone()
    model(torch.randn(16, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(first.weight, before)
    # a gradient from before the freezing is another matter: the optimizer steps with it
    first.weight.grad = torch.zeros_like(first.weight)
    assert "weight_decay" in nw.audit(model, optimizer).rows[0].decayed_by
    optimizer.step()
    assert not torch.equal(first.weight, before)


def test_decay_through_the_gradient_of_adam_is_divided() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    audit = nw.audit(model, torch.optim.Adam(model.parameters(), weight_decay=0.1))
    assert found(audit) == {"divided decay": {"0.weight"}}
    assert audit.rows[0].pulls[0].rotation is None


def test_what_cannot_be_measured_is_said_to_be_unknown() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, needed: int) -> None:
            super().__init__(params, lr=0.1, weight_decay=0.1)

    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    audit = nw.audit(model, Odd(model.parameters(), 3))
    assert found(audit) == {"unknown coupling": {"0.weight"}}


def test_tables_group_layers_and_fit_their_width() -> None:
    model, plan = shared("prenorm_layer_norm")
    audit = nw.audit(model, torch.optim.AdamW(by_name_and_type(model, 0.1), lr=1e-3), plan=plan)
    text = audit.table(width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "attn.{0-1}.q.weight" in text.replace("\n", "")
    assert len(audit.table(grouped=False).splitlines()) > len(text.splitlines()) / 2
    assert repr(audit).startswith(f"Audit({len(audit.rows)} parameters; ")


def test_wrong_arguments_are_named() -> None:
    model, plan = shared("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="model must be"):
        nw.audit("model", optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be"):
        nw.audit(model, "sgd")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan must be"):
        nw.audit(model, optimizer, plan={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit"):
        nw.audit(shared("vgg")[0], optimizer, plan=plan)
