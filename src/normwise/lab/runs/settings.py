"""What a run is: its settings, and the hash that identifies it."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from typing_extensions import Self

import normwise as nw
from normwise.decay.rules import RULES, Rule

__all__ = [
    "ImageSettings",
    "OptimizerSettings",
    "ReplaySettings",
    "Settings",
    "TrainSettings",
    "rule_from",
]

# Raised by a commit that changes what a run computes: older runs are then not taken for it.
REVISION = 2


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """What a run is: everything that its results depend on. A kind of run is a subclass.

    Attributes:
        seed: Of everything that is random in the run.
    """

    kind: ClassVar[str]
    """Name of the kind, the same for all its runs."""
    carried_out_by: ClassVar[str]
    """``module:function``; it takes the settings and a function that logs, and returns the summary."""

    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything that the results depend on, as plain values."""
        versions = {"normwise": nw.__version__, "revision": REVISION, "torch": torch.__version__}
        return {"kind": self.kind, **asdict(self), "versions": versions}

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that stand for :meth:`as_dict`."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    @abstractmethod
    def cost(self) -> float:
        """About how many seconds the run takes: long runs are begun first, and time left is estimated."""

    def carry_out(self, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Carry out the run in this process; return its summary, of which ``status`` is one entry."""
        module, function = self.carried_out_by.split(":")
        summary: dict[str, Any] = getattr(importlib.import_module(module), function)(self, log)
        return summary


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """What runs have in common in which an optimizer trains under a schedule beside a rule.

    Attributes:
        rule: The rule's settings (``Rule.settings``), or None: no decay.
        mode: Mode of ``normwise.Decay``.
        lr: The largest learning rate.
    """

    rule: dict[str, Any] | None = None
    mode: str = "flow"
    lr: float = 0.1

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps of the run."""

    @property
    def total_time(self) -> float:
        """Σ lr over the steps of the schedule."""
        return sum(self.lr_at(step) for step in range(self.steps))

    @property
    def total_squares(self) -> float:
        """Σ lr² over the steps of the schedule."""
        return sum(self.lr_at(step) ** 2 for step in range(self.steps))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: half a cosine from ``lr`` towards zero."""
        return float(self.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item()))

    def with_rule(self, rule: Rule | None, mode: str = "flow") -> Self:
        """Return the same settings under another rule."""
        return replace(self, rule=None if rule is None else rule.settings(), mode=mode)


@dataclass(frozen=True, kw_only=True)
class ImageSettings(OptimizerSettings):
    """What runs on images have in common, beside optimizer and rule: data and network.

    Attributes:
        data: Name of the data set.
        fingerprint: SHA-256 of its content.
        train_size: Number of training images, drawn from the training set by ``seed``.
        image_size: Side of the images in pixels, after averaging.
        member: How the convolutions are normalised (``normwise.lab.models.convnet.MEMBERS``).
        batch_norm: Whether batch norm follows each convolution.
        width: Channels of the first convolution.
        init_scale: Norm of every unit at the start.
        momentum: Of SGD; β₁ of Adam.
        batch_size: Images in a step.
        seed: Of the initialisation, the training subset and the order of batches.
    """

    data: str
    fingerprint: str
    train_size: int
    image_size: int
    member: str = "weight_norm"
    batch_norm: bool = True
    width: int = 8
    init_scale: float = 1.0
    momentum: float = 0.9
    batch_size: int = 100

    @property
    def steps_per_epoch(self) -> int:
        """Batches that the training images fill; what is left over is left out."""
        return self.train_size // self.batch_size


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ImageSettings):
    """Train, then measure on the training, the validation and the test images.

    Attributes:
        epochs: Passes over the training images.
        validation_size: Images kept out of training to choose hyper-parameters by; 0: none.
        initialiser: How weights begin (``normwise.lab.models.convnet.INITIALISERS``).
        optimizer: "sgd", "adam" (β₂ = 0.999, ε = 1e-8), or "sgdp" (of pytorch_optimizer, a peer).
        weight_decay: The optimizer's own, on the directions alone; that of the peer, else 0.
        schedule: "cosine", from ``lr`` towards zero, or "constant".
        clock: Clock of ``normwise.Decay``.
        measure: Measure of ``normwise.Decay``.
        dim: Which units the rule sees: 0, each filter; None, each whole tensor.
        precision: "float32", or "bfloat16" or "float16": autocast, the latter with a GradScaler.
        relative_lr: For each layer, what its learning rate is multiplied by at equally spaced times from the
            first step to the last, with geometric interpolation between them. Empty: 1.
    """

    kind: ClassVar[str] = "train"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.train:train"

    epochs: int = 8
    validation_size: int = 0
    initialiser: str = "units"
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
        """Number of steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def cost(self) -> float:
        """Seconds, roughly; half precision takes a CPU several times as long."""
        return _seconds(self, self.steps) * (1.0 if self.precision == "float32" else 4.0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr if self.schedule == "constant" else super().lr_at(step)


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(ImageSettings):
    """Train with decay in float64, then again without it, with the equivalent steps.

    Attributes:
        length: Number of steps.
        optimizer: "sgd" or "adam" (β₂ = 0.999, ε = 1e-8).
    """

    kind: ClassVar[str] = "replay"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.replay:replay"

    length: int = 300
    optimizer: str = "sgd"

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.length

    @property
    def cost(self) -> float:
        """Seconds, roughly: four runs in float64."""
        return 8 * _seconds(self, self.steps)


def _seconds(settings: ImageSettings, steps: int) -> float:
    """About how long a network of this size trains on one core."""
    pixels = settings.batch_size * settings.image_size**2 * settings.width
    return 0.3 + steps * (3e-3 + 4e-8 * pixels)


def rule_from(settings: dict[str, Any] | None) -> Rule | None:
    """Return the rule that has these ``Rule.settings``.

    Example:
        >>> rule_from({"name": "PowerShrink", "coefficient": 0.1, "power": 2.0})
        PowerShrink(coefficient=0.1, power=2.0)
    """
    if settings is None:
        return None
    arguments = {key: value for key, value in settings.items() if key != "name"}
    kinds = {kind.__name__: kind for kind in RULES}
    return kinds[settings["name"]](**arguments)
