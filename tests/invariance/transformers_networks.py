"""Tiny networks of the transformers library, with counts derived by hand in the comments.

The pairs inside of a layer are q·k, v·o, up·down where the activation is homogeneous, and the gain (and bias)
of each norm against its readers. The thresholds of find_invariances were fixed before anyone looked at a
network that is marked ``aside``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

hf: Any = pytest.importorskip("transformers")


def logits(model: nn.Module, batch: Any) -> Any:
    return model(batch).logits


def translate(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch, decoder_input_ids=batch).logits


def ids() -> list[Any]:
    return [torch.randint(3, 50, (4, 9)) for _ in range(3)]


def pixels(size: int) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(6, 3, size, size) for _ in range(3)]


def waves() -> list[Any]:
    return [torch.randn(3, 800) for _ in range(3)]


@dataclass
class Network:
    """The class and configuration of a network, its batches, and how many of each verdict are right."""

    model: str
    config: dict[str, Any]
    joint: int
    scale_invariant: int = 0
    no_effect: int = 0
    batches: Callable[[], list[Any]] = ids
    forward: Callable[[nn.Module, Any], Any] = logits
    aside: bool = False

    def build(self) -> nn.Module:
        cls = getattr(hf, self.model)
        model: nn.Module = cls(cls.config_class(**self.config))
        return model


_TEXT: dict[str, Any] = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = _TEXT | {"hidden_size": 32, "intermediate_size": 48}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_NARROW = _TEXT | {"hidden_size": 16, "intermediate_size": 24}
_GPT2: dict[str, Any] = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_head": 2}
_VIT = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

NETWORKS: dict[str, Network] = {
    # per layer q·k and v·o inside of one tensor, two norms; stream and last norm are one, as the head is tied
    "gpt2": Network("GPT2LMHeadModel", _GPT2 | {"n_layer": 4}, 4 * 4 + 1),
    # per layer q·k, v·o, up·down, two norms; stream; last norm
    "llama": Network("LlamaForCausalLM", _GROUPED, 5 * 2 + 2),
    # per layer q·k, v·o, two norms, up (half of a tensor of all experts) against down; stream; last norm
    "mixtral": Network(
        "MixtralForCausalLM", _GROUPED | {"intermediate_size": 24, "num_local_experts": 4}, 5 * 2 + 2
    ),
    # post-norm: per layer q·k, v·o, the norm between, the norm before; embeddings (tied); last norm
    "bert": Network("BertForMaskedLM", _NARROW, 4 * 2 + 2, no_effect=2),
    # encoder: q·k, v·o, wi·wo, two norms; decoder: the same, cross-attention q·k, v·o and its norm;
    # the encoder's last norm against the keys and values of the decoder; both streams and the head, tied
    "t5": Network(
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        5 * 2 + 8 * 2 + 2,
        forward=translate,
    ),
    # per layer q·k, v·o, two norms; stream; last norm
    "vit": Network(
        "ViTForImageClassification",
        _VIT | {"hidden_size": 16, "intermediate_size": 24},
        4 * 2 + 2,
        no_effect=2,
        batches=pixels(32),
    ),
    # four blocks like ViT's; patch embedding; a stream per stage; the norm between stages; last norm
    "swin": Network(
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        4 * 4 + 1 + 2 + 1 + 1,
        no_effect=4,
        batches=pixels(32),
    ),
    # five blocks: convolution before a norm, norm, layer scale; patch embedding; four streams; three
    # norms between stages; last norm
    "convnext": Network(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "image_size": 64},
        3 * 5 + 1 + 4 + 3 + 1,
        batches=pixels(64),
    ),
    # every convolution; the norm inside of each of eight blocks, four streams
    "resnet18": Network(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [2] * 4, "layer_type": "basic"},
        8 + 4,
        20,
        batches=pixels(64),
    ),
    # the first convolution (a group norm per channel) and the weight-normalised position convolution;
    # per layer q·k, v·o, the norm between, the norm before; the last norm; the norm of the features
    "wav2vec2": Network(
        "Wav2Vec2ForCTC",
        _NARROW
        | {
            "vocab_size": 12,
            "num_attention_heads": 2,
            "conv_dim": (8, 8, 8),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        4 * 2 + 1 + 1,
        2,
        2,
        batches=waves,
    ),
    # depthwise and pointwise convolutions; ReLU6 is not homogeneous, so only the gains of seven linear
    # streams, two of which have one member and are invariant alone; the biases of the linear norms (17)
    # are constants that the next norm removes
    "mobilenet_v2": Network(
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25},
        5,
        52 + 2,
        17,
        batches=pixels(64),
        aside=True,
    ),
    # q and k have directions only; per layer their gains against each other, v·o, up·down, two norms
    "qwen3": Network("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}, 5 * 2 + 2, 2 * 2, aside=True),
    # every writer is normalised: q, k, v, o, up, down of each layer alone; gains of q and k; the stream
    # (embeddings and gains against the gates); last norm
    "olmo2": Network(
        "Olmo2ForCausalLM",
        _WIDE | {"num_key_value_heads": 4, "pad_token_id": 1},
        2 + 2,
        6 * 2,
        aside=True,
    ),
    # ReLU: per layer q·k, v·o, fc1·fc2, two norms; stream and last norm are one, as the head is tied
    "opt": Network(
        "OPTForCausalLM",
        _TEXT | {"hidden_size": 32, "ffn_dim": 48, "max_position_embeddings": 16, "word_embed_proj_dim": 32},
        5 * 2 + 1,
        no_effect=2,
        aside=True,
    ),
    # packed per head, attention beside the mlp: per layer two norms, q·k, v·o; stream; last norm
    "gpt_neox": Network("GPTNeoXForCausalLM", _WIDE, 4 * 2 + 2, aside=True),
    # squeeze-and-excite: per block the first norm, the second against the squeeze, squeeze against excite;
    # the stem; four streams
    "regnet": Network(
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "groups_width": 4},
        3 * 5 + 1 + 4,
        1 + 3 * 5 + 4,
        batches=pixels(64),
        aside=True,
    ),
    # as BERT
    "distilbert": Network(
        "DistilBertForMaskedLM",
        {
            "vocab_size": 50,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 16,
        },
        4 * 2 + 2,
        no_effect=2,
        aside=True,
    ),
    # gains are 1 + weight, so no norm is homogeneous; every writer is normalised: v, o, up and down of each
    # layer alone; q·k of each
    "gemma2": Network("Gemma2ForCausalLM", _GROUPED | {"head_dim": 8}, 2, 4 * 2, aside=True),
    # packed q, k, v with one key, attention beside the mlp, one norm for both: per layer that norm, q·k, v·o;
    # stream and last norm are one, as the head is tied
    "falcon": Network("FalconForCausalLM", _TEXT | {"hidden_size": 32}, 3 * 2 + 1, aside=True),
    # one layer, used twice: q·k, v·o, the norm between, and what enters it from both sides; embeddings
    # (tied); their norm
    "albert": Network("AlbertForMaskedLM", _NARROW | {"embedding_size": 12}, 6, no_effect=1, aside=True),
    # q, k, v and gate, up packed, grouped queries: as Llama
    "phi3": Network("Phi3ForCausalLM", _GROUPED | {"pad_token_id": 1}, 5 * 2 + 2, aside=True),
    # packed, one key for all heads: per layer q·k, v·o, two norms; stream and last norm are one (tied)
    "gpt_bigcode": Network("GPTBigCodeForCausalLM", _GPT2 | {"n_layer": 2}, 4 * 2 + 1, aside=True),
    # packed per head, the embeddings normalised: per layer q·k, v·o, two norms; the stream from that norm on;
    # embeddings and last norm are one (tied)
    "bloom": Network(
        "BloomForCausalLM",
        {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        4 * 2 + 2,
        aside=True,
    ),
}
