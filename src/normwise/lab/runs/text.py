"""Training of the language model on text, evaluated on the validation and the test text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer

import normwise as nw
from normwise.lab.data.text import Text, load_text
from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.gpt import GPT, GROUPS, group_of, matrices, part, planned
from normwise.lab.runs.base import OptimizerRun, rule_from
from normwise.lab.runs.devices import Execution, device_named
from normwise.monitor.motion import Snapshot, motion, snapshot
from normwise.norms import wide_dtype

__all__ = ["DECAYED", "PARTS", "TextRun"]

DECAYED = ("nothing", "matrices", "invariant")
PARTS = ("", "attention", "stream")

LINES = 40  # of metrics per run
VALIDATED = 32  # sequences for the validation loss during training


@dataclass(frozen=True, kw_only=True)
class TextRun(OptimizerRun):
    """Train a small GPT, then evaluate on the validation and the test text.

    The weight_decay of the optimizers is 0: all decay goes through ``normwise.Decay`` with ``measure="rms"``.

    Attributes:
        data: Name of the text.
        fingerprint: SHA-256 of its content.
        width: Width of the residual stream.
        heads: Attention heads.
        depth: Number of blocks.
        context: Length of a sequence in characters.
        batch_size: Sequences per step.
        length: Number of steps.
        warmup: Steps of linear warm-up before the cosine.
        optimizer: "adamw"; or "muon": Muon with the step length of AdamW for the matrices of the blocks, and
            AdamW for the rest.
        beta2: β₂ of AdamW; β₁ is 0.9 and ε is 1e-8.
        decayed: What the rule acts on: "nothing"; "matrices", each as a whole; or "invariant", the units that
            ``normwise.plan`` finds to be scale-invariant in this network, alone or jointly.
        scaled: Weights to multiply by ``init_scale`` at the start, which does not change the network's
            function: "attention" (queries and keys), "stream" (embeddings, and all layers that write to the
            residual stream) or "" (none).
        init_scale: Factor on the weights that ``scaled`` names.
        frozen: Weights that are not trained: "attention", "stream" or "" (none).
        measured: Number of validation and of test sequences for the final losses.
        seed: Seed of the initialisation and of the batches.
    """

    data: str
    fingerprint: str
    width: int = 32
    heads: int = 2
    depth: int = 2
    context: int = 32
    batch_size: int = 32
    length: int = 200
    warmup: int = 20
    optimizer: str = "adamw"
    beta2: float = 0.99
    decayed: str = "nothing"
    scaled: str = ""
    init_scale: float = 1.0
    frozen: str = ""
    measured: int = 256

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.length

    @property
    def cost(self) -> float:
        """Rough number of seconds."""
        characters = self.batch_size * self.context
        return 0.35 + self.steps * (1e-3 + self.depth * (1e-3 + 9.5e-8 * characters * self.width))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up to ``lr``, then half a cosine towards zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        rest = self.steps - self.warmup
        return float(self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / rest)))

    def run(self, log: Log) -> Metrics:
        """Train on the CPU; see :meth:`run_in`."""
        return self.run_in(None, None, log)

    def run_in(self, folder: Path | None, execution: Any, log: Log) -> Metrics:
        """Train and evaluate.

        Args:
            folder: Not used: a run is too short for checkpoints.
            execution: An :class:`Execution`, of which the device counts; None: the CPU.
            log: Called about 40 times with the mean training loss since the last call, the learning rate, the
                validation loss on a few sequences, and for each group of matrices
                (``normwise.lab.models.gpt.GROUPS``) the mean RMS ("norm"), effective learning rate lr/RMS and
                rotation since the last call ("turn", in radians).

        Returns:
            The summary, with losses in nats per character. ``status`` is "finished", "refused" (the rule
            refused a step; ``reason`` says why) or "not finite" (the loss was not a finite number), and
            ``step`` is the last step. A finished run has train_loss (the mean over the last tenth of the
            steps), validation_loss, test_loss and the mean RMS by group ("norms").
        """
        device = device_named((execution or Execution(device="cpu")).device)
        text = _text(self.data, self.fingerprint)
        model = self.build(len(text.characters)).to(device)
        optimizers = self.make_optimizers(model)
        few = _sequences(text.validation, self.context, min(VALIDATED, self.measured)).to(device)
        before = _snapshots(model)
        losses: list[Tensor] = []
        logged = 0
        every = max(1, self.steps // LINES)
        for step, batch in enumerate(self._batches(text)):
            lr = self.lr_at(step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
            loss = _loss(model, batch.to(device))
            losses.append(loss.detach())
            loss.backward()
            try:
                for optimizer in optimizers:
                    optimizer.step()
            except ValueError as error:  # mode "explicit" refuses a coefficient that would flip the weight
                return {"status": "refused", "step": step, "reason": str(error)}
            if (step + 1) % every == 0 or step + 1 == self.steps:
                mean_loss = float(torch.stack(losses[logged:]).mean())
                if not math.isfinite(mean_loss):
                    return _not_finite(step, f"the training loss was {mean_loss}")
                now = _snapshots(model)
                line = {"step": step + 1, "train_loss": mean_loss, "lr": lr}
                log(line | {"validation_loss": _evaluated(model, few), "layers": _layers(lr, before, now)})
                before, logged = now, len(losses)
        last = losses[-max(1, self.steps // 10) :]
        final = {"train_loss": float(torch.stack(last).mean())}
        for name in ("validation", "test"):
            sequences = _sequences(getattr(text, name), self.context, self.measured)
            final[f"{name}_loss"] = _evaluated(model, sequences.to(device))
        if not all(math.isfinite(value) for value in final.values()):
            return _not_finite(self.steps, "the final loss is not finite")
        snapshots = _snapshots(model)
        norms = {
            group: _mean([float(snapshots[name].norms) for name in names])
            for group, names in _groups(snapshots).items()
        }
        return {"status": "finished", "step": self.steps, **final, "norms": norms}

    def build(self, characters: int) -> GPT:
        """Return the initial network. Its function is the same for all rules, learning rates and scales.

        Raises:
            ValueError: ``scaled`` or ``frozen`` names no known part of the network.
        """
        for field in ("scaled", "frozen"):
            if getattr(self, field) not in PARTS:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known: choose from {PARTS}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = GPT(characters, *self._architecture)
        with torch.no_grad():
            for weight in part(model, self.scaled):
                weight.mul_(self.init_scale)
        for weight in part(model, self.frozen):
            weight.requires_grad_(False)
        return model

    def make_optimizers(self, model: GPT) -> list[Optimizer]:
        """Return the optimizers, without weight decay of their own, with the rule attached to :meth:`units`.

        Raises:
            ValueError: ``optimizer`` is not known.
        """
        optimizers = self._bare_optimizers(model)
        rule = rule_from(self.rule)
        if rule is not None and self.start == "equilibrium":
            plan = planned(model.token.num_embeddings, *self._architecture).apply_to(model)
            plan.attach(optimizers, self.total_time, strength=self.strength, rule=type(rule))
        elif rule is not None:
            for optimizer in optimizers:
                held = {id(param) for group in optimizer.param_groups for param in group["params"]}
                decayed = [u for u in self.units(model) if all(id(param) in held for param in u.params)]
                if decayed:
                    nw.Decay(optimizer, rule, decayed, mode=self.mode, measure="rms")
        return optimizers

    def _bare_optimizers(self, model: GPT) -> list[Optimizer]:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        betas = (0.9, self.beta2)
        if self.optimizer == "adamw":
            return [AdamW(trained, self.lr, betas, weight_decay=0.0, fused=True)]
        if self.optimizer == "muon":
            inner = {id(weight) for weight in model.blocks.parameters() if weight.ndim == 2}
            matrices = [weight for weight in trained if id(weight) in inner]
            rest = [weight for weight in trained if id(weight) not in inner]
            return [
                Muon(matrices, self.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                AdamW(rest, self.lr, betas, weight_decay=0.0, fused=True),
            ]
        raise ValueError(f"optimizer={self.optimizer!r} is not known: choose from adamw, muon")

    def units(self, model: GPT) -> list[nw.Unit]:
        """Return the units that the rule acts on.

        Raises:
            ValueError: ``decayed`` is not known.
        """
        if self.decayed == "nothing":
            return []
        if self.decayed == "matrices":
            return [nw.Unit(weight, dim=None) for weight in matrices(model).values()]
        if self.decayed == "invariant":
            return planned(model.token.num_embeddings, *self._architecture).apply_to(model).units
        raise ValueError(f"decayed={self.decayed!r} is not known: choose from {', '.join(DECAYED)}")

    @property
    def _architecture(self) -> tuple[int, int, int, int]:
        return self.width, self.heads, self.depth, self.context

    def _batches(self, text: Text) -> Iterator[Tensor]:
        """Yield sequences of context + 1 characters from random places, in an order set by the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.arange(self.context + 1)
        for _ in range(self.steps):
            starts = torch.randint(len(text.train) - self.context, (self.batch_size,), generator=generator)
            yield text.train[starts[:, None] + offsets]


