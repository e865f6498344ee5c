"""Memory of nw.find_invariances beyond the model and a forward pass.

    python -m benchmarks.invariance_memory [--joint] [NAME ...]

torch's profiler records every allocation of the CPU allocator, and the script sums up the live bytes during
the search, without the model and its batches. A forward pass of the model in float64 (activations and
workspace, the graph kept) is measured in the same way. "Beyond" is the difference: the stand-ins for the
weights, copies that the graph keeps, gradients and the data of the search. Without --joint only the verdicts
are measured: they need the most memory, as every weight has a gradient.
"""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import normwise as nw

HEADER = "| network | model, MB | peak, MB | float64 forward pass, MB | peak / model | beyond / model |"


@dataclass
class Network:
    """A network: its constructor, its batches, and how it is called."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch)


def _logits(model: nn.Module, batch: Any) -> Any:
    return model(batch).logits


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    model: nn.Module = ResNetForImageClassification(ResNetConfig())
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=64))
    return model


def _stack() -> nn.Module:
    layers = [layer for _ in range(24) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


NETWORKS = {
    "resnet50, 64x64, batch 8": Network(_resnet50, lambda: [torch.randn(8, 3, 64, 64)] * 2, _logits),
    "gpt2, 6 layers of 384, 50257 tokens, batch 2x8": Network(
        _gpt2, lambda: [torch.randint(0, 50257, (2, 8)) for _ in range(2)], _logits
    ),
    "24 linear layers of 1024, batch 8": Network(_stack, lambda: [torch.randn(8, 1024)] * 2),
}


def live_peak(run: Callable[[], Any]) -> int:
    """Return the peak of live bytes during ``run``, above those at its start."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        kept = run()
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del kept
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


@dataclass
class Measured:
    """Bytes of the model, of the search at its peak, and of a forward pass in float64."""

    size: int
    peak: int
    forward: int

    @property
    def beyond(self) -> int:
        """Bytes of the search beyond a forward pass."""
        return self.peak - self.forward


def _of_one_pass(model: nn.Module, batch: Any, forward: Callable[..., Any]) -> int:
    wide = batch.double() if batch.is_floating_point() else batch
    return live_peak(lambda: forward(model, wide))


def beyond(
    model: nn.Module, batches: list[Any], forward: Callable[..., Any], *, joint: bool = True
) -> Measured:
    """Measure a search for the invariances of ``model``, and a forward pass."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    once = _of_one_pass(copy.deepcopy(model).double().train(), batches[0], forward)
    peak = live_peak(lambda: nw.find_invariances(model, batches, forward, joint=joint, progress=False))
    return Measured(size, peak, once)


def row(name: str, network: Network, joint: bool) -> str:
    torch.manual_seed(0)
    found = beyond(network.build(), network.batches(), network.forward, joint=joint)
    cells = [name, *(f"{n / 1e6:.0f}" for n in (found.size, found.peak, found.forward))]
    cells += [f"{found.peak / found.size:.2f}", f"{found.beyond / found.size:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = [word for word in sys.argv[1:] if word != "--joint"]
    print(HEADER + "\n" + "|---" * 6 + "|", flush=True)
    for name, network in NETWORKS.items():
        if not wanted or any(name.startswith(w) for w in wanted):
            print(row(name, network, "--joint" in sys.argv), flush=True)


if __name__ == "__main__":
    main()
