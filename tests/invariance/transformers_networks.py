"""Networks of the transformers library, tiny, from configurations; counts derived in the comments.

L is the number of layers. Pairs inside of a layer: q·k, v·o, up·down where homogeneous; each norm's gain
(and bias) against its readers. Thresholds were fixed before any network marked ``aside`` was looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn


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
    """How to build it, what to feed it, and how many of each kind there must be."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    scale_invariant: int
    joint: int
    no_effect: int = 0
    forward: Callable[[nn.Module, Any], Any] = logits
    aside: bool = False


_TEXT: dict[str, Any] = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}

NETWORKS: dict[str, Network] = {
    # per layer q·k and v·o inside of one tensor, two norms; stream and last norm are one, as the head is tied
    "gpt2": Network(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=4, n_head=2)
        ),
        ids,
        0,
        4 * 4 + 1,
    ),
    # per layer q·k, v·o, up·down, two norms; stream; last norm
    "llama": Network(
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(hidden_size=32, intermediate_size=48, num_key_value_heads=2, **_TEXT)
        ),
        ids,
        0,
        5 * 2 + 2,
    ),
    # per layer q·k, v·o, two norms, up (half of a tensor of all experts) against down; stream; last norm
    "mixtral": Network(
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                hidden_size=32, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, **_TEXT
            )
        ),
        ids,
        0,
        5 * 2 + 2,
    ),
    # post-norm: per layer q·k, v·o, the norm between, the norm before; embeddings (tied); last norm
    "bert": Network(
        lambda: hf.BertForMaskedLM(hf.BertConfig(hidden_size=16, intermediate_size=24, **_TEXT)),
        ids,
        0,
        4 * 2 + 2,
        2,
    ),
    # encoder: q·k, v·o, wi·wo, two norms; decoder: the same, cross-attention q·k, v·o and its norm;
    # the encoder's last norm against the keys and values of the decoder; both streams and the head, tied
    "t5": Network(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        ids,
        0,
        5 * 2 + 8 * 2 + 2,
        forward=translate,
    ),
    # per layer q·k, v·o, two norms; stream; last norm
    "vit": Network(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=32,
                patch_size=8,
            )
        ),
        pixels(32),
        0,
        4 * 2 + 2,
        2,
    ),
    # four blocks like ViT's; patch embedding; a stream per stage; the norm between stages; last norm
    "swin": Network(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
            )
        ),
        pixels(32),
        0,
        4 * 4 + 1 + 2 + 1 + 1,
        4,
    ),
    # five blocks: convolution before a norm, norm, layer scale; patch embedding; four streams; three
    # norms between stages; last norm
    "convnext": Network(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], image_size=64)
        ),
        pixels(64),
        0,
        3 * 5 + 1 + 4 + 3 + 1,
    ),
    # every convolution; the norm inside of each of eight blocks, four streams
    "resnet18": Network(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 12, 16, 20],
                depths=[2] * 4,
                layer_type="basic",
            )
        ),
        pixels(64),
        20,
        8 + 4,
    ),
    # the first convolution (a group norm per channel) and the weight-normalised position convolution;
    # per layer q·k, v·o, the norm between, the norm before; the last norm; the norm of the features
    "wav2vec2": Network(
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                vocab_size=12,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                conv_dim=(8, 8, 8),
                conv_stride=(5, 2, 2),
                conv_kernel=(10, 3, 3),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
            )
        ),
        waves,
        2,
        4 * 2 + 1 + 1,
        2,
    ),
    # depthwise and pointwise convolutions; ReLU6 is not homogeneous, so only the gains of seven linear
    # streams, two of which have one member and are invariant alone; the biases of the linear norms (17)
    # are constants that the next norm removes
    "mobilenet_v2": Network(
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.25)),
        pixels(64),
        52 + 2,
        5,
        17,
        aside=True,
    ),
    # q and k have directions only; per layer their gains against each other, v·o, up·down, two norms
    "qwen3": Network(
        lambda: hf.Qwen3ForCausalLM(
            hf.Qwen3Config(
                hidden_size=32,
                intermediate_size=48,
                num_key_value_heads=2,
                head_dim=8,
                **_TEXT,
            )
        ),
        ids,
        2 * 2,
        5 * 2 + 2,
        aside=True,
    ),
    # every writer is normalised: q, k, v, o, up, down of each layer alone; gains of q and k; the stream
    # (embeddings and gains against the gates); last norm
    "olmo2": Network(
        lambda: hf.Olmo2ForCausalLM(
            hf.Olmo2Config(
                hidden_size=32, intermediate_size=48, num_key_value_heads=4, pad_token_id=1, **_TEXT
            )
        ),
        ids,
        6 * 2,
        2 + 2,
        aside=True,
    ),
    # ReLU: per layer q·k, v·o, fc1·fc2, two norms; stream and last norm are one, as the head is tied
    "opt": Network(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=32, ffn_dim=48, max_position_embeddings=16, word_embed_proj_dim=32, **_TEXT
            )
        ),
        ids,
        0,
        5 * 2 + 1,
        2,
        aside=True,
    ),
    # packed per head, attention beside the mlp: per layer two norms, q·k, v·o; stream; last norm
    "gpt_neox": Network(
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(hidden_size=32, intermediate_size=48, **_TEXT)),
        ids,
        0,
        4 * 2 + 2,
        aside=True,
    ),
    # squeeze-and-excite: per block the first norm, the second against the squeeze, squeeze against excite;
    # the stem; four streams
    "regnet": Network(
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 12, 16, 24],
                depths=[1, 1, 2, 1],
                groups_width=4,
            )
        ),
        pixels(64),
        1 + 3 * 5 + 4,
        3 * 5 + 1 + 4,
        aside=True,
    ),
    # as BERT
    "distilbert": Network(
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(
                vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16
            )
        ),
        ids,
        0,
        4 * 2 + 2,
        2,
        aside=True,
    ),
    # gains are 1 + weight, so no norm is homogeneous; every writer is normalised: v, o, up and down of each
    # layer alone; q·k of each
    "gemma2": Network(
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8, **_TEXT)
        ),
        ids,
        4 * 2,
        2,
        aside=True,
    ),
    # packed q, k, v with one key, attention beside the mlp, one norm for both: per layer that norm, q·k, v·o;
    # stream and last norm are one, as the head is tied
    "falcon": Network(
        lambda: hf.FalconForCausalLM(hf.FalconConfig(hidden_size=32, **_TEXT)), ids, 0, 3 * 2 + 1, aside=True
    ),
    # one layer, used twice: q·k, v·o, the norm between, and what enters it from both sides; embeddings
    # (tied); their norm
    "albert": Network(
        lambda: hf.AlbertForMaskedLM(
            hf.AlbertConfig(embedding_size=12, hidden_size=16, intermediate_size=24, **_TEXT)
        ),
        ids,
        0,
        6,
        1,
        aside=True,
    ),
    # q, k, v and gate, up packed, grouped queries: as Llama
    "phi3": Network(
        lambda: hf.Phi3ForCausalLM(
            hf.Phi3Config(
                hidden_size=32, intermediate_size=48, num_key_value_heads=2, pad_token_id=1, **_TEXT
            )
        ),
        ids,
        0,
        5 * 2 + 2,
        aside=True,
    ),
    # packed, one key for all heads: per layer q·k, v·o, two norms; stream and last norm are one (tied)
    "gpt_bigcode": Network(
        lambda: hf.GPTBigCodeForCausalLM(
            hf.GPTBigCodeConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ),
        ids,
        0,
        4 * 2 + 1,
        aside=True,
    ),
    # packed per head, the embeddings normalised: per layer q·k, v·o, two norms; the stream from that norm on;
    # embeddings and last norm are one (tied)
    "bloom": Network(
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)),
        ids,
        0,
        4 * 2 + 2,
        aside=True,
    ),
}
