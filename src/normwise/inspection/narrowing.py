"""Narrow copies of a configuration of transformers: fewer heads, channels, experts and words, all layers.

Symmetries do not depend on widths, so a narrow copy shows those of a model of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["differences", "experts_of", "narrowed", "same_parameters"]

_HEADS = {
    *("num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads", "n_head", "n_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"),
}
_OF_HEADS = {
    *("head_dim", "d_kv", "v_head_dim", "qk_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"),
    *("q_lora_rank", "kv_lora_rank"),
}
_HIDDEN = {
    *("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"),
    *("word_embed_proj_dim", "attention_hidden_size", "lru_width"),
}
_INNER = {
    *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("hidden_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("intermediate_size_mlp", "mlp_dim", "expert_ffn_hidden_size"),
}
_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
_CHOSEN = {"num_experts_per_tok", "num_selected_experts", "moe_k", "moe_topk", "moe_top_k"}
_GROUPS = {"n_group", "topk_group"}
_WORDS, _LEAST_HEADS, _LEAST_OF_HEAD, _LEAST_HIDDEN = 61, 2, 4, 32

Numbers = dict[str, int]


def narrowed(config: Any) -> Iterator[Any]:
    """Yield narrow copies of a configuration, the narrowest first; not all of them may build a model.

    Heads, and dimensions of heads, keep their ratios to each other: so parts of packed parameters keep their
    shares. Layers and positions stay.

    Example:
        >>> from types import SimpleNamespace
        >>> class Config(SimpleNamespace):
        ...     def to_dict(self):
        ...         return dict(vars(self))
        ...
        ...     @classmethod
        ...     def from_dict(cls, settings):
        ...         return cls(**settings)
        >>> llama = Config(
        ...     hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
        ... )
        >>> next(narrowed(llama))
        Config(hidden_size=64, num_attention_heads=16, num_key_value_heads=2, vocab_size=61)
    """
    whole = config.to_dict()
    for narrow in (_all, _keeping_heads, _by_one_factor, _without_heads, _words_and_experts):
        settings = _applied(narrow, whole)
        if settings != whole:
            try:
                yield type(config).from_dict(settings)
            except Exception:  # of any class: the configuration refuses these sizes, the next may fit
                continue


def differences(wide: Any, narrow: Any) -> dict[str, tuple[int, int]]:
    """Return {setting: (wide, narrow)} of the settings of one configuration that differ in another."""
    found = {}
    for key, value, other in _paired(wide.to_dict(), narrow.to_dict()):
        is_width = not key.endswith("token_id") and isinstance(value, int) and isinstance(other, int)
        if is_width and value != other:
            found[key] = value, other
    return found


def experts_of(config: Any) -> int:
    """Return the number of experts of a layer in a configuration; 0 if there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> experts_of(SimpleNamespace(to_dict=lambda: {"hidden_size": 64, "num_local_experts": 8}))
        8
    """

    def most(settings: Mapping[str, Any]) -> int:
        own = [v for k, v in settings.items() if k in _EXPERTS and isinstance(v, int)]
        nested = [most(v) for v in settings.values() if isinstance(v, Mapping) and "model_type" in v]
        return max(own + nested, default=0)

    return most(config.to_dict())


def same_parameters(wide: nn.Module, narrow: nn.Module) -> bool:
    """Return whether two models have parameters of the same names, with as many dimensions."""
    a, b = ({name: p.ndim for name, p in m.named_parameters()} for m in (wide, narrow))
    return a == b


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in a.items():
        if isinstance(value, Mapping):
            if "model_type" not in value or not isinstance(b.get(key), Mapping):
                continue
            yield from _paired(value, b[key], f"{place}{key}.")
        elif key in b:
            yield place + key, value, b[key]


def _applied(narrow: Callable[[Numbers], Numbers], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with ``narrow`` applied to their numbers, and to those of nested configurations."""
    numbers = {k: v for k, v in settings.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}
    changed: dict[str, Any] = {**settings, **narrow(numbers)}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "model_type" in value:
            changed[key] = _applied(narrow, value)
        elif key.endswith("token_id") and "vocab_size" in changed:
            changed[key] = _within(value, changed["vocab_size"])
    return changed


def _within(token: Any, words: Any) -> Any:
    if isinstance(token, list):
        return [_within(t, words) for t in token]
    return min(token, words - 1) if isinstance(token, int) and isinstance(words, int) else token


def _all(numbers: Numbers) -> Numbers:
    heads = _divided({k: numbers[k] for k in numbers.keys() & _HEADS if numbers[k] > 1}, _LEAST_HEADS)
    of_heads = _divided({k: numbers[k] for k in numbers.keys() & _OF_HEADS}, _LEAST_OF_HEAD)
    hidden = _hidden(numbers, heads, of_heads)
    return {**_without_heads(numbers, hidden), **heads, **of_heads}