def _not_finite(step: int, reason: str) -> Metrics:
    return {"status": "not finite", "step": step, "reason": reason}


@lru_cache(maxsize=1)
def _text(name: str, fingerprint: str) -> Text:
    """Return the text. It is cached, as successive runs use the same one."""
    text = load_text(name)
    if text.fingerprint != fingerprint:
        raise ValueError(
            f"{name} is not the text of these settings: its SHA-256 is {text.fingerprint[:12]}…, "
            f"not {fingerprint[:12]}…"
        )
    return text


def _sequences(ids: Tensor, context: int, count: int) -> Tensor:
    """Return ``count`` sequences of context + 1 characters, evenly spread over the text."""
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    return ids[starts[:, None] + torch.arange(context + 1)]


def _loss(model: GPT, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1])
    return cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def _evaluated(model: GPT, sequences: Tensor) -> float:
    losses = [_loss(model, chunk) * len(chunk) for chunk in sequences.split(64)]
    return float(torch.stack(losses).sum()) / len(sequences)


def _snapshots(model: GPT) -> dict[str, Snapshot]:
    """Return a snapshot of each matrix as a single unit, with its RMS in place of its norm."""
    snapshots = {name: snapshot(nw.Unit(weight, dim=None)) for name, weight in matrices(model).items()}
    return {
        name: replace(shot, norms=shot.norms / math.sqrt(shot.directions.numel()))
        for name, shot in snapshots.items()
    }


def _groups(snapshots: dict[str, Snapshot]) -> dict[str, list[str]]:
    """Return the names of the matrices in each group."""
    return {group: [name for name in snapshots if group_of(name) == group] for group in GROUPS}


def _layers(lr: float, before: dict[str, Snapshot], now: dict[str, Snapshot]) -> Metrics:
    """Return the mean RMS, effective learning rate and rotation by group."""
    layers = {}
    for group, names in _groups(now).items():
        motions = [
            motion(before[name], now[name], lr, degree=1, dtype=wide_dtype(now[name].directions.device))
            for name in names
        ]
        alive = [moved for moved in motions if bool(moved.effective_lr.isfinite())]
        layers[group] = {
            "norm": _mean([float(moved.norm) for moved in alive]) if alive else None,
            "effective_lr": _mean([float(moved.effective_lr) for moved in alive]) if alive else None,
            "turn": _mean([float(moved.rotation) for moved in motions]),
        }
    return layers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
