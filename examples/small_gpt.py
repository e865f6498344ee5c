"""Train a small GPT on text by plan: python -m examples.small_gpt."""

from __future__ import annotations

import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class GPT(nn.Module):
    """A pre-norm transformer over characters."""

    def __init__(self, characters: int, width: int = 48, context: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        layers = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", 1e-5, True, True) for _ in range(2)
        ]
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.embedding(ids) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train(steps: int = 300, lr: float = 3e-3) -> tuple[nw.Audit, float]:
    torch.manual_seed(0)
    text = inspect.getsource(nn.Module)  # real text that is on every machine
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    model = GPT(len(characters))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.stack([data[i : i + 33] for i in torch.randint(0, len(data) - 33, (16,)).tolist()])
        return rows[:, :-1], rows[:, 1:]

    plan = nw.plan(model, [batch()[0]])  # what decay does to each parameter, and why
    print(plan)
    optimizer = torch.optim.AdamW(plan.param_groups(weight_decay=0.01), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    plan.attach(optimizer, scheduler=scheduler, total_steps=steps)  # nothing to tune
    for _ in range(steps):
        inputs, targets = batch()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"loss after {steps} steps: {loss.item():.3f}")
    return nw.audit(model, optimizer, plan=plan), loss.item()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")  # shows what attach chose
    print(train()[0])
