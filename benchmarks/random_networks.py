"""Networks that a seed composes at random: blocks, norms, activations, gates, residuals and heads.

`python -m benchmarks.unseen --random 0-299` judges them like those of `benchmarks.unseen_networks`. They are
small, so that a network takes a second or two, and they combine what nobody would combine.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from benchmarks.unseen_networks import Network
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["random_network"]

WIDTH, WORDS, TOKENS, SAMPLES, INPUTS = 16, 11, 6, 4, 5


def random_network(seed: int) -> Network:
    """Return the network of a seed."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return RandomNetwork(Random(seed))

    def batches() -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if RandomNetwork(Random(seed)).takes_words:
            return [torch.randint(WORDS, (SAMPLES, TOKENS), generator=generator) for _ in range(2)]
        return [torch.randn(SAMPLES, TOKENS, INPUTS, generator=generator) for _ in range(2)]

    return Network(build, batches)


class RandomNetwork(nn.Module):
    """(samples, tokens) or (samples, tokens, inputs) → outputs."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.takes_words = draw.random() < 0.5
        self.first = nn.Embedding(WORDS, WIDTH) if self.takes_words else nn.Linear(INPUTS, WIDTH, _bias(draw))
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) / 2) if draw.random() < 0.4 else None
        self.blocks = nn.Sequential(*(Block(draw) for _ in range(draw.randint(1, 3))))
        self.norm = _norm(draw, WIDTH)
        self.head = nn.Linear(WIDTH, draw.choice([2, 3, 7]), _bias(draw))
        self.tied = self.takes_words and draw.random() < 0.4
        self.output = draw.choice(["logits", "logits", "direction", "log-softmax", "pooled", "similarity"])
        self.scale = nn.Parameter(torch.tensor(2.0)) if self.output == "similarity" else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.positions is not None:
            h = h + self.positions
        h = self.norm(self.blocks(h))
        if self.tied:
            return F.linear(h, self.first.weight)
        if self.scale is not None:
            return self.scale * F.normalize(h.mean(1), dim=-1) @ F.normalize(self.head.weight, dim=-1).T
        out: Tensor = self.head(h.mean(1) if self.output == "pooled" else h)
        if self.output == "direction":
            return F.normalize(out, dim=-1)
        return out.log_softmax(-1) if self.output == "log-softmax" else out


class Block(nn.Module):
    """A random layer between random norms, with or without a residual branch."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        kinds = (Gated, Attention, Perceptron, Convolution, Branches, LowRank, Normalised, Squeeze, Recurrent)
        self.layer = draw.choice([*kinds, Twice, Gated, Attention, Perceptron])(draw)
        self.before = _norm(draw, WIDTH) if draw.random() < 0.6 else nn.Identity()
        self.after = _norm(draw, WIDTH) if draw.random() < 0.4 else nn.Identity()
        residual = draw.choice(["sum", "sum", "none", "one gate", "gates"])
        self.adds = residual != "none"
        gates = {"one gate": torch.tensor(0.3), "gates": torch.full((WIDTH,), 0.5)}
        self.gate = nn.Parameter(gates[residual]) if residual in gates else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.layer(self.before(x)))
        if self.gate is not None:
            y = y * self.gate
        return x + y if self.adds else y


