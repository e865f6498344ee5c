"""The language model: which of its weights are scale-invariant, and what its runs record."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.lab.small import text

import normwise as nw
from normwise.lab.claims.budget import BUDGETS, Budget
from normwise.lab.data.text import NUMBERS, load_text
from normwise.lab.engine.execution import execute
from normwise.lab.engine.run import Run
from normwise.lab.engine.store import Store
from normwise.lab.models.gpt import GPT, GROUPS, group_of, matrices, part, planned
from normwise.lab.runs.text import TextRun

SIZE = (22, 16, 2, 2, 12)  # characters, width, heads, depth, context
ALONE = {f"blocks.{k}.{layer}.weight" for k in (0, 1) for layer in ("query", "key")}
JOINT = {"token.weight", "position.weight"} | {
    f"blocks.{k}.{layer}.weight" for k in (0, 1) for layer in ("out", "down")
}


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(*SIZE)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, SIZE[0], (3, SIZE[-1]), generator=torch.Generator().manual_seed(2))


def test_qk_norm_makes_queries_and_keys_scale_invariant(model: GPT, ids: torch.Tensor) -> None:
    found = nw.find_invariances(model, [ids], progress=False)
    assert found.scale_invariant == dict.fromkeys(ALONE, None)
    names = list(dict(model.named_parameters()))  # embeddings and writers are in the span of what was found
    basis = np.array([[one.get(name, 0) for name in names] for one in found.joint], dtype=float).T
    joint = np.array([name in JOINT for name in names], dtype=float)
    residual = joint - basis @ np.linalg.lstsq(basis, joint, rcond=None)[0]
    assert np.abs(residual).max() < 1e-9


@pytest.mark.parametrize("name", BUDGETS)
def test_in_the_networks_of_the_claims_the_plan_finds_queries_keys_embeddings_and_writers(name: str) -> None:
    run = Budget.of(name, "fashion-mnist", "").text
    verdicts = planned(63, run.width, run.heads, run.depth, run.context).verdicts
    found = {key for key, verdict in verdicts.items() if verdict == "shrink"}
    assert found == {key for key in ALONE | JOINT if run.depth == 2 or ".1." not in key}


def test_the_rule_acts_on_what_the_plan_says(model: GPT) -> None:
    plan = planned(*SIZE)
    run = text(width=16, depth=2, context=12, decayed="invariant")
    acted = {id(unit.params[0]): unit for unit in run.units(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in acted}
    assert names == ALONE | JOINT
    assert {unit.dim for unit in acted.values()} == {None}
    assert planned(*SIZE) is plan


@pytest.mark.parametrize("name", ["attention", "stream"])
def test_scaled_parts_leave_the_function_as_it_is(name: str) -> None:
    run = text(width=16, depth=2, context=12)
    ids = torch.arange(12)[None]
    base, other = run.build(22).double(), replace(run, scaled=name, init_scale=1e4).build(22).double()
    torch.testing.assert_close(base(ids), other(ids), rtol=1e-4, atol=1e-4)
    scaled = {id(weight) for weight in part(other, name)}
    for key, weight in matrices(other).items():
        factor = 1e4 if id(weight) in scaled else 1.0
        torch.testing.assert_close(weight, factor * matrices(base)[key])
    assert {key for key, weight in matrices(other).items() if id(weight) in scaled} == (
        ALONE if name == "attention" else JOINT
    )


def test_groups_hold_every_matrix_once(model: GPT) -> None:
    assert {group_of(name) for name in matrices(model)} == set(GROUPS)
    vectors = {name for name, weight in model.named_parameters() if weight.ndim == 1}
    assert set(matrices(model)) | vectors == {name for name, _ in model.named_parameters()}


def test_the_model_sees_no_later_character(model: GPT, ids: torch.Tensor) -> None:
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % SIZE[0]
    torch.testing.assert_close(model(ids)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(ids)[:, 6:], model(other)[:, 6:])


def test_torch_decays_nothing_and_adamw_is_matched_bit_for_bit() -> None:
    run = text(decayed="matrices", lr=0.01).with_rule(nw.L2(0.5), mode="explicit")
    model, twin = run.build(22), run.build(22)
    (ours,) = run.make_optimizers(model)
    assert {group["weight_decay"] for group in ours.param_groups} == {0.0}
    gains = [weight for weight in twin.parameters() if weight.ndim == 1]
    groups = [
        {"params": list(matrices(twin).values()), "weight_decay": 0.5},
        {"params": gains, "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, 0.01, (0.9, run.beta2), fused=True)
    for one, optimizer in ((model, ours), (twin, torchs)):
        for k in range(3):
            optimizer.zero_grad()
            one(torch.arange(k, k + 8)[None]).square().mean().backward()
            optimizer.step()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)


def test_frozen_parts_stay_and_are_not_decayed() -> None:
    run = text(decayed="matrices", frozen="attention").with_rule(nw.L2(1.0))
    model = run.build(22)
    before = [weight.clone() for weight in part(model, "attention")]
    (optimizer,) = run.make_optimizers(model)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, part(model, "attention"), strict=True))
    assert not torch.equal(run.build(22).token.weight, model.token.weight)


def test_muon_has_the_matrices_of_the_blocks_and_each_optimizer_its_part_of_the_decay() -> None:
    run = text(decayed="matrices", optimizer="muon").with_rule(nw.L2(1.0), mode="explicit")
    model = run.build(22)
    muon, adamw = run.make_optimizers(model)
    held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    inner = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert {id(p) for p in held[0]} == {id(p) for p in inner}
    assert {id(p) for part_ in held for p in part_} == {id(p) for p in model.parameters()}
    assert sum(map(len, held)) == len(list(model.parameters()))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in (muon, adamw):
        optimizer.step()
    for name, weight in model.named_parameters():
        factor = 1 - run.lr if name in matrices(model) else 1
        torch.testing.assert_close(weight, factor * before[name], msg=name)


@pytest.mark.parametrize(
    "change", [{"scaled": "head"}, {"frozen": "head"}, {"decayed": "gains"}, {"optimizer": "lion"}]
)
def test_what_is_not_known_is_said(change: dict[str, Any]) -> None:
    run = text(**change).with_rule(nw.L2(1.0))
    with pytest.raises(ValueError, match=rf"{next(iter(change))}='\w+' is not known: choose from"):
        run.make_optimizers(run.build(22))


# runs


def test_a_second_execution_repeats_nothing_and_a_refused_run_is_recorded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted: list[Run] = [text(), text(decayed="matrices", lr=0.1).with_rule(nw.L2(20.0), mode="explicit")]
    found = execute(wanted, store)
    refused = found[wanted[1].identity]
    assert (refused["status"], refused["step"]) == ("refused", 1)
    assert execute(wanted, store) == found  # with their times: nothing was carried out again


@pytest.mark.parametrize(
    "change",
    [
        {"data": "bible-kjv"},
        {"fingerprint": "0"},
        {"width": 16},
        {"heads": 1},
        {"depth": 2},
        {"context": 9},
        {"batch_size": 3},
        {"length": 9},
        {"warmup": 1},
        {"beta2": 0.9},
        {"decayed": "matrices"},
        {"scaled": "stream"},
        {"init_scale": 2.0},
        {"frozen": "stream"},
        {"measured": 5},
        {"lr": 0.02},
        {"mode": "explicit"},
        {"rule": nw.L2(0.1).settings()},
        {"seed": 1},
    ],
)
def test_every_setting_is_part_of_the_identity(change: dict[str, Any]) -> None:
    assert replace(text(), **change).identity != text().identity
    assert set(change) <= set(TextRun.__dataclass_fields__)


def test_schedule_is_a_line_and_half_a_cosine() -> None:
    run = text(lr=0.3, length=24, warmup=4)
    assert [run.lr_at(k) for k in range(5)] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3])
    assert run.lr_at(14) == pytest.approx(0.15)
    exact = 0.75 + sum(0.15 * (1 + math.cos(math.pi * k / 20)) for k in range(20))
    assert run.total_time == pytest.approx(exact)


def test_start_and_batches_depend_on_the_seed_alone() -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, run in {"one": text(), "other": text(lr=1e-9), "seed": text(seed=1)}.items():
        run.run(lines.setdefault(name, []).append)
    first = {name: found[0]["train_loss"] for name, found in lines.items()}
    assert first["one"] == first["other"] != first["seed"]


def test_metrics_hold_norms_effective_rates_turns_and_losses() -> None:
    lines: list[dict[str, Any]] = []
    summary = text(init_scale=3.0, scaled="attention").run(lines.append)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert set(summary["norms"]) == set(lines[0]["layers"]) == set(GROUPS)
    for line in lines:
        assert 0 < line["validation_loss"] < 10
        for layer in line["layers"].values():
            # a mean of lr/RMS over tensors of several sizes: never below lr over their mean
            assert 1 <= layer["effective_lr"] / (line["lr"] / layer["norm"]) < 2
            assert 0 < layer["turn"] < math.pi
    model = text(init_scale=3.0, scaled="attention").build(22)
    rms = torch.stack([w.detach().square().mean().sqrt() for w in part(model, "attention")]).mean()
    assert lines[0]["layers"]["q, k"]["norm"] == pytest.approx(float(rms), rel=0.02)


def test_training_beats_the_frequencies_of_characters() -> None:
    run = text(width=16, context=16, batch_size=16, length=150, warmup=15, lr=0.02, measured=64)
    summary = run.run(lambda line: None)
    assert summary["test_loss"] < 0.6 * load_text(NUMBERS).unigram_entropy


def test_a_loss_that_is_not_finite_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, x: real(self, x) * torch.nan)
    assert text().run(lambda line: None)["status"] == "not finite"


def test_another_text_is_noticed() -> None:
    with pytest.raises(ValueError, match="numbers is not the text of these settings"):
        text(fingerprint="f" * 64).run(lambda line: None)
