"""A GPT whose queries and keys start 1e4 times too large, watched: python -m examples.watch_gpt.

Then `normwise watch runs/watch-gpt`, or add `--html page.html`.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class Block(nn.Module):
    """Attention with normalised queries and keys, and a perceptron, each on the normalised stream."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after this block."""
        y = self.first(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        q, k = (F.layer_norm(t, t.shape[-1:]) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        stream: Tensor = x + self.down(F.relu(self.up(self.second(x))))
        return stream


class GPT(nn.Module):
    """A pre-norm transformer over characters."""

    def __init__(self, characters: int, width: int = 32, context: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.norm(self.blocks(self.token(ids) + self.position.weight)))
        return logits


def train(folder: Path, steps: int = 300, scale: float = 1e4, every: int = 10) -> nw.Monitor:
    torch.manual_seed(0)
    text = inspect.getsource(nn.Module)  # real text that is on every machine
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    model = GPT(len(characters))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.stack([data[i : i + 33] for i in torch.randint(0, len(data) - 33, (16,)).tolist()])
        return rows[:, :-1], rows[:, 1:]

    with torch.no_grad():  # the planted illness: it changes no output, as queries and keys are normalised
        for name, weight in model.named_parameters():
            if "query" in name or "key" in name:
                weight.mul_(scale)
    plan = nw.plan(model, [batch()[0]])
    optimizer = torch.optim.AdamW(plan.param_groups(0.1, shrink_weight_decay=3.0), lr=3e-3)
    tracker = nw.trackers.JSONL(folder)
    monitor = nw.Monitor(optimizer, plan=plan, every=every, total_steps=steps, trackers=tracker)
    for _ in range(steps):
        inputs, targets = batch()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        monitor.record(loss=loss)
        optimizer.step()
    monitor.remove()
    return monitor


if __name__ == "__main__":
    for finding in train(Path("runs/watch-gpt")).findings:
        print(finding)
