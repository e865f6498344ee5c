"""Small networks whose invariances are derived by hand in their comments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Symmetry = dict[str, int]


@dataclass
class Case:
    """A network, its batches, and what must be found."""

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


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, 3))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.short(x))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.one = Block(6, 6)
        self.two = Block(6, 8)
        nn.init.zeros_(self.one.bn2.weight)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(F.relu(self.bn(self.stem(x)))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Normalized(nn.Module):
    """Two convolutions and a head; ``wrap`` parametrizes the layers, ``norm`` follows the convolutions."""

    def __init__(
        self,
        wrap: Callable[[nn.Module], Any] | None = None,
        norm: Callable[[int], nn.Module] = lambda _: nn.Identity(),
    ) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm1, self.norm2 = norm(8), norm(8)
        self.head = nn.Linear(8, 5)
        if wrap is not None:
            wrap(self.one)
            wrap(self.two)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.one(x)))
        x = F.relu(self.norm2(self.two(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class RMSNorm(nn.Module):
    """As large language models write it: an eps of its own, a cast to float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(kind)


class Attention(nn.Module):
    """Two heads of size 4. ``packed``: one projection for q, k, v; ``qk_norm``: heads of q, k on a sphere."""

    def __init__(self, bias: bool, packed: bool, qk_norm: bool, size: int = 8) -> None:
        super().__init__()
        self.packed, self.qk_norm = packed, qk_norm
        if packed:
            self.qkv = nn.Linear(size, 3 * size, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(size, size, bias=bias) for _ in range(3))
        self.o = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm:
            q, k = F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1) * 3
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        out: Tensor = self.o(y.transpose(1, 2).flatten(-2))
        return out


class GLU(nn.Module):
    def __init__(self, size: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(size, 12, bias=False), nn.Linear(size, 12, bias=False)
        self.down = nn.Linear(12, size, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class Transformer(nn.Module):
    """Two layers over 11 tokens."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        post: bool = False,
        bias: bool = True,
        packed: bool = False,
        qk_norm: bool = False,
        glu: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.post = post
        self.emb = nn.Embedding(11, 8)
        self.pos = nn.Parameter(torch.zeros(7, 8))
        self.n1 = nn.ModuleList(norm(8) for _ in range(2))
        self.attn = nn.ModuleList(Attention(bias, packed, qk_norm) for _ in range(2))
        self.n2 = nn.ModuleList(norm(8) for _ in range(2))
        self.mlp = nn.ModuleList(
            GLU(8) if glu else nn.Sequential(nn.Linear(8, 12, bias), nn.GELU(), nn.Linear(12, 8, bias))
            for _ in range(2)
        )
        self.norm = nn.Identity() if post else norm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.emb(ids) + self.pos)
        for n1, attn, n2, mlp in zip(self.n1, self.attn, self.n2, self.mlp, strict=True):
            if self.post:
                x = n1(x + attn(x))
                x = n2(x + mlp(x))
            else:
                x = x + self.dropout(attn(n1(x)))
                x = x + F.dropout(mlp(n2(x)), 0.1, self.training)
        out: Tensor = self.head(self.norm(x))
        return out


def prenorm_joint(
    norm_names: Callable[[str], list[str]], bias: bool, packed: bool, tied: bool
) -> list[Symmetry]:
    """q·k and v·o pairs, each norm with its readers, the residual stream, the last norm with the head."""
    w = both if bias else lambda name: [f"{name}.weight"]
    found: list[Symmetry] = []
    stream = plus("emb.weight", "pos")
    for i in range(2):
        attn = f"attn.{i}"
        readers = [f"{attn}.qkv.weight"] if packed else [f"{attn}.{n}.weight" for n in "qkv"]
        found.append({**plus(*norm_names(f"n1.{i}")), **dict.fromkeys(readers, -1)})
        found.append({**plus(*norm_names(f"n2.{i}")), f"mlp.{i}.0.weight": -1})
        if not packed:
            found.append({**plus(*w(f"{attn}.q")), f"{attn}.k.weight": -1})
            found.append({**plus(*w(f"{attn}.v")), f"{attn}.o.weight": -1})
        stream |= plus(*w(f"{attn}.o"), *w(f"mlp.{i}.2"))
    last = dict.fromkeys(norm_names("norm"), -1)
    if tied:
        return [*found, {**stream, **last}]
    return [*found, stream, {**last, "head.weight": 1}]


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3, bias=False)
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = x.new_zeros(len(x), 4)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows, place = torch.where(chosen == e)
            out = out.index_add(0, rows, gates[rows, place, None] * down(F.relu(up(x[rows]))))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.rnn(self.emb(ids))[0])}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.upnorm = nn.BatchNorm2d(6)
        self.join = nn.Sequential(nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = F.relu(self.upnorm(self.up(self.deep(F.max_pool2d(skip, 2)))))
        out: Tensor = self.out(self.join(torch.cat([skip, y], 1)))
        return out


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return (self.fc(F.relu(self.bn3(x)).mean((2, 3))),)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.bn2 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = F.relu(self.bn2(self.project(x * gate)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def half(rows: int, which: range) -> list[bool]:
    return [i in which for i in range(rows)]


def legacy_weight_norm(module: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


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
    found: list[Symmetry] = []
    before = ["emb.weight", "pos"]
    for i in range(2):
        a = f"attn.{i}"
        found.append({**plus(*both(f"{a}.q")), f"{a}.k.weight": -1})
        found.append({**plus(*both(f"{a}.v")), f"{a}.o.weight": -1})
        readers = dict.fromkeys([f"{a}.q.weight", f"{a}.k.weight", f"{a}.v.weight"], -1)
        found.append({**plus(*before), **readers, **plus(*both(f"{a}.o"))})
        found.append({**plus(*both(f"n1.{i}")), f"mlp.{i}.0.weight": -1, **plus(*both(f"mlp.{i}.2"))})
        before = both(f"n2.{i}")
    found.append({**plus(*before), "head.weight": -1})
    return found


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
