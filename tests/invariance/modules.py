"""The modules of the networks in networks.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


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
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.rnn = cell(6, 5, num_layers=2, dropout=0.2, batch_first=True)
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


def legacy_weight_norm(module: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)
