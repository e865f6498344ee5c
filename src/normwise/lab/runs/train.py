"""Training on images, evaluated on the training, the validation and the test images."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.convnet import directions
from normwise.lab.runs.base import ImageRun, rule_from
from normwise.lab.runs.images import Images, batches, evaluate
from normwise.monitor.motion import Snapshot, motion, snapshot
from normwise.norms import slice_norms

__all__ = ["TrainRun", "peer_is_installed"]

LINES = 40  # of metrics per run
SPIKE = 2.0  # a spike is a loss of more than this multiple of the median of the losses before it


@dataclass(frozen=True, kw_only=True)
class TrainRun(ImageRun):
    """Train, then evaluate on the training, the validation and the test images.

    Attributes:
        epochs: Passes over the training images.
        validation_size: Images held out of training to choose hyper-parameters. 0 means none.
        optimizer: "sgd", "adam" (β₂ = 0.999, ε = 1e-8), or "sgdp" (from pytorch_optimizer, for comparison).
        weight_decay: Weight decay of the optimizer itself on the directions. Only "sgdp" uses it.
        schedule: "cosine", from ``lr`` towards zero, or "constant".
        clock: Clock of ``normwise.Decay``.
        measure: Measure of ``normwise.Decay``.
        dim: Units that the rule acts on: 0 for each filter, None for each whole tensor.
        precision: "float32", or "bfloat16" or "float16" for autocast. "float16" also uses a GradScaler.
        relative_lr: For each layer, factors on its learning rate at equally spaced times from the first step
            to the last, interpolated geometrically. Empty means 1.
    """

    epochs: int = 8
    validation_size: int = 0
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    clock: str = "lr"
    measure: str = "norm"
    dim: int | None = 0
    precision: str = "float32"
    relative_lr: tuple[tuple[float, ...], ...] = ()

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.epochs * self.steps_per_epoch

    @property
    def cost(self) -> float:
        """Rough number of seconds. Half precision is several times slower on a CPU."""
        return self.seconds(self.steps) * (1.0 if self.precision == "float32" else 4.0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr if self.schedule == "constant" else super().lr_at(step)

    def run(self, log: Log) -> Metrics:
        """Train and evaluate.

        Args:
            log: Called about 40 times with the mean training loss since the last call, the learning rate, and
                for each layer the mean norm, effective learning rate and rotation since the last call
                ("turn", in radians).

        Returns:
            The summary. ``status`` is "finished", "refused" (the rule refused a step; ``reason`` says why) or
            "not finite" (the loss was not a finite number), and ``step`` is the last step. A finished run has
            train_loss, train_accuracy, test_loss, test_accuracy (fractions), validation_loss and
            validation_accuracy if there is a validation set, the mean norms by layer, the number of steps
            that the GradScaler skipped and the number of loss spikes.
        """
        images = Images(self, self.validation_size)
        model = self.build(images.classes)
        optimizer = self.make_optimizer(model)
        scaler = torch.amp.GradScaler("cpu", enabled=self.precision == "float16")
        before = _snapshots(model)
        losses: list[Tensor] = []
        skipped, logged = 0, 0
        every = max(1, self.steps // LINES)
        for step, (x, y) in enumerate(batches(self, images)):
            lr = self._set_lrs(optimizer, step)
            optimizer.zero_grad()
            with _autocast(self.precision):
                loss = cross_entropy(model(x), y)
            losses.append(loss.detach())
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            try:
                scaler.step(optimizer)
            except ValueError as error:  # mode "explicit" refuses a coefficient that would flip the weight
                return {"status": "refused", "step": step, "reason": str(error)}
            scaler.update()
            skipped += scaler.get_scale() < scale
            if (step + 1) % every == 0 or step + 1 == self.steps:
                mean_loss = float(torch.stack(losses[logged:]).mean())
                if not math.isfinite(mean_loss):
                    reason = f"the training loss was {mean_loss}"
                    return {"status": "not finite", "step": step, "reason": reason, "skipped_steps": skipped}
                now = _snapshots(model)
                layers = {name: motion(before[name], now[name], lr).means() for name in now}
                log({"step": step + 1, "train_loss": mean_loss, "lr": lr, "layers": layers})
                before, logged = now, len(losses)
        evaluated = _evaluated(model, images)
        if not math.isfinite(evaluated["train_loss"] + evaluated["test_loss"]):
            return {"status": "not finite", "step": self.steps, "reason": "the final loss is not finite"}
        return {
            "status": "finished",
            "step": self.steps,
            **evaluated,
            "norms": {name: float(slice_norms(w).mean()) for name, w in directions(model).items()},
            "skipped_steps": skipped,
            "spikes": _spikes(losses),
        }

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over all parameters, with the rule attached to the directions only.

        The first parameter group holds everything that is not a direction. Each further group holds the
        directions of one layer.

        Raises:
            ValueError: The optimizer is unknown, or needs a package that is not installed.
        """
        weights = directions(model)
        decayed = {id(weight) for weight in weights.values()}
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in decayed]}]
        groups += [{"params": [weight], "weight_decay": self.weight_decay} for weight in weights.values()]
        optimizer = self._bare_optimizer(groups)
        rule = rule_from(self.rule)
        if rule is not None and self.start == "equilibrium":
            nw.attach(
                optimizer,
                weights.values(),
                self.total_time,
                dim=self.dim,
                strength=self.strength,
                rule=type(rule),
                model=model,
            )
        elif rule is not None:
            nw.Decay(
                optimizer,
                rule,
                weights.values(),
                dim=self.dim,
                mode=self.mode,
                clock=self.clock,
                measure=self.measure,
            )
        return optimizer

    def _bare_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.lr, self.momentum, fused=True)
        if self.optimizer == "adam":
            return torch.optim.AdamW(groups, self.lr, (self.momentum, 0.999), weight_decay=0.0, fused=True)
        if self.optimizer == "sgdp":
            if not peer_is_installed():
                raise ValueError('optimizer="sgdp" needs another package: pip install normwise[peers]')
            from pytorch_optimizer import SGDP

            peer: Optimizer = SGDP(groups, self.lr, momentum=self.momentum)
            return peer
        raise ValueError(f"optimizer={self.optimizer!r} is not known: choose from sgd, adam, sgdp")

    def _set_lrs(self, optimizer: Optimizer, step: int) -> float:
        """Set the learning rate of every group for this step; return that of the first group."""
        lr = self.lr_at(step)
        rest, *layers = optimizer.param_groups
        rest["lr"] = lr
        for k, group in enumerate(layers):
            factor = _interpolated(self.relative_lr[k], step / self.steps) if self.relative_lr else 1
            group["lr"] = lr * factor
        return lr


