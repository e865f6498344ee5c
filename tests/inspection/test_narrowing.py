"""Configurations of transformers are narrowed, and the plan of the copy is that of the full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normwise.inspection import inspect as module
from normwise.inspection import models
from normwise.inspection.html_page import write_page
from normwise.inspection.inspect import inspect
from normwise.inspection.narrowing import differences, narrowed
from normwise.inspection.terminal import text

transformers: Any = pytest.importorskip("transformers")

LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def test_heads_keep_their_ratios_and_layers_stay() -> None:
    wide = transformers.LlamaConfig(**LLAMA_70B)
    narrow = next(narrowed(wide))
    assert (narrow.num_attention_heads, narrow.num_key_value_heads) == (16, 2)
    assert (narrow.hidden_size, narrow.head_dim) == (32, 4)
    assert narrow.num_hidden_layers == 80
    assert differences(wide, narrow)["vocab_size"] == (128256, 61)


def test_latent_attention_keeps_its_shares() -> None:
    wide = transformers.DeepseekV3Config()
    narrow = next(narrowed(wide))
    for a, b in (
        ("kv_lora_rank", "qk_rope_head_dim"),
        ("qk_nope_head_dim", "qk_rope_head_dim"),
        ("v_head_dim", "qk_nope_head_dim"),
    ):
        assert getattr(wide, a) * getattr(narrow, b) == getattr(narrow, a) * getattr(wide, b)
    assert narrow.n_routed_experts >= narrow.num_experts_per_tok
    assert narrow.n_routed_experts % narrow.n_group == 0
    assert narrow.num_hidden_layers == 61
    assert narrow.moe_intermediate_size < narrow.hidden_size < narrow.intermediate_size  # as in the wide one


@pytest.mark.filterwarnings("ignore")
def test_the_plan_of_a_large_model_is_that_of_its_narrow_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    small = {"model_type": "llama", "vocab_size": 200, "hidden_size": 128, "intermediate_size": 160}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
    path.write_text(json.dumps(small), encoding="utf-8")
    itself = inspect(None, transformers=str(path))
    assert itself.narrowed == {}
    assert itself.how == ""
    monkeypatch.setattr(module, "_SMALL", 0)
    found = inspect(None, transformers=str(path))
    assert found.narrowed["hidden_size"][0] == 128 > found.narrowed["hidden_size"][1]
    assert found.plan.verdicts == itself.plan.verdicts
    assert [t.shape for t in found.plan.treatments] == [t.shape for t in itself.plan.treatments]
    assert "Planned by a narrow copy (" in text(found)
    page = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<p>{found.how}</p>" in page
    assert "vocab_size 200 → 61" in found.how
    assert "narrow copy" not in write_page(itself, tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads(found.to_json())["narrowed"]["vocab_size"] == [200, 61]
    monkeypatch.setattr(module, "_NARROW", 0)
    monkeypatch.setattr(module, "_LARGE", 0)
    with pytest.raises(ValueError, match="no narrow copy could be planned instead"):
        inspect(None, transformers=str(path))


@pytest.mark.filterwarnings("ignore")
def test_the_plan_does_not_depend_on_how_experts_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mixtral", "num_hidden_layers": 1}', encoding="utf-8")
    used, plans, threads = [], [], torch.get_num_threads()
    torch.set_num_threads(2)
    real = models.batch_for

    def batch_for(model: Any, config: Any) -> Any:
        used.append(model.config._experts_implementation)
        return real(model, config)

    monkeypatch.setattr(models, "batch_for", batch_for)
    try:
        for few in (0, 8):
            monkeypatch.setattr(models, "_FEW_EXPERTS", few)
            plans.append(inspect(None, transformers=str(path)).plan)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert used == ["batched_mm", "eager"]
    assert plans[0].verdicts == plans[1].verdicts
    assert plans[0].symmetries == plans[1].symmetries


def test_batches_hold_no_padding() -> None:
    from normwise.inspection.models import batch_for

    for padding in (None, 0, 2, 4):
        config = transformers.LlamaConfig(vocab_size=5, pad_token_id=padding)
        batches = [batch_for(_Texts(), config)["input_ids"] for _ in range(20)]
        tokens = set(torch.stack(batches).unique().tolist())
        assert tokens == {0, 1, 2, 3, 4} - ({4} if padding is None else {padding})


class _Texts:
    main_input_name = "input_ids"


@pytest.mark.filterwarnings("ignore")
def test_parts_of_latent_attention_have_the_sizes_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "deepseek_v3", "num_hidden_layers": 1}', encoding="utf-8")
    plan = inspect(None, transformers=str(path)).plan
    parts = {key.partition("self_attn.")[2] for s in plan.symmetries for key in s if "[" in key}
    assert parts == {
        "q_b_proj.weight.unflatten(0, (-1, 192))[:, 0:128]",
        "q_b_proj.weight.unflatten(0, (-1, 192))[:, 128:192]",
        "kv_b_proj.weight.unflatten(0, (-1, 256))[:, 0:128]",
        "kv_b_proj.weight.unflatten(0, (-1, 256))[:, 128:256]",
    }
    masks = [t.mask for t in plan.treatments if t.mask is not None]
    assert masks == [(True,) * 512 + (False,) * 64]
