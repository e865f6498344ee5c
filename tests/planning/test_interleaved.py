"""Parts that recur in each head: a narrow copy's plan is that of a model with more heads, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.inspection.models import batch_for
from normwise.invariance import parameter_of

_SMALL = {"vocab_size": 61, "num_hidden_layers": 1, "intermediate_size": 48}


def _transformer(model: str, **settings: Any) -> nn.Module:
    hf: Any = pytest.importorskip("transformers")
    cls = getattr(hf, model)
    torch.manual_seed(0)
    net: nn.Module = cls(cls.config_class(**settings, use_cache=False))
    return net


def _gpt2(heads: int, size: int) -> nn.Module:
    sizes = {"vocab_size": 61, "n_positions": 32, "n_layer": 1}
    return _transformer("GPT2LMHeadModel", **sizes, n_embd=heads * size, n_head=heads)


def _neox(heads: int, size: int) -> nn.Module:
    hidden = heads * size
    return _transformer("GPTNeoXForCausalLM", **_SMALL, hidden_size=hidden, num_attention_heads=heads)


def _bloom(heads: int, size: int) -> nn.Module:
    return _transformer("BloomForCausalLM", vocab_size=61, hidden_size=heads * size, n_layer=1, n_head=heads)


def _falcon(heads: int, size: int, groups: int = 0) -> nn.Module:
    sizes = {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": heads * size}
    groups = groups or heads // 2
    sizes |= {"num_attention_heads": heads, "num_kv_heads": groups, "new_decoder_architecture": True}
    return _transformer("FalconForCausalLM", **sizes)


def _falcon_of_old(heads: int, size: int) -> nn.Module:
    sizes = {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": heads * size}
    return _transformer("FalconForCausalLM", **sizes, num_attention_heads=heads, multi_query=False)


def _llama(heads: int, size: int, groups: int = 0) -> nn.Module:
    sizes = {**_SMALL, "hidden_size": heads * size, "num_attention_heads": heads}
    return _transformer("LlamaForCausalLM", **sizes, num_key_value_heads=groups or heads // 2)


def _mixtral(heads: int, size: int) -> nn.Module:
    sizes = {**_SMALL, "hidden_size": heads * size, "num_attention_heads": heads, "num_local_experts": 4}
    return _transformer("MixtralForCausalLM", **sizes, num_key_value_heads=heads // 2)


def _latent(heads: int, size: int, rope: int = 0) -> nn.Module:
    hidden = {**_SMALL, "hidden_size": 8 * size, "num_attention_heads": heads, "num_key_value_heads": heads}
    parts = {"qk_rope_head_dim": rope or size, "qk_nope_head_dim": size, "v_head_dim": 2 * size}
    ranks = {"q_lora_rank": 3 * size, "kv_lora_rank": 3 * size}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2}
    sizes = hidden | parts | ranks | experts | {"topk_group": 1, "first_k_dense_replace": 0}
    return _transformer("DeepseekV3ForCausalLM", **sizes)


class _Interleaved(nn.Module):
    """Attention whose heads are packed as q₁k₁v₁ q₂k₂v₂ …, with a QK-norm or not."""

    def __init__(self, heads: int, size: int, *, norm: bool = False, named: bool = True) -> None:
        super().__init__()
        self.how = heads, size, norm
        if named:
            self.num_heads = heads
        width = heads * size
        self.emb, self.norm = nn.Embedding(61, width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 61, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        heads, size, norm = self.how
        x = self.emb(input_ids)
        q, k, v = self.qkv(x).unflatten(-1, (heads, 3 * size)).transpose(1, 2).split(size, -1)
        if norm:
            q, k = F.rms_norm(q, (size,)), F.rms_norm(k, (size,))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(self.norm(x + self.o(y)))
        return out


def _planned(net: nn.Module) -> nw.Plan:
    torch.manual_seed(1)
    if isinstance(net, _Interleaved):
        return nw.plan(net, [torch.randint(0, 61, (4, 9))])
    return nw.plan(net, [batch_for(net, net.config)])


def _span(plan: nw.Plan) -> np.ndarray[Any, Any]:
    """Return one row for each symmetry: the exponent of every value of every parameter."""
    rows = []
    for symmetry in plan.symmetries:
        exponents = {t.name: torch.zeros(t.shape) for t in plan.treatments}
        for key, exponent in symmetry.items():
            name = parameter_of(key)
            eval(f"whole{key.removeprefix(name)}", {"whole": exponents[name]}).add_(exponent)
        rows.append(np.concatenate([e.numpy().ravel() for e in exponents.values()]))
    return np.array(rows)


def _dimension(rows: np.ndarray[Any, Any]) -> int:
    return int(np.linalg.matrix_rank(rows @ rows.T, tol=1e-3))


Build = Callable[..., nn.Module]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "narrow", "wide"),
    [
        (_gpt2, (2, 4), (4, 8)),
        (_neox, (2, 4), (4, 8)),
        (_neox, (2, 8), (4, 8)),
        (_bloom, (2, 4), (6, 4)),
        (_falcon, (4, 4), (8, 8)),
        (_falcon_of_old, (2, 4), (4, 8)),
        (_llama, (4, 4), (8, 8)),
        (_llama, (4, 4, 2), (8, 8, 2)),
        (_mixtral, (4, 4), (8, 8)),
        (_latent, (2, 4), (4, 8)),
        (lambda *a: _Interleaved(*a, norm=True), (2, 4), (4, 8)),
    ],
)
def test_the_carried_plan_is_that_of_the_model(
    build: Build, narrow: tuple[int, ...], wide: tuple[int, ...]
) -> None:
    model = build(*wide)
    carried, own = _planned(build(*narrow)).apply_to(model, widened=True), _planned(model)
    treated = ([(t.verdict, t.cause, t.dim, t.mask) for t in plan.treatments] for plan in (carried, own))
    assert next(treated) == next(treated)
    spans = [_span(carried), _span(own)]
    assert [*map(_dimension, spans), _dimension(np.concatenate(spans))] == [len(own.symmetries)] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "narrow", "wide", "message"),
    [
        (_falcon, (4, 4, 2), (8, 4, 2), "the numbers of heads have other ratios"),
        (_falcon, (2, 4, 1), (4, 4, 2), "in a narrow copy with a single head"),
        (_neox, (1, 4), (2, 8), r"whether they recur in each of 2 heads; make a narrow copy with two heads"),
        (_latent, (2, 8, 4), (4, 16, 16), "so that the parts have other shares"),
        (lambda *a: _Interleaved(*a, named=False), (2, 4), (4, 8), "recur 2 times, and no attribute of a"),
    ],
)
def test_what_the_narrow_copy_does_not_tell_is_refused(
    build: Build, narrow: tuple[int, ...], wide: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _planned(build(*narrow)).apply_to(build(*wide), widened=True)


def test_a_number_that_may_count_two_things_is_refused() -> None:
    narrow, wide = _Interleaved(2, 4), _Interleaved(4, 8)
    plan = _planned(narrow)
    parts = [key for s in plan.symmetries for key in s if key.startswith("qkv")]
    assert parts
    assert all("unflatten" in key for key in parts)
    for net in (narrow, wide):
        net.processors = 2  # type: ignore[assignment]
    again = nw.Plan(narrow, plan.treatments, plan.symmetries)
    with pytest.raises(ValueError, match="recur in each of 2 heads or groups, and the model may have 2 or 4"):
        again.apply_to(wide, widened=True)
    for net in (narrow, wide):
        net.num_heads = 2
    keys = {key for s in again.apply_to(wide, widened=True).symmetries for key in s}
    ends = {":".join(key.split("[:, ")[1:]) for key in keys if key.startswith("qkv")}
    assert ends <= {f"{a}:{b}]" for a, b in itertools.pairwise((0, 16, 32, 48))}


class _PartlyNormed(nn.Module):
    """A projection of which some rows stand before a norm."""

    def __init__(self, normed: int, free: int) -> None:
        super().__init__()
        self.sizes = normed, free
        self.packed, self.norm = nn.Linear(5, normed + free, bias=False), nn.LayerNorm(normed)
        self.head = nn.Linear(normed + free, 3)

    def forward(self, x: Tensor) -> Tensor:
        normed, free = self.packed(x).split(self.sizes, -1)
        out: Tensor = self.head(torch.cat([torch.tanh(self.norm(normed)), torch.sin(free)], -1))
        return out


def test_invariant_rows_keep_their_share() -> None:
    torch.manual_seed(0)
    plan = nw.plan(_PartlyNormed(4, 6), [torch.randn(16, 5)])
    assert plan.treatments[0].mask == (True,) * 4 + (False,) * 6
    carried = plan.apply_to(_PartlyNormed(8, 12), widened=True)
    assert carried.treatments[0].mask == (True,) * 8 + (False,) * 12
    with pytest.raises(ValueError, match=r"4 units of 'packed\.weight' are invariant, and it grows from"):
        plan.apply_to(_PartlyNormed(12, 8), widened=True)