def peer_is_installed() -> bool:
    """Return whether pytorch_optimizer, which has SGDP, is installed."""
    return importlib.util.find_spec("pytorch_optimizer") is not None


def _interpolated(values: tuple[float, ...], position: float) -> float:
    """Interpolate positive values geometrically. ``position`` is 0 at the first value and 1 at the last."""
    place = position * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    share = place - low
    return float(values[low] ** (1 - share) * values[low + 1] ** share)


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, precision))


def _evaluated(model: nn.Module, images: Images) -> Metrics:
    metrics: Metrics = {}
    for part in ("train", "validation", "test"):
        labels = getattr(images, f"{part}_labels")
        if len(labels):
            loss, accuracy = evaluate(model, getattr(images, part), labels)
            metrics |= {f"{part}_loss": loss, f"{part}_accuracy": accuracy}
    return metrics


def _spikes(losses: list[Tensor], window: int = 20) -> int:
    """Count the losses above SPIKE times the median of the ``window`` losses before, and 0.5 above it."""
    if len(losses) <= window:
        return 0
    values = torch.stack(losses).float()
    median = values[:-1].unfold(0, window, 1).median(1).values
    later = values[window:]
    return int(((later > SPIKE * median) & (later > median + 0.5)).sum())


def _snapshots(model: nn.Module) -> dict[str, Snapshot]:
    return {name: snapshot(nw.Unit(weight)) for name, weight in directions(model).items()}
