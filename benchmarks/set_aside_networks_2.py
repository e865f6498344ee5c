"""A second list of networks of transformers that were chosen before the search ran on any of them.

They were chosen and written, and checked with forward and backward passes only (float32 and float64, the same
outputs twice), before nw.find_invariances ran on any of them. None is in `benchmarks.unseen_networks`,
`benchmarks.set_aside_networks` or the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.unseen_networks import Forward, Network, hidden, logits, token_ids, transformers_model
from torch import Tensor, nn

__all__ = ["SET_ASIDE_2"]

SET_ASIDE_2: dict[str, Network] = {}


def _text(model: str, forward: Forward = logits, **settings: Any) -> None:
    """Add a network that reads token ids."""
    SET_ASIDE_2[model] = Network(lambda: transformers_model(model, settings), token_ids, forward)


def _add(model: str, batch: Callable[[], Any], forward: Forward = logits, **settings: Any) -> None:
    """Add a network with what makes a batch."""
    SET_ASIDE_2[model] = Network(
        lambda: transformers_model(model, settings), lambda: [batch() for _ in range(2)], forward
    )


def _named_logits(model: nn.Module, batch: Any) -> Any:
    return model(**batch).logits


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _ids() -> Tensor:
    return torch.randint(3, 60, (3, 8))


_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT: dict[str, Any] = _SIZES | _IDS | {"vocab_size": 61, "max_position_embeddings": 64}
_CAUSAL: dict[str, Any] = _TEXT | {"num_key_value_heads": 2, "use_cache": False}
_LATENT: dict[str, Any] = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_HYBRID = ["linear_attention", "full_attention"]


# ---------------------------------------------------------------- language models: attention and experts


_text(
    "Gemma3nForCausalLM",
    **_CAUSAL
    | {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 4,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.6, 0.0, 0.0],
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
)
_text("NanoChatForCausalLM", **_CAUSAL)
_text("DogeForCausalLM", **_CAUSAL, keep_window_size=4, is_moe=True, num_experts=16, num_experts_per_tok=4)
_text("JetMoeForCausalLM", **_CAUSAL, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
_text(
    "GraniteMoeSharedForCausalLM",
    **_CAUSAL,
    num_local_experts=4,
    num_experts_per_tok=2,
    shared_intermediate_size=24,
)
_text(
    "DbrxForCausalLM",
    **_IDS,
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    vocab_size=61,
    use_cache=False,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
)
_text(
    "Llama4ForCausalLM",
    **_CAUSAL,
    intermediate_size_mlp=48,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    no_rope_layers=[1, 0],
    attention_chunk_size=4,
)
_text(
    "LongcatFlashForCausalLM",
    **{k: v for k, v in _CAUSAL.items() if k not in ("num_hidden_layers", "num_key_value_heads")},
    **_LATENT,
    num_layers=2,
    q_lora_rank=12,
    head_dim=4,
    ffn_hidden_size=48,
    expert_ffn_hidden_size=24,
    n_routed_experts=4,
    zero_expert_num=2,
    moe_topk=2,
)


# ---------------------------------------------------------------- language models: recurrent and hybrid


_text(
    "BambaForCausalLM",
    **_CAUSAL,
    attn_layer_indices=[1],
    mamba_n_heads=4,
    mamba_n_groups=2,
    mamba_d_state=8,
    mamba_chunk_size=4,
)
_text(
    "Zamba2ForCausalLM",
    **_TEXT | {"num_hidden_layers": 3, "use_cache": False},
    layers_block_type=["linear_attention", "hybrid", "hybrid"],
    mamba_d_state=8,
    mamba_ngroups=2,
    n_mamba_heads=4,
    chunk_size=4,
    use_mamba_kernels=False,
    use_shared_attention_adapter=True,
    adapter_rank=8,
)
_text(
    "FalconH1ForCausalLM",
    **_CAUSAL,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_n_groups=2,
    mamba_d_state=8,
    mamba_chunk_size=4,
    mamba_rms_norm=True,
    key_multiplier=0.5,
)
_text(
    "JambaForCausalLM",
    **_CAUSAL,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)
_text(
    "Qwen3NextForCausalLM",
    **_CAUSAL,
    head_dim=8,
    layer_types=_HYBRID,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
)
_text(
    "MiniMaxForCausalLM",
    **_CAUSAL,
    head_dim=8,
    layer_types=_HYBRID,
    block_size=4,
    num_local_experts=4,
    num_experts_per_tok=2,
)
_LATENT_EXPERTS: dict[str, Any] = {
    **_CAUSAL,
    **_LATENT,
    "num_key_value_heads": 4,
    "layer_types": _HYBRID,
    "mlp_layer_types": ["dense", "sparse"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_text("KimiLinearForCausalLM", **_LATENT_EXPERTS, linear_head_dim=8, linear_num_heads=4)
_text("BailingHybridForCausalLM", **_LATENT_EXPERTS, head_dim=8, n_group=2, topk_group=1, num_mtp_layers=0)
_text("OlmoHybridForCausalLM", **_CAUSAL, layer_types=_HYBRID, linear_key_head_dim=8)
_text(
    "RwkvForCausalLM",
    **_IDS,
    vocab_size=61,
    context_length=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    use_cache=False,
)
_text(
    "xLSTMForCausalLM",
    **_IDS,
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=4,
    ffn_round_up_to_multiple_of=16,
    chunk_size=4,
    mode="train",
    norm_reduction_force_float32=False,
    use_cache=False,
)


# ---------------------------------------------------------------- masked language models


def _first_is_global(model: nn.Module, batch: Tensor) -> Any:
    mask = torch.zeros_like(batch)
    mask[:, 0] = 1
    return model(batch, global_attention_mask=mask).logits


_text("FNetForMaskedLM", **{k: v for k, v in _TEXT.items() if k != "num_attention_heads"}, type_vocab_size=2)
_text("ConvBertForMaskedLM", **_TEXT, embedding_size=16, conv_kernel_size=5)
_text(
    "EsmForMaskedLM",
    **_TEXT,
    mask_token_id=60,
    position_embedding_type="rotary",
    emb_layer_norm_before=True,
)
_text("LongformerForMaskedLM", _first_is_global, **_TEXT, attention_window=4)
_text("NystromformerForMaskedLM", **_TEXT, segment_means_seq_len=8, num_landmarks=4, conv_kernel_size=3)
_text("XLMRobertaXLForMaskedLM", **_TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_text("RoFormerForMaskedLM", **_TEXT, embedding_size=16)
_text(
    "PerceiverForMaskedLM",
    num_latents=6,
    d_latents=32,
    d_model=32,
    num_self_attends_per_block=2,
    num_self_attention_heads=4,
    num_cross_attention_heads=4,
    qk_channels=16,
    v_channels=32,
    vocab_size=61,
    max_position_embeddings=8,
)
_text(  # its backward pass needs training mode
    "ReformerForMaskedLM",
    pad_token_id=0,
    eos_token_id=2,
    hidden_size=32,
    feed_forward_size=48,
    num_attention_heads=4,
    attention_head_size=8,
    attn_layers=["local", "lsh"],
    axial_pos_shape=[2, 4],
    axial_pos_embds_dim=[12, 20],
    local_attn_chunk_length=4,
    lsh_attn_chunk_length=4,
    num_buckets=2,
    hash_seed=0,
    max_position_embeddings=8,
    vocab_size=61,
)


# ---------------------------------------------------------------- images and video


_IMAGE: dict[str, Any] = _SIZES | {"image_size": 32, "patch_size": 8}
_PIXELS = _normal(4, 3, 32, 32)
_WIDE_PIXELS = _normal(4, 3, 64, 64)
_VIDEO = _normal(3, 4, 3, 16, 16)

_add(
    "HieraForImageClassification",
    _PIXELS,
    embed_dim=16,
    image_size=[32, 32],
    mlp_ratio=2.0,
    depths=[1, 1, 1],
    num_heads=[2, 4, 8],
    num_query_pool=2,
    masked_unit_size=[4, 4],
    masked_unit_attention=[True, False, False],
)
_add(
    "MobileViTV2ForImageClassification",
    _WIDE_PIXELS,
    image_size=64,
    width_multiplier=0.25,
    n_attn_blocks=[1, 1, 1],
    base_attn_unit_dims=[64, 96, 128],
    initializer_range=0.2,
)
_add("Data2VecVisionForImageClassification", _PIXELS, **_IMAGE, use_relative_position_bias=True)
_add(
    "VitDetModel",
    _PIXELS,
    hidden,
    **{k: v for k, v in _IMAGE.items() if k != "intermediate_size"},
    mlp_ratio=2,
    pretrain_image_size=32,
    window_size=2,
    window_block_indices=[0],
    residual_block_indices=[1],
    use_relative_position_embeddings=True,
)
_add(
    "Swin2SRForImageSuperResolution",
    _normal(3, 3, 16, 16),
    lambda model, batch: model(batch).reconstruction,
    image_size=16,
    patch_size=1,
    embed_dim=32,
    depths=[2, 1],
    num_heads=[4, 4],
    window_size=4,
    upsampler="pixelshuffledirect",
)
_add(
    "SamVisionModel",
    _PIXELS,
    hidden,
    **{k: v for k, v in _IMAGE.items() if k != "intermediate_size"},
    mlp_dim=48,
    output_channels=16,
    window_size=2,
    global_attn_indexes=[1],
    initializer_range=0.02,
)
_add(
    "HGNetV2ForImageClassification",
    _WIDE_PIXELS,
    embedding_size=8,
    hidden_sizes=[16, 24, 32, 40],
    depths=[1, 1, 1, 1],
    stem_channels=[3, 8, 8],
    stage_in_channels=[8, 16, 24, 32],
    stage_mid_channels=[8, 8, 12, 12],
    stage_out_channels=[16, 24, 32, 40],
    stage_num_blocks=[1, 1, 2, 1],
    stage_numb_of_layers=[2, 2, 2, 2],
    use_learnable_affine_block=True,
    initializer_range=0.2,
)
_add(
    "TextNetForImageClassification",
    _WIDE_PIXELS,
    stem_out_channels=8,
    image_size=[64, 64],
    conv_layer_kernel_sizes=[[[3, 3]], [[3, 1], [3, 3]], [[1, 3]], [[3, 3]]],
    conv_layer_strides=[[2], [2, 1], [2], [1]],
    hidden_sizes=[8, 12, 16, 20, 24],
    initializer_range=0.2,
)
_add(
    "LevitForImageClassification",
    _normal(4, 3, 96, 96),
    image_size=96,
    hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 3, 4],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
    initializer_range=0.2,
)
_add("VideoMAEForVideoClassification", _VIDEO, **_IMAGE | {"image_size": 16}, num_frames=4)
_add(
    "VivitForVideoClassification",
    _VIDEO,
    **_SIZES,
    image_size=16,
    num_frames=4,
    tubelet_size=[2, 8, 8],
)


def _detected(model: nn.Module, batch: Any) -> Any:
    out = model(batch)
    return out.logits, out.pred_boxes


_CHANNELS = [8, 16, 24, 32]
_add(
    "RTDetrForObjectDetection",
    _normal(2, 3, 64, 64),
    _detected,
    backbone_config={
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": _CHANNELS,
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    encoder_hidden_dim=16,
    encoder_in_channels=_CHANNELS[1:],
    encoder_ffn_dim=24,
    encoder_attention_heads=2,
    d_model=16,
    num_queries=6,
    decoder_in_channels=[16, 16, 16],
    decoder_ffn_dim=24,
    decoder_n_points=2,
    decoder_layers=2,
    decoder_attention_heads=2,
    num_denoising=0,
    num_labels=5,
    initializer_range=0.5,
)


# ---------------------------------------------------------------- images and text


def _captioned() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "pixel_values": torch.randn(3, 3, 32, 32)}


_TOWERS = {"text_config": _TEXT, "vision_config": _IMAGE}
_add("SiglipModel", _captioned, lambda model, batch: model(**batch).logits_per_image, **_TOWERS)
_add(
    "CLIPSegForImageSegmentation",
    _captioned,
    _named_logits,
    **_TOWERS,
    projection_dim=16,
    extract_layers=[0, 1],
    reduce_dim=16,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=24,
)


# ---------------------------------------------------------------- sound and time series


def _spoken(name: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(shape), "decoder_input_ids": _ids()}


_TRANSLATOR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "use_cache": False,
}
_add(
    "WavLMForCTC",
    _normal(3, 800),
    **_SIZES | _IDS,
    vocab_size=12,
    feat_extract_norm="layer",
    conv_dim=[16, 16, 16],
    conv_stride=[5, 4, 2],
    conv_kernel=[10, 5, 3],
    conv_bias=True,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    num_buckets=16,
    max_bucket_distance=20,
    do_stable_layer_norm=True,
    apply_spec_augment=False,
    layerdrop=0.0,
)
_add(
    "WhisperForConditionalGeneration",
    _spoken("input_features", 3, 10, 24),
    _named_logits,
    **_TRANSLATOR | _IDS,
    vocab_size=61,
    num_mel_bins=10,
    max_source_positions=12,
    max_target_positions=16,
    decoder_start_token_id=1,
    begin_suppress_tokens=None,
)
_add(
    "MoonshineForConditionalGeneration",
    _spoken("input_values", 3, 3200),
    _named_logits,
    **_IDS,
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    encoder_num_hidden_layers=2,
    decoder_num_hidden_layers=2,
    encoder_num_attention_heads=4,
    decoder_num_attention_heads=4,
    use_cache=False,
)
_add(
    "PatchTSTForPrediction",
    _normal(4, 24, 3),
    lambda model, batch: model(batch).prediction_outputs,
    num_input_channels=3,
    context_length=24,
    patch_length=6,
    patch_stride=6,
    num_hidden_layers=2,
    d_model=32,
    ffn_dim=48,
    prediction_length=4,
)
_add(
    "PatchTSMixerForPrediction",
    _normal(4, 24, 3),
    lambda model, batch: model(batch).prediction_outputs,
    num_input_channels=3,
    context_length=24,
    patch_length=6,
    patch_stride=6,
    d_model=16,
    num_layers=2,
    mode="mix_channel",
    prediction_length=4,
)
_add(
    "TimeSeriesTransformerForPrediction",
    lambda: {
        "past_values": torch.randn(3, 15),
        "past_time_features": torch.randn(3, 15, 2),
        "past_observed_mask": torch.ones(3, 15),
        "future_values": torch.randn(3, 4),
        "future_time_features": torch.randn(3, 4, 2),
    },
    lambda model, batch: model(**batch).params,
    **_TRANSLATOR,
    prediction_length=4,
    context_length=12,
    lags_sequence=[1, 2, 3],
    num_time_features=2,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
)
