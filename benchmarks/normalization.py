"""Time the weight-normalisation family, forward and backward, beside torch's kernels and the textbook.

    python -m benchmarks.normalization [--quick] [--compile] [--device cpu|cuda] [--out FILE.md]

In every round all candidates run in bursts of a millisecond, in a new random order. On a CPU the benchmark
measures the time of the single thread that they run on, so other processes disturb it little, and disturb all
candidates alike; on CUDA it measures the time until the device is done. It reports the median over rounds of
the ratio to the bare kernel in the same round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.timing import machine, now
from torch import Tensor, nn

import normwise as nw
from normwise.normalization._exact import Formula, exact_forward
from normwise.normalization._kernels import normalize

ZERO_UNIT = "normwise, one zero unit"  # the plain fused kernel is not exact here
SHAPES = [(64, 64, 1, 1), (128, 64, 3, 3), (256, 256, 3, 3), (3072, 768)]
Transform = Callable[[Tensor, Tensor], Tensor]


def weight_norm_candidates(shape: tuple[int, ...]) -> dict[str, Transform]:
    """Return transforms of (weight, gain); the first is the baseline."""
    formula, dims = Formula(0, center=False, factor=1.0), list(range(1, len(shape)))
    return {
        "torch._weight_norm": lambda v, g: torch._weight_norm(v, g, 0),
        "normwise": lambda v, g: normalize(v, g, formula),
        ZERO_UNIT: lambda v, g: normalize(v, g, formula),
        "exact evaluation": lambda v, g: exact_forward(v, g, formula),
        "textbook": lambda v, g: v * (g / v.pow(2).sum(dims, keepdim=True).sqrt()),
    }


def standardization_candidates(shape: tuple[int, ...]) -> dict[str, Transform]:
    """Return transforms of (weight, gain), with the gain unused; the first is the baseline."""
    size = torch.Size(shape[1:]).numel()
    formula, dims = Formula(0, center=True, factor=size**0.5), list(range(1, len(shape)))

    def textbook(v: Tensor, _: Tensor) -> Tensor:
        centered = v - v.mean(dims, keepdim=True)
        return centered / centered.pow(2).mean(dims, keepdim=True).sqrt()

    def batch_norm(v: Tensor, _: Tensor) -> Tensor:
        return F.batch_norm(v.reshape(1, shape[0], -1), None, None, training=True, eps=1e-12).reshape(shape)

    return {
        "F.layer_norm": lambda v, _: F.layer_norm(v.flatten(1), (size,)),
        "normwise": lambda v, _: normalize(v, None, formula),
        ZERO_UNIT: lambda v, _: normalize(v, None, formula),
        "exact evaluation": lambda v, _: exact_forward(v, None, formula),
        "batch_norm trick": batch_norm,
        "textbook": textbook,
    }


def layer_candidates(conv: bool, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return whole layers and an input; the first, plain, is the baseline."""

    def plain() -> nn.Module:
        return nn.Conv2d(64, 128, 3, padding=1) if conv else nn.Linear(768, 3072)

    x = torch.randn(8, 64, 14, 14) if conv else torch.randn(256, 768)
    folded = nw.weight_norm(plain())
    nw.fold(folded)
    layers = {
        "plain": plain(),
        "torch weight_norm": nn.utils.parametrizations.weight_norm(plain()),
        "nw.weight_norm": nw.weight_norm(plain()),
        "nw.centered_weight_norm": nw.centered_weight_norm(plain()),
        "nw.weight_standardization": nw.weight_standardization(plain()),
        "folded": folded,
    }
    return {name: (layer.to(device), x.to(device)) for name, layer in layers.items()}


