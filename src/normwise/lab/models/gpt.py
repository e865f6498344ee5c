"""The language model of the experiments: a small pre-norm GPT whose queries and keys are normalised."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw

__all__ = ["GPT", "GROUPS", "group_of", "matrices", "part", "planned"]

_EMBEDDING = 0.5  # standard deviation; token plus position are then about as large as the output of a block
_EPS = 1e-6

# Groups of matrices, by the name of their layer.
GROUPS = {
    "q, k": ("query", "key"),
    "embeddings, writers": ("token", "position", "out", "down"),
    "v, up, head": ("value", "up", "head"),
}
_PARTS = {"attention": "q, k", "stream": "embeddings, writers"}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the normalised stream, with residual connections.

    Shapes:
        (N, T, width) to (N, T, width).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, _EPS, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, _EPS, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after this block."""
        n, t, width = x.shape
        y = self.attention_norm(x)
        # each (N, heads, T, width of a head)
        q, k, v = (
            f(y).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        q, k = (F.layer_norm(z, z.shape[-1:], eps=_EPS) for z in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        added: Tensor = self.down(F.relu(self.up(self.mlp_norm(x))))
        return x + added


class GPT(nn.Module):
    """A GPT over characters: pre-norm, QK-norm, ReLU, no biases, learned positions.

    Matrices start from N(0, 1/fan-in), divided by √(2·depth) where they write to the residual stream, as in
    GPT-2; embeddings start from N(0, 1/4). (With GPT-2's 0.02 everywhere, such a narrow network starts slowly
    and trains better with frozen queries and keys.) QK-norm is the layer norm of each head's queries and keys
    of Dehghani et al. (2023, arXiv 2302.05442). LayerNorm and ReLU are faster on a CPU than RMSNorm and GELU.

    Shapes:
        Character indices (N, T), T at most ``context``, to logits (N, T, characters).

    Example:
        >>> GPT(characters=10)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self, characters: int, width: int = 32, heads: int = 2, depth: int = 2, context: int = 32
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, _EPS, bias=False)
        self.head = nn.Linear(width, characters, bias=False)
        for name, weight in matrices(self).items():
            layer = name.split(".")[-2]
            shrunk = (2 * depth) ** 0.5 if layer in ("out", "down") else 1.0
            std = _EMBEDDING if layer in ("token", "position") else weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std / shrunk)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next character at each position."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def matrices(model: GPT) -> dict[str, nn.Parameter]:
    """Return all matrices by name: every parameter except the gains of norms."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}


def group_of(name: str) -> str:
    """Return the key of :data:`GROUPS` for the matrix of this name."""
    layer = name.split(".")[-2]
    return next(group for group, layers in GROUPS.items() if layer in layers)


def part(model: GPT, name: str) -> list[nn.Parameter]:
    """Return the weights of "attention" (queries, keys) or "stream" (embeddings, writers); none for ""."""
    return [weight for key, weight in matrices(model).items() if name and group_of(key) == _PARTS[name]]


@lru_cache(maxsize=8)
def planned(characters: int, width: int, heads: int, depth: int, context: int) -> nw.Plan:
    """Return the plan of ``normwise.plan`` for a GPT of this architecture, to be applied with ``apply_to``.

    The plan is computed once per process, on a separate network and batch, so it depends on the architecture
    and not on the seed of a run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(characters, width, heads, depth, context)
        ids = torch.randint(0, characters, (4, context))
    return nw.plan(model, [ids], progress=False)
