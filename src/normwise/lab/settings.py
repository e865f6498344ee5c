"""What a run is: its settings, and the hash that identifies it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from typing_extensions import Self

import normwise as nw
from normwise.decay.rules import RULES, Rule

__all__ = ["ReplaySettings", "Settings", "TrainSettings", "rule_from", "settings_from"]

# Raised by a commit that changes what a run computes: older runs are then not taken for it.
REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """What all kinds of runs have in common: data, network, optimizer, seed.

    Attributes:
        data: Name of the data set.
        fingerprint: SHA-256 of its content.
        train_size: Number of training images, drawn from the training set by ``seed``.
        image_size: Side of the images in pixels, after averaging.
        member: How the convolutions are normalised (``normwise.lab.models.MEMBERS``).
        batch_norm: Whether batch norm follows each convolution.
        width: Channels of the first convolution.
        init_scale: Norm of every unit at the start.
        rule: The rule's settings (``Rule.settings``), or None: no decay.
        mode: Mode of ``normwise.Decay``.
        lr: The largest learning rate; a cosine takes it to zero.
        momentum: Of SGD.
        batch_size: Images in a step.
        seed: Of the initialisation, the training subset and the order of batches.
    """

    kind: ClassVar[str]

    data: str
    fingerprint: str
    train_size: int
    image_size: int
    member: str = "weight_norm"
    batch_norm: bool = True
    width: int = 8
    init_scale: float = 1.0
    rule: dict[str, Any] | None = None
    mode: str = "flow"
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 100
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
    def steps_per_epoch(self) -> int:
        """Batches that the training images fill; what is left over is left out."""
        return self.train_size // self.batch_size

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps of the run."""

    @property
    def total_time(self) -> float:
        """Σ lr over the steps of the cosine schedule."""
        return sum(self.lr_at(step) for step in range(self.steps))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: half a cosine from ``lr`` towards zero."""
        return float(self.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item()))

    def with_rule(self, rule: Rule | None, mode: str = "flow") -> Self:
        """Return the same settings under another rule."""
        return replace(self, rule=None if rule is None else rule.settings(), mode=mode)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Train, then measure on the training and the test images.

    Attributes:
        epochs: Passes over the training images.
    """

    kind: ClassVar[str] = "train"

    epochs: int = 8

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(Settings):
    """Train with decay in float64, then again without it, with the equivalent steps.

    Attributes:
        length: Number of steps.
    """

    kind: ClassVar[str] = "replay"

    length: int = 300

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.length


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


def settings_from(values: dict[str, Any]) -> Settings:
    """Return the settings that ``as_dict`` made these values of.

    Raises:
        ValueError: They name another kind, or other fields than it has.
    """
    kinds: dict[str, type[Settings]] = {kind.kind: kind for kind in (TrainSettings, ReplaySettings)}
    if values.get("kind") not in kinds:
        raise ValueError(f"kind={values.get('kind')!r} is not known: choose from {', '.join(kinds)}")
    kind = kinds[values["kind"]]
    own = {key: value for key, value in values.items() if key not in ("kind", "versions")}
    if set(own) != {field.name for field in fields(kind)}:
        raise ValueError(f"these are not the settings of a {kind.kind} run: {sorted(own)}")
    return kind(**own)
