"""Small networks whose invariances are derived by hand in their comments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.invariance.modules import (
    DenseNet,
    MoE,
    Normalized,
    Recurrent,
    RMSNorm,
    SmallResNet,
    SqueezeExcite,
    Transformer,
    UNet,
    legacy_weight_norm,
    mlp,
    vgg,
)
from torch import nn
from torch.nn.utils import parametrizations

Symmetry = dict[str, int]


@dataclass
class Case:
    """A network, its batches, and the right result."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    scale_invariant: dict[str, int | None] = field(default_factory=dict)
    joint: list[Symmetry] = field(default_factory=list)
    no_effect: set[str] = field(default_factory=set)
    partial: dict[str, tuple[int, list[bool]]] = field(default_factory=dict)


def plus(*names: str) -> Symmetry:
    return dict.fromkeys(names, 1)


def both(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def vectors() -> list[Any]:
    return [torch.randn(16, 6), torch.randn(16, 6)]


def images(size: int = 8, channels: int = 3) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(8, channels, size, size), torch.randn(8, channels, size, size)]


def tokens() -> list[Any]:
    return [torch.randint(0, 11, (4, 7)), torch.randint(0, 11, (4, 7))]


def prenorm_joint(
    norm_names: Callable[[str], list[str]], bias: bool, packed: bool, tied: bool
) -> list[Symmetry]:
    """q·k and v·o pairs, each norm with its readers, the residual stream, the last norm with the head."""
    w = both if bias else lambda name: [f"{name}.weight"]
    pairs: list[Symmetry] = []
    stream = plus("emb.weight", "pos")
    for i in range(2):
        attn = f"attn.{i}"
        readers = [f"{attn}.qkv.weight"] if packed else [f"{attn}.{n}.weight" for n in "qkv"]
        pairs.append({**plus(*norm_names(f"n1.{i}")), **dict.fromkeys(readers, -1)})
        pairs.append({**plus(*norm_names(f"n2.{i}")), f"mlp.{i}.0.weight": -1})
        if packed:
            qkv = f"{attn}.qkv"
            pairs.append({f"{qkv}.weight[0:8]": 1, f"{qkv}.bias[0:8]": 1, f"{qkv}.weight[8:16]": -1})
            pairs.append({f"{qkv}.weight[16:24]": 1, f"{qkv}.bias[16:24]": 1, f"{attn}.o.weight": -1})
        else:
            pairs.append({**plus(*w(f"{attn}.q")), f"{attn}.k.weight": -1})
            pairs.append({**plus(*w(f"{attn}.v")), f"{attn}.o.weight": -1})
        stream |= plus(*w(f"{attn}.o"), *w(f"mlp.{i}.2"))
    last = dict.fromkeys(norm_names("norm"), -1)
    if tied:
        return [*pairs, {**stream, **last}]
    return [*pairs, stream, {**last, "head.weight": 1}]


def half(rows: int, which: range) -> list[bool]:
    return [i in which for i in range(rows)]


def both_norm(name: str) -> list[str]:
    return both(name)


def only_gain(name: str) -> list[str]:
    return [f"{name}.weight"]


_Q, _K = [f"attn.{i}.q.weight" for i in range(2)], [f"attn.{i}.k.weight" for i in range(2)]
_KEY_BIASES = {f"attn.{i}.k.bias" for i in range(2)}
_V0, _V1 = "parametrizations.weight.original0", "parametrizations.weight.original1"


def _postnorm_joint() -> list[Symmetry]:
    """Each layer ends in a norm: only pairs inside of a layer, and the embeddings do not reach a norm alone.

    x₀ = emb + pos feeds attention and the first norm, so emb, pos and the attention's output scale
    together: with q, k, v divided by it, n1(x + attn(x)) is unchanged. A norm's gain and bias feed a
    residual: n2(x + mlp(x)) is unchanged if x, the mlp's output and 1/(its first weight) scale together.
    """
    pairs: list[Symmetry] = []
    before = ["emb.weight", "pos"]
    for i in range(2):
        a = f"attn.{i}"
        pairs.append({**plus(*both(f"{a}.q")), f"{a}.k.weight": -1})
        pairs.append({**plus(*both(f"{a}.v")), f"{a}.o.weight": -1})
        readers = dict.fromkeys([f"{a}.q.weight", f"{a}.k.weight", f"{a}.v.weight"], -1)
        pairs.append({**plus(*before), **readers, **plus(*both(f"{a}.o"))})
        pairs.append({**plus(*both(f"n1.{i}")), f"mlp.{i}.0.weight": -1, **plus(*both(f"mlp.{i}.2"))})
        before = both(f"n2.{i}")
    pairs.append({**plus(*before), "head.weight": -1})
    return pairs


