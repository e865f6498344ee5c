"""Train a small ResNet on scikit-learn's digits by plan: python -m examples.small_resnet."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normwise as nw


class Block(nn.Module):
    """Two normalised convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        first, second = [nn.Sequential(c, nn.BatchNorm2d(channels)) for c in convolutions]
        self.body = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return F.relu(x + self.body(x))


def train(epochs: int = 10, lr: float = 0.1) -> tuple[nw.Audit, float]:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x))
    training, held_out = order[:1400], order[1400:]
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    model = nn.Sequential(stem, Block(16), Block(16), tail)

    plan = nw.plan(model, [x[training[:64]]])  # what decay does to each parameter, and why
    print(plan)
    optimizer = torch.optim.SGD(plan.param_groups(weight_decay=5e-4), lr=lr, momentum=0.9)
    steps = epochs * (len(training) // 50)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    plan.attach(optimizer, scheduler=scheduler, total_steps=steps)  # nothing to tune
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training))].split(50):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
    print(f"accuracy on held-out digits: {accuracy:.3f}")
    return nw.audit(model, optimizer, plan=plan), accuracy


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")  # shows what attach chose
    print(train()[0])