class Gated(nn.Module):
    """A gated linear unit, packed or not."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        inner, bias = draw.choice([8, 12]), _bias(draw)
        self.up = nn.Linear(WIDTH, 2 * inner, bias)
        self.other = nn.Linear(WIDTH, 2 * inner, bias) if draw.random() < 0.5 else None
        self.activation = draw.choice([nn.SiLU(), nn.Sigmoid(), nn.ReLU(), nn.Identity()])
        self.down = nn.Linear(inner if self.other is None else 2 * inner, WIDTH, bias)
        self.squares = draw.random() < 0.2

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up(x).chunk(2, -1) if self.other is None else (self.up(x), self.other(x))
        y = up * self.activation(gate)
        return self.down(y.relu() ** 2 if self.squares else y)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention: packed in some order, interleaved or not, with or without norms of queries and keys."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.heads, bias = draw.choice([1, 2, 4]), _bias(draw)
        self.order, self.interleaved = draw.choice(["qkv", "qvk", "kqv"]), draw.random() < 0.3
        self.packed = nn.Linear(WIDTH, 3 * WIDTH, bias) if draw.random() < 0.6 else None
        if self.packed is None:
            self.each = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias) for _ in "qkv")
        self.out = nn.Linear(WIDTH, WIDTH, bias)
        size = WIDTH // self.heads
        norm = draw.choice([None, None, nn.LayerNorm, nn.RMSNorm, Direction])
        self.norms = nn.ModuleList(norm(size) for _ in "qk") if norm else None
        self.causal = draw.random() < 0.5
        self.gate = nn.Linear(WIDTH, WIDTH) if draw.random() < 0.2 else None
        self.temperature = nn.Parameter(torch.tensor(1.5)) if draw.random() < 0.2 else None

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        if self.packed is None:
            q, k, v = (self._split(layer(x)) for layer in self.each)
        else:
            y = self.packed(x)
            if self.interleaved:
                parts = list(y.view(samples, tokens, self.heads, 3, -1).transpose(1, 2).unbind(3))
            else:
                parts = [self._split(part) for part in y.chunk(3, -1)]
            q, k, v = (parts[self.order.index(name)] for name in "qkv")
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.temperature is not None:
            scores = scores * self.temperature
        if self.causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(samples, tokens, WIDTH)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.out(y)  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Perceptron(nn.Module):
    """Two linear layers, with a norm between them or not."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        inner, bias = draw.choice([8, 12, 16]), _bias(draw)
        self.up, self.activation = nn.Linear(WIDTH, inner, bias), _activation(draw)
        self.norm, self.down = _norm(draw, inner), nn.Linear(inner, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.activation(self.up(x))))  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """A convolution over tokens, depthwise or not."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        groups = draw.choice([1, 1, 2, WIDTH])
        self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups, bias=_bias(draw))
        self.activation = _activation(draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Two layers side by side, whose outputs a third one reads."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 10)
        self.activation, self.norm, self.out = _activation(draw), _norm(draw, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], -1)
        return self.out(self.norm(self.activation(both)))  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """A linear layer, frozen or not, and a product of two small ones."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.weight.requires_grad_(draw.random() < 0.5)
        self.a = nn.Parameter(0.3 * torch.randn(3, WIDTH))
        self.b = nn.Parameter(0.3 * torch.randn(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


class Normalised(nn.Module):
    """A layer with torch's weight norm."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.layer = weight_norm(nn.Linear(WIDTH, WIDTH, _bias(draw)), dim=draw.choice([0, 0, 1, None]))  # type: ignore[arg-type]
        self.activation = _activation(draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))  # type: ignore[no-any-return]


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.activation = draw.choice([nn.ReLU(), nn.SiLU()])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.activation(self.down(x.mean(1, keepdim=True)))).sigmoid()  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer of torch."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.layer = draw.choice([nn.GRU, nn.LSTM, nn.RNN])(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A layer that is applied twice."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(WIDTH, WIDTH, _bias(draw)), _activation(draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.activation(self.layer(x)))  # type: ignore[no-any-return]


class Direction(nn.Module):
    """F.normalize."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class OverChannels(nn.Module):
    """A norm of convolutional networks, for (samples, tokens, channels)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def _norm(draw: Random, width: int) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.LayerNorm(width),
        lambda: nn.LayerNorm(width, elementwise_affine=False),
        lambda: nn.RMSNorm(width),
        lambda: OverChannels(nn.GroupNorm(draw.choice([2, 4]), width)),
        lambda: OverChannels(nn.BatchNorm1d(width)),
        lambda: Direction(width),
        nn.Identity,
        nn.Identity,
    ]
    return draw.choice(kinds)()


def _activation(draw: Random) -> nn.Module:
    smooth = (nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.Hardswish)
    kinds: list[Callable[[], nn.Module]] = [nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.Identity, *smooth]
    return draw.choice(kinds)()


def _bias(draw: Random) -> bool:
    return draw.random() < 0.6
