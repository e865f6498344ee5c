"""Logs without a training: any number of layers and rows, any names."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import normwise as nw
from normwise.monitor.finding import Finding

NASTY = "</script><img src=x onerror=alert(1)>&'\"`${alert(1)}"


def finding(step: int, layers: tuple[str, ...], *, ended: bool = False, text: str = "") -> Finding:
    evidence, remedy = f"{text}it turns by 1e-6 rad", f"plan.attach(optimizer)  # {text}"
    return Finding("effective rate vanished", layers, 10, step, evidence, remedy, ended)


def names_of(count: int, text: str = "") -> list[str]:
    kinds = ("attn.query", "attn.key", "attn.out", "mlp.up", "mlp.down")
    return [f"{text}blocks.{k // len(kinds)}.{kinds[k % len(kinds)]}" for k in range(count)]


def write(
    folder: Path,
    layers: int = 10,
    rows: int = 40,
    text: str = "",
    total: int | None = 400,
    max_rows: int = 2000,
) -> nw.trackers.JSONL:
    """Write a log whose first layer is ill, and leave it open."""
    rng, names = Random(0), names_of(layers, text)
    tracker = nw.trackers.JSONL(folder, max_rows)
    kinds = {name: "shrink" if k % 5 != 3 else "L2" for k, name in enumerate(names)}
    tracker.begin({"every": 10, "total_steps": total, "optimizers": ["AdamW"], "layers": kinds})
    for row in range(rows):
        time = row / max(1, rows - 1)
        values = {"normwise/lr": 1e-3, "normwise/loss": 4 - 2 * time + 0.1 * rng.random()}
        for k, name in enumerate(names):
            size = 1e4 if k == 0 else 1.0
            norm = size * (2 - time) * (1 + 0.02 * rng.random())
            values[f"normwise/norm/{name}"] = norm
            if kinds[name] == "L2":
                continue
            values[f"normwise/rotation/{name}"] = 0.02 / norm * (1 + 0.2 * rng.random())
            values[f"normwise/effective_lr/{name}"] = 1e-3 / norm
            values[f"normwise/equilibrium_norm/{name}"] = 1.0 + 0.01 * rng.random()
            values[f"normwise/equilibrium_rotation/{name}"] = 0.02 * math.exp(-0.1 * time)
        tracker.log(10 * (row + 1), values)
        if row == min(2, rows - 1):
            tracker.finding(finding(10 * (row + 1), (names[0],), text=text))
    return tracker
