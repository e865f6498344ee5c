"""Networks of diffusers, PEFT, timm and transformers that were chosen before the search ran on any of them.

    pip install diffusers peft timm

`python -m benchmarks.unseen --set-aside 1` judges them like those of `benchmarks.unseen_networks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.unseen_networks import Network, call, logits, token_ids, transformers_model
from torch import nn

__all__ = ["SET_ASIDE"]

SET_ASIDE: dict[str, Network] = {}


def _sample(model: nn.Module, batch: Any) -> Any:
    return model(**batch).sample


# ---------------------------------------------------------------- diffusers: time- and text-conditioned


def _diffusers(name: str, batch: Callable[[], dict[str, Any]], **settings: Any) -> None:
    def build() -> nn.Module:
        import diffusers  # type: ignore[import-not-found]

        return getattr(diffusers, name)(**settings)  # type: ignore[no-any-return]

    SET_ASIDE[f"diffusers {name}"] = Network(build, lambda: [batch() for _ in range(2)], _sample)


def _noisy(name: str, channels: int, size: int, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Return what makes a batch: noisy images as the argument ``name``, times, and other arguments."""
    return lambda: {
        name: torch.randn(2, channels, size, size),
        "timestep": torch.rand(2) * 999,
        **{key: make() for key, make in more.items()},
    }


def _words(width: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 5, width)


_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
_diffusers(
    "UNet2DModel",
    _noisy("sample", 3, 16),
    sample_size=16,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    **_BLOCKS,
)
_diffusers(
    "UNet2DConditionModel",
    _noisy("sample", 4, 8, encoder_hidden_states=_words(24)),
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=8,
    **_BLOCKS,
)
_diffusers(
    "AutoencoderKL",
    lambda: {"sample": torch.randn(2, 3, 16, 16)},
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    sample_size=16,
    **_BLOCKS,
)
_diffusers(
    "DiTTransformer2DModel",
    _noisy("hidden_states", 4, 8, class_labels=lambda: torch.randint(0, 10, (2,))),
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
)
_diffusers(
    "SD3Transformer2DModel",
    _noisy(
        "hidden_states", 4, 8, encoder_hidden_states=_words(24), pooled_projections=lambda: torch.randn(2, 20)
    ),
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=16,
    pooled_projection_dim=20,
    out_channels=4,
    pos_embed_max_size=8,
)
_diffusers(
    "FluxTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(2, 16, 8),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    },
    patch_size=1,
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 4, 8),
)
_diffusers(
    "PixArtTransformer2DModel",
    _noisy("hidden_states", 4, 8, encoder_hidden_states=_words(24)),
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=16,
    caption_channels=24,
    sample_size=8,
    norm_num_groups=4,
    use_additional_conditions=False,
)


# ---------------------------------------------------------------- PEFT: adapters on a frozen base


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _keyword_logits(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch).logits


def _peft(name: str, config: str, **settings: Any) -> None:
    def build() -> nn.Module:
        import peft

        adapter = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
        model: nn.Module = peft.get_peft_model(transformers_model("LlamaForCausalLM", _LLAMA), adapter)
        return model

    SET_ASIDE[f"PEFT {name}"] = Network(build, token_ids, _keyword_logits)


_TARGETS = ["q_proj", "v_proj", "down_proj"]
_peft("LoRA", "LoraConfig", r=4, target_modules=_TARGETS)
_peft("LoRA, trained heads", "LoraConfig", r=4, target_modules=_TARGETS, modules_to_save=["lm_head"])
_peft("DoRA", "LoraConfig", r=4, use_dora=True, target_modules=_TARGETS)
_peft("IA³", "IA3Config", target_modules=_TARGETS, feedforward_modules=["down_proj"])
_peft("VeRA", "VeraConfig", r=4, target_modules=["q_proj", "o_proj"])
_peft("LoHa", "LoHaConfig", r=4, target_modules=_TARGETS)
_peft("prompt tuning", "PromptTuningConfig", num_virtual_tokens=3)


# ---------------------------------------------------------------- timm: images


def _timm(name: str, size: int = 64) -> None:
    def build() -> nn.Module:
        import timm  # type: ignore[import-not-found]

        return timm.create_model(name, num_classes=10)  # type: ignore[no-any-return]

    SET_ASIDE[f"timm {name}"] = Network(
        build, lambda: [torch.randn(2, 3, size, size) for _ in range(2)], call
    )


_timm("levit_128s", 224)
_timm("repvgg_a0")
_timm("ghostnet_050")
_timm("test_vit3", 160)
_timm("test_byobnet")
_timm("test_efficientnet_gn")
_timm("test_nfnet")
_timm("test_resnet")
_timm("xcit_nano_12_p16_224")
_timm("mobilenetv4_conv_small_050")


# ---------------------------------------------------------------- transformers: what the other list has not


def _transformers(model: str, **settings: Any) -> None:
    SET_ASIDE[model] = Network(lambda: transformers_model(model, settings), token_ids, logits)


_TEXT: dict[str, Any] = {**_LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_transformers("SeedOssForCausalLM", **_TEXT, head_dim=8)
_transformers("HunYuanDenseV1ForCausalLM", **_TEXT, head_dim=8)
_transformers("Lfm2ForCausalLM", **_TEXT, layer_types=["conv", "full_attention"])
_transformers("BitNetForCausalLM", **_TEXT)
_transformers("DiffLlamaForCausalLM", **_TEXT)
_transformers("MinistralForCausalLM", **_TEXT, head_dim=8)
_transformers(
    "Dots1ForCausalLM",
    **_TEXT,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_transformers("FlexOlmoForCausalLM", **_TEXT, num_experts=4, num_experts_per_tok=2)
_transformers("Ernie4_5_MoeForCausalLM", **_TEXT, moe_num_experts=4, moe_k=2, moe_intermediate_size=24)
_transformers("ApertusForCausalLM", **_TEXT)