def step(transform: Transform, weight: Tensor, gain: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return forward and backward of a transform as one call."""

    def run() -> None:
        weight.grad = gain.grad = None
        out = transform(weight, gain)
        out.backward(gradient.view_as(out))

    return run


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return forward and backward of a layer as one call."""

    def run() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    return run


def interleaved(
    calls: dict[str, Callable[[], None]], seconds: float, device: str
) -> dict[str, dict[str, float]]:
    """Return, for each call, microseconds and the ratio to the first call, as medians over rounds."""
    for call in calls.values():
        for _ in range(5):
            call()
    names, repeats = list(calls), {}
    for name, call in calls.items():
        started = now(device)
        call()
        repeats[name] = max(1, int(1e-3 / (now(device) - started)))
    shuffle = random.Random(0).sample  # the previous candidate leaves its data in the caches
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        row = dict.fromkeys(names, 0.0)
        for name in shuffle(names, len(names)):
            call = calls[name]
            started = now(device)
            for _ in range(repeats[name]):
                call()
            row[name] = (now(device) - started) / repeats[name] * 1e6
        rounds.append(list(row.values()))
    return {
        name: {
            "microseconds": round(statistics.median(row[k] for row in rounds), 1),
            "ratio": round(statistics.median(row[k] / row[0] for row in rounds), 3),
        }
        for k, name in enumerate(calls)
    }


def memory_kept(transform: Transform, weight: Tensor, gain: Tensor) -> float:
    """Return the bytes kept after forward, of the output and for backward, in multiples of the weight."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(transform(weight, gain))
    for leaf in (weight, gain):
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    return round(sum(kept.values()) / weight.untyped_storage().nbytes(), 3)


def measure(
    candidates: dict[str, Transform], shape: tuple[int, ...], seconds: float, compiled: bool, device: str
) -> dict[str, dict[str, float]]:
    """Return the figures of all transforms for one shape."""
    torch.manual_seed(0)
    gain = torch.rand(shape[0], *[1] * (len(shape) - 1), device=device).add_(0.5).requires_grad_()
    gradient = torch.randn(shape, device=device)
    if compiled:
        usable = {n: t for n, t in candidates.items() if n not in ("exact evaluation", ZERO_UNIT)}
        baseline = next(iter(candidates))
        compiled_ones = {f"{n}, compiled": _compiled(t) for n, t in usable.items()}
        candidates = {baseline: candidates[baseline], **compiled_ones}
    weights = {}
    for name in candidates:
        weight = torch.randn(shape, device=device).mul_(0.05)
        if name == ZERO_UNIT:
            weight[0] = 0
        weights[name] = weight.requires_grad_()
    calls = {name: step(t, weights[name], gain, gradient) for name, t in candidates.items()}
    figures = interleaved(calls, seconds, device)
    for name, transform in candidates.items():
        if not compiled:
            figures[name]["kept"] = memory_kept(transform, weights[name], gain)
    return figures


def _compiled(transform: Transform) -> Transform:
    torch._dynamo.reset()
    compiled: Transform = torch.compile(transform, fullgraph=True)
    return compiled


def table(title: str, results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table of ratios (and microseconds): rows are candidates, columns shapes."""
    columns = list(results)
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = [f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = []
        for column in columns:
            f = results[column].get(name)
            kept = f", keeps {f['kept']:.2f}×" if f and "kept" in f else ""
            cells.append(f"{f['ratio']:.2f} ({f['microseconds']:.0f} µs{kept})" if f else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="an eighth of the time")
    parser.add_argument("--compile", action="store_true", help="also each transform compiled (minutes)")
    parser.add_argument("--device", default="cpu", help="cpu (as by default) or cuda")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 0.5 if args.quick else 4.0
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    families = {"weight norm": weight_norm_candidates, "weight standardization": standardization_candidates}
    for title, candidates in families.items():
        for compiled in (False, True) if args.compile else (False,):
            results[title + (", compiled" if compiled else "")] = {
                "×".join(map(str, shape)): measure(candidates(shape), shape, seconds, compiled, args.device)
                for shape in SHAPES
            }
    layers = {
        "conv 64→128, 3×3, 8×14×14": layer_candidates(True, args.device),
        "linear 768→3072, 256 rows": layer_candidates(False, args.device),
    }
    results["layers"] = {
        column: interleaved(
            {name: layer_step(*pair) for name, pair in candidates.items()}, seconds, args.device
        )
        for column, candidates in layers.items()
    }
    text = "\n\n".join(
        [
            "# What the weight-normalisation family costs",
            f"`python -m benchmarks.normalization`, on {args.device}. "
            + ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None),
            "Forward and backward; ratio to the first row.",
            *(table(t, r) for t, r in results.items()),
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
