"""Settings and set-up that several runs share: optimizer, schedule, decay rule, image data and network."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from normwise.decay.rules import RULES, Rule
from normwise.decay.weight_rules import WEIGHT_RULES
from normwise.lab.engine.run import Run
from normwise.lab.models.convnet import ConvNet, initialise
from normwise.lab.models.small_networks import MLP, ResidualNet

__all__ = ["ImageRun", "OptimizerRun", "rule_from"]


@dataclass(frozen=True, kw_only=True)
class OptimizerRun(Run):
    """A run in which an optimizer trains under a learning-rate schedule and a decay rule.

    Attributes:
        rule: Settings of the rule (``Rule.settings``). None means no decay.
        mode: Mode of ``normwise.Decay``.
        lr: Peak learning rate.
        start: "as is", or "equilibrium": the rule, AWS or L2, has the coefficient and the initial norms that
            ``normwise.attach`` gives it.
        strength: S of ``normwise.attach``.
    """

    rule: dict[str, Any] | None = None
    mode: str = "flow"
    lr: float = 0.1
    start: str = "as is"
    strength: float = 3.0

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of optimizer steps."""

    @property
    def total_time(self) -> float:
        """Σ lr over all steps."""
        return sum(self.lr_at(step) for step in range(self.steps))

    @property
    def total_squares(self) -> float:
        """Σ lr² over all steps."""
        return sum(self.lr_at(step) ** 2 for step in range(self.steps))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: half a cosine from ``lr`` towards zero."""
        return float(self.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item()))

    def with_rule(self, rule: Rule | None, mode: str = "flow") -> Self:
        """Return the same run with another rule."""
        return replace(self, rule=None if rule is None else rule.settings(), mode=mode)


@dataclass(frozen=True, kw_only=True)
class ImageRun(OptimizerRun):
    """A run that trains a :class:`~normwise.lab.models.convnet.ConvNet` on images.

    Attributes:
        data: Name of the data set.
        fingerprint: SHA-256 of its content.
        train_size: Number of training images. ``seed`` selects them from the training set.
        image_size: Height and width of the images in pixels, after averaging.
        network: "convnet", "residual" or "mlp"; the last two have batch norm and no member.
        member: How the convolutions are normalised (``normwise.lab.models.convnet.MEMBERS``).
        batch_norm: Whether a batch norm follows each convolution.
        width: Channels of the first convolution.
        init_scale: Initial norm of every unit.
        initialiser: Initialisation of the weights (``normwise.lab.models.convnet.INITIALISERS``).
        momentum: Momentum of SGD, or β₁ of Adam.
        batch_size: Images per step.
        seed: Seed of the initialisation, the training subset and the order of the batches.
    """

    data: str
    fingerprint: str
    train_size: int
    image_size: int
    network: str = "convnet"
    member: str = "weight_norm"
    batch_norm: bool = True
    width: int = 8
    init_scale: float = 1.0
    initialiser: str = "units"
    momentum: float = 0.9
    batch_size: int = 100

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in the training images. An incomplete last batch is dropped."""
        return self.train_size // self.batch_size

    def seconds(self, steps: int) -> float:
        """Return roughly how many seconds ``steps`` training steps take on one core."""
        pixels = self.batch_size * self.image_size**2 * self.width
        return 0.3 + steps * (3e-3 + 4e-8 * pixels)

    def build(self, classes: int) -> nn.Module:
        """Return the initial network. Its function is the same for every rule and every ``init_scale``.

        Raises:
            ValueError: ``network`` is not known.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module
            if self.network == "convnet":
                model = ConvNet(self.member, self.batch_norm, self.width, classes)
            elif self.network == "residual":
                model = ResidualNet(self.width, classes)
            elif self.network == "mlp":
                model = MLP(self.image_size**2, 16 * self.width, classes)
            else:
                raise ValueError(f"network={self.network!r} is not known: choose from convnet, residual, mlp")
            initialise(model, self.initialiser, self.init_scale)
        return model


def rule_from(settings: dict[str, Any] | None) -> Rule | None:
    """Return the rule with these settings (``Rule.settings``).

    Example:
        >>> rule_from({"name": "PowerShrink", "coefficient": 0.1, "power": 2.0})
        PowerShrink(coefficient=0.1, power=2.0)
    """
    if settings is None:
        return None
    arguments = {key: value for key, value in settings.items() if key != "name"}
    rules = {rule.__name__: rule for rule in (*RULES, *WEIGHT_RULES)}
    return rules[settings["name"]](**arguments)