def _keeping_heads(numbers: Numbers) -> Numbers:
    """Keep the number of heads, as parts that recur in each head (latent attention) carry over with it."""
    of_heads = _divided({k: numbers[k] for k in numbers.keys() & _OF_HEADS}, _LEAST_OF_HEAD)
    heads = {k: numbers[k] for k in numbers.keys() & _HEADS}
    tied = numbers.get("head_dim", 0) * max(heads.values(), default=1) in {
        numbers[k] for k in numbers.keys() & _HIDDEN
    }
    hidden = _hidden(numbers, heads if tied else {}, of_heads)
    return {**_without_heads(numbers, hidden), **of_heads}


def _by_one_factor(numbers: Numbers) -> Numbers:
    """Divide hidden sizes, inner sizes and numbers of heads by one factor, as state-space models need it."""
    names = numbers.keys() & (_HEADS | _HIDDEN | _INNER | {"time_step_rank"})
    heads = [numbers[k] for k in names & _HEADS if numbers[k] > 1]
    hidden = [numbers[k] for k in names & _HIDDEN]
    most = min([h // _LEAST_HEADS for h in heads] + [h // _LEAST_HIDDEN for h in hidden], default=1)
    common = math.gcd(*(numbers[k] for k in names if numbers[k] > 1))
    factor = max((d for d in range(1, max(most, 1) + 1) if common % d == 0), default=1)
    divided = {k: numbers[k] // factor for k in names if numbers[k] > 1}
    return {**_words_and_experts(numbers), **divided}


def _without_heads(numbers: Numbers, hidden: Numbers | None = None) -> Numbers:
    hidden = hidden or {}
    base = max(hidden.values(), default=max((numbers[k] for k in numbers.keys() & _HIDDEN), default=32))
    of_size = {numbers[k]: new for k, new in hidden.items()}
    sizes = {numbers[k] for k in numbers.keys() & _INNER} - of_size.keys()
    main = numbers.get("hidden_size", max(of_size, default=0))
    smaller, larger = sorted(s for s in sizes if s < main), sorted(s for s in sizes if s >= main)
    inner = {
        size: min(size, _rounded(base * share) + 8 * i)
        for share, those in ((0.5, smaller), (1.5, larger))
        for i, size in enumerate(those)
    }
    of_inner = {k: (of_size | inner)[numbers[k]] for k in numbers.keys() & _INNER}
    return {**_words_and_experts(numbers), **hidden, **of_inner}


def _words_and_experts(numbers: Numbers) -> Numbers:
    changed = {k: min(numbers[k], _WORDS) for k in numbers.keys() & {"vocab_size"}}
    groups = min(2, numbers.get("n_group", 1))  # of two experts each, of which one group is chosen
    changed |= {k: min(numbers[k], groups if k == "n_group" else 1) for k in numbers.keys() & _GROUPS}
    experts = 4
    for k in numbers.keys() & _EXPERTS:
        changed[k] = min(numbers[k], experts)
    if changed.keys() & _EXPERTS:
        changed |= {k: min(numbers[k], experts // 2) for k in numbers.keys() & _CHOSEN}
    return changed


def _hidden(numbers: Numbers, heads: Numbers, of_heads: Numbers) -> Numbers:
    """Return the hidden sizes: multiples of the number of heads, which keep their order."""
    sizes = {k: numbers[k] for k in numbers.keys() & _HIDDEN}
    if not sizes:
        return {}
    main = numbers.get("hidden_size", max(sizes.values()))
    count, new_count = max((numbers[k] for k in heads), default=1), max(heads.values(), default=1)
    own_size = any(numbers[k] * count == main for k in ("head_dim", "d_kv") if k in of_heads)
    least = 1 if own_size else _LEAST_OF_HEAD  # else the hidden size may determine that of a head
    base = new_count * max(least, -(-_LEAST_HIDDEN // new_count))
    base = min(base, main)
    return {k: base if s == main else max(8, min(s, _rounded(base * s / main))) for k, s in sizes.items()}


def _rounded(size: float) -> int:
    return max(8, round(size / 8) * 8)


def _divided(numbers: Numbers, least: int) -> Numbers:
    """Return numbers divided by a common factor, as large as leaves ``least`` or more, and an even number."""
    if not numbers:
        return {}
    common, smallest = math.gcd(*numbers.values()), min(numbers.values())
    factors = [
        d for d in range(1, smallest // least + 1) if common % d == 0 and (d == 1 or smallest // d % 2 == 0)
    ]
    factor = max(factors, default=1)
    return {k: n // factor for k, n in numbers.items()}