CASES: dict[str, Case] = {
    # A ReLU passes a factor on: each layer against the next.
    "mlp_relu": Case(
        lambda: mlp(nn.ReLU),
        vectors,
        joint=[{**plus(*both("0")), "2.weight": -1}, {**plus(*both("2")), "4.weight": -1}],
    ),
    "mlp_gelu": Case(lambda: mlp(nn.GELU), vectors),
    "vgg": Case(
        vgg, images(), joint=[{**plus(*both("0")), "3.weight": -1}, {**plus(*both("3")), "6.weight": -1}]
    ),
    # Every convolution is normalised. Gains and biases scale together where a normalised layer follows.
    "resnet": Case(
        SmallResNet,
        images(),
        scale_invariant=dict.fromkeys(
            [
                "stem.weight",
                *(f"{b}.conv{i}.weight" for b in ("one", "two") for i in (1, 2)),
                "two.short.0.weight",
            ],
            0,
        ),
        no_effect={"stem.bias"},
        joint=[
            plus(*both("one.bn1")),
            plus(*both("two.bn1")),
            plus(*both("bn"), *both("one.bn2")),
            {**plus(*both("two.bn2"), *both("two.short.1")), "fc.weight": -1},
        ],
    ),
    # v has a direction only; gains and biases are a plain ReLU network.
    "weight_norm": Case(
        lambda: Normalized(parametrizations.weight_norm),
        images(),
        scale_invariant={f"one.{_V1}": 0, f"two.{_V1}": 0},
        joint=[
            {f"one.{_V0}": 1, "one.bias": 1, f"two.{_V0}": -1},
            {f"two.{_V0}": 1, "two.bias": 1, "head.weight": -1},
        ],
    ),
    "weight_norm_legacy": Case(
        lambda: Normalized(legacy_weight_norm),
        images(),
        scale_invariant={"one.weight_v": 0, "two.weight_v": 0},
        joint=[
            {"one.weight_g": 1, "one.bias": 1, "two.weight_g": -1},
            {"two.weight_g": 1, "two.bias": 1, "head.weight": -1},
        ],
    ),
    # Of the gain only the sign is left by a batch norm; its biases then have no effect.
    "weight_norm_batch_norm": Case(
        lambda: Normalized(parametrizations.weight_norm, nn.BatchNorm2d),
        images(),
        scale_invariant={f"{layer}.{v}": 0 for layer in ("one", "two") for v in (_V0, _V1)},
        no_effect={"one.bias", "two.bias"},
        joint=[plus(*both("norm1")), {**plus(*both("norm2")), "head.weight": -1}],
    ),
    # The largest singular value divides the whole tensor.
    "spectral_norm": Case(
        lambda: Normalized(parametrizations.spectral_norm),
        images(),
        scale_invariant={
            "one.parametrizations.weight.original": None,
            "two.parametrizations.weight.original": None,
        },
        joint=[],
    ),
    # Two channels share the statistics; the bias differs within a group, so it scales with the weight.
    "group_norm": Case(
        lambda: Normalized(norm=lambda c: nn.GroupNorm(4, c)),
        images(),
        joint=[
            plus(*both("one")),
            plus(*both("two")),
            {**plus(*both("norm1")), "two.weight": -1},
            {**plus(*both("norm2")), "head.weight": -1},
        ],
    ),
    "instance_norm": Case(
        lambda: Normalized(norm=lambda c: nn.InstanceNorm2d(c, affine=True)),
        images(),
        scale_invariant={"one.weight": 0, "two.weight": 0},
        no_effect={"one.bias", "two.bias"},
        joint=[plus(*both("norm1")), {**plus(*both("norm2")), "head.weight": -1}],
    ),
    "prenorm_layer_norm": Case(
        lambda: Transformer(nn.LayerNorm),
        tokens,
        no_effect=_KEY_BIASES,
        joint=prenorm_joint(both_norm, True, False, False),
    ),
    "prenorm_packed_tied": Case(
        lambda: Transformer(nn.LayerNorm, packed=True, tied=True),
        tokens,
        joint=prenorm_joint(both_norm, True, True, True),
    ),
    "prenorm_rms_norm": Case(
        lambda: Transformer(RMSNorm, bias=False),
        tokens,
        joint=prenorm_joint(only_gain, False, False, False),
    ),
    "postnorm": Case(
        lambda: Transformer(nn.LayerNorm, post=True), tokens, no_effect=_KEY_BIASES, joint=_postnorm_joint()
    ),
    # q and k only have directions (per head), without a bias; GLU: the gate is not homogeneous, up is.
    "qk_norm_glu": Case(
        lambda: Transformer(nn.RMSNorm, bias=False, qk_norm=True, glu=True),
        tokens,
        scale_invariant=dict.fromkeys([*_Q, *_K]),
        joint=[
            *({f"n1.{i}.weight": 1, f"attn.{i}.v.weight": -1} for i in range(2)),
            *({f"attn.{i}.v.weight": 1, f"attn.{i}.o.weight": -1} for i in range(2)),
            *({f"n2.{i}.weight": 1, f"mlp.{i}.gate.weight": -1, f"mlp.{i}.up.weight": -1} for i in range(2)),
            *({f"mlp.{i}.up.weight": 1, f"mlp.{i}.down.weight": -1} for i in range(2)),
            plus(
                "emb.weight",
                "pos",
                *(f"attn.{i}.o.weight" for i in range(2)),
                *(f"mlp.{i}.down.weight" for i in range(2)),
            ),
            {"norm.weight": 1, "head.weight": -1},
        ],
    ),
    # The rows of q and k have directions only. v is the rest: its rows against the output.
    "qk_norm_packed": Case(
        lambda: Transformer(nn.RMSNorm, bias=False, qk_norm=True, packed=True),
        tokens,
        partial={f"attn.{i}.qkv.weight": (0, half(24, range(16))) for i in range(2)},
        joint=[
            *({f"n1.{i}.weight": 1, f"attn.{i}.qkv.weight": -1} for i in range(2)),
            *({f"attn.{i}.qkv.weight": 1, f"attn.{i}.o.weight": -1} for i in range(2)),
            *({f"n2.{i}.weight": 1, f"mlp.{i}.0.weight": -1} for i in range(2)),
            plus(
                "emb.weight",
                "pos",
                *(f"attn.{i}.o.weight" for i in range(2)),
                *(f"mlp.{i}.2.weight" for i in range(2)),
            ),
            {"norm.weight": 1, "head.weight": -1},
        ],
    ),
    # The router is not homogeneous; each expert is a small ReLU network.
    "moe": Case(
        MoE,
        lambda: [torch.randn(64, 6), torch.randn(64, 6)],
        joint=[{**plus(*both(f"up.{e}")), f"down.{e}.weight": -1} for e in range(3)],
    ),
    # Gates saturate: only the embedding against what reads it.
    "lstm": Case(lambda: Recurrent(nn.LSTM), tokens, joint=[{"emb.weight": 1, "rnn.weight_ih_l0": -1}]),
    "gru": Case(lambda: Recurrent(nn.GRU), tokens, joint=[{"emb.weight": 1, "rnn.weight_ih_l0": -1}]),
    # A transposed convolution has its filters in columns.
    "unet": Case(
        UNet,
        images(),
        scale_invariant={"down.0.weight": 0, "deep.0.weight": 0, "up.weight": 1, "join.0.weight": 0},
        no_effect={"down.0.bias", "deep.0.bias", "up.bias", "join.0.bias"},
        joint=[
            plus(*both("deep.1")),
            # the skip and the deep path meet in one normalised convolution: they scale together
            plus(*both("down.1"), *both("upnorm")),
            {**plus(*both("join.1")), "out.weight": -1},
        ],
    ),
    # Every reader of a convolution is a batch norm.
    "densenet": Case(
        DenseNet,
        images(),
        scale_invariant={"stem.weight": 0, "conv1.weight": 0, "conv2.weight": 0},
        joint=[plus(*both("bn1")), plus(*both("bn2")), {**plus(*both("bn3")), "fc.weight": -1}],
    ),
    "squeeze_excite": Case(
        SqueezeExcite,
        images(),
        scale_invariant={"conv.weight": 0, "project.weight": 0},
        joint=[
            {**plus(*both("squeeze")), "excite.weight": -1},
            {**plus(*both("bn")), "squeeze.weight": -1},
            {**plus(*both("bn2")), "fc.weight": -1},
        ],
    ),
}
