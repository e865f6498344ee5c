"""A weight-normalised network in bfloat16 that loses its decay, watched: python -m examples.watch_vocoder.

Then `normwise watch runs/watch-vocoder`, or add `--html page.html`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw


class Residual(nn.Module):
    """Two weight-normalised convolutions over time, as vocoders have them, beside a skip."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.wide = nw.weight_norm(nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation))
        self.narrow = nw.weight_norm(nn.Conv1d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the signal after this block."""
        filtered: Tensor = self.narrow(F.leaky_relu(self.wide(F.leaky_relu(x, 0.1)), 0.1))
        return x + filtered


def vocoder(channels: int = 16) -> nn.Sequential:
    first = nw.weight_norm(nn.Conv1d(8, channels, 7, padding=3))
    blocks = [Residual(channels, dilation) for dilation in (1, 3, 9)]
    return nn.Sequential(
        first, *blocks, nn.LeakyReLU(0.1), nw.weight_norm(nn.Conv1d(channels, 1, 7, padding=3))
    )


def batch() -> tuple[Tensor, Tensor]:
    """Return slow features of signals, and the signals."""
    time = torch.linspace(0, 12.6, 128)
    pitch, loudness = 1 + 4 * torch.rand(8, 1, 1), torch.rand(8, 1, 1)
    features = torch.cat([torch.sin(time * pitch * k) for k in range(1, 8)] + [loudness.expand(8, 1, 128)], 1)
    return features, loudness * torch.tanh(3 * torch.sin(time * pitch) + torch.sin(2 * time * pitch))


def train(folder: Path, steps: int = 300, compensated: bool = False, every: int = 10) -> nw.Monitor:
    torch.manual_seed(0)
    reference = vocoder()
    plan = nw.plan(reference, [batch()[0]])
    model = reference.to(torch.bfloat16)  # the planted illness: decay finer than bfloat16
    plan = plan.apply_to(model)
    optimizer = torch.optim.SGD(plan.param_groups(), lr=0.05, momentum=0.9)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.01), plan.units, compensated=compensated)
    monitor = nw.Monitor(optimizer, plan=plan, every=every, trackers=nw.trackers.JSONL(folder))
    for _ in range(steps):
        features, signal = batch()
        loss = F.mse_loss(model(features.to(torch.bfloat16)).float(), signal)
        optimizer.zero_grad()
        loss.backward()
        monitor.record(loss=loss)
        optimizer.step()
    monitor.remove()
    return monitor


if __name__ == "__main__":
    for finding in train(Path("runs/watch-vocoder")).findings:
        print(finding)
