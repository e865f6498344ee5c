"""What a run on text is: its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from normwise.lab.runs.settings import OptimizerSettings

__all__ = ["DECAYED", "PARTS", "TextSettings"]

DECAYED = ("nothing", "matrices", "invariant")
PARTS = ("", "attention", "stream")


@dataclass(frozen=True, kw_only=True)
class TextSettings(OptimizerSettings):
    """Train a small GPT on text under AdamW, then measure on the validation and the test part.

    Torch's own weight_decay is 0: all decay goes through ``normwise.Decay``, which sees RMS values.

    Attributes:
        data: Name of the text.
        fingerprint: SHA-256 of its content.
        width: Of the residual stream.
        heads: Of the attention.
        depth: Number of blocks.
        context: Characters that the network sees.
        batch_size: Sequences in a step.
        length: Number of steps.
        warmup: Steps in which the learning rate rises, before the cosine.
        beta2: β₂ of AdamW; β₁ is 0.9 and ε 1e-8.
        decayed: What the rule acts on: "nothing"; "matrices", each whole; or "invariant", the units that
            ``normwise.plan`` finds scale-invariant in this network, alone or jointly.
        scaled: Which weights ``init_scale`` multiplies at the start, which leaves the network's function as
            it is: "attention", the queries' and keys'; "stream", the embeddings' and those of all layers that
            write to the residual stream; or "", none.
        init_scale: What they are multiplied by.
        frozen: Weights that are not trained: "attention", "stream" or "", none.
        measured: Sequences of the validation and the test part that the final losses are means over.
        seed: Of the initialisation and of the batches.
    """

    kind: ClassVar[str] = "text"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.text_train:train"

    data: str
    fingerprint: str
    width: int = 32
    heads: int = 2
    depth: int = 2
    context: int = 32
    batch_size: int = 32
    length: int = 200
    warmup: int = 20
    beta2: float = 0.99
    decayed: str = "nothing"
    scaled: str = ""
    init_scale: float = 1.0
    frozen: str = ""
    measured: int = 256

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.length

    @property
    def cost(self) -> float:
        """Seconds, roughly."""
        characters = self.batch_size * self.context
        return 0.35 + self.steps * (1e-3 + self.depth * (1e-3 + 9.5e-8 * characters * self.width))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: a line up to ``lr``, then half a cosine towards zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        rest = self.steps - self.warmup
        return float(self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / rest)))
