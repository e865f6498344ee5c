"""How an optimizer steps and decays, measured on a second one of the same class and settings.

The class alone does not tell: AdamW is Adam with a flag, and other libraries have optimizers of their own.
The second optimizer, the probe, trains one small matrix with a constant gradient.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["PROBE_LR", "Recipe", "decay_coupling", "once_per_recipe", "step_grows_with_gradient"]

T = TypeVar("T")

_STEPS = 24  # RAdam takes plain momentum steps at first
PROBE_LR = 1e-3
_PLAIN = {"fused": None, "foreach": None, "capturable": False, "differentiable": False, "maximize": False}


@dataclass(frozen=True)
class Recipe:
    """The class and the settings that a probe is constructed from.

    Attributes:
        kind: The class.
        settings: Arguments of its constructor beside the parameters, with the rate ``PROBE_LR``, without
            ``weight_decay`` and with plain kernels.
    """

    kind: type[Optimizer]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, optimizer: Optimizer, group: int) -> Recipe:
        """Return the recipe of a param_group of an optimizer."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper
            optimizer = inner
        settings: dict[str, Any] = {
            **{k: v for k, v in optimizer.param_groups[group].items() if k not in ("params", "param_names")},
            **_PLAIN,
            "lr": PROBE_LR,
            "weight_decay": 0.0,
        }
        accepted = inspect.signature(type(optimizer).__init__).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        known = getattr(optimizer, "defaults", {}) if open_ended else {}
        return cls(type(optimizer), {k: v for k, v in settings.items() if k in accepted or k in known})

    def train(
        self,
        start: Tensor,
        steps: int,
        step: Callable[[Optimizer, Tensor, int], None],
        weight_decay: float = 0.0,
    ) -> bool:
        """Train a weight with a probe.

        Args:
            start: The initial value of the weight.
            steps: How many steps to take.
            step: Called as ``step(probe, weight, number)``; it sets the gradient and calls ``probe.step()``.
            weight_decay: That of the probe, if its class has one.

        Returns:
            Whether the probe could be constructed and has taken all steps.
        """
        settings: dict[str, Any] = dict(self.settings)
        if "weight_decay" in settings:
            settings["weight_decay"] = weight_decay
        try:
            weight = torch.nn.Parameter(start.clone())
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                probe = self.kind([weight], **settings)
                if callable(switch := getattr(probe, "train", None)):  # schedule-free: needed before a step
                    switch()
                for number in range(steps):
                    step(probe, weight, number)
        except Exception:  # any class, any error: it cannot be measured
            return False
        return True

    @property
    def _key(self) -> tuple[Any, ...] | None:
        """What equal recipes have in common; None where a setting is an object, which may change later."""
        plain = all(_is_plain(value) for value in self.settings.values())
        return (self.kind, *sorted(self.settings.items())) if plain else None


def once_per_recipe(measure: Callable[[Recipe], T]) -> Callable[[Optimizer, int], T]:
    """Return ``measure`` as a function of an optimizer and the index of a group, measured once per recipe."""
    known: dict[tuple[Any, ...], T] = {}

    def measured(optimizer: Optimizer, group: int) -> T:
        recipe = Recipe.of(optimizer, group)
        key = recipe._key
        if key is None:
            return measure(recipe)
        if key not in known:
            known[key] = measure(recipe)
        return known[key]

    return measured


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def step_grows_with_gradient(optimizer: Optimizer, group: int = 0) -> bool | None:
    """Return whether a gradient 1000 times as large makes larger steps: True for SGD, False for Adam.

    Args:
        optimizer: The optimizer; it is not changed.
        group: The index of the param_group whose settings are used.

    Returns:
        None if it cannot be measured: the optimizer cannot be constructed from the group's settings, or the
        steps grow in some other way.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> step_grows_with_gradient(torch.optim.SGD([weight], momentum=0.9))
        True
        >>> step_grows_with_gradient(torch.optim.AdamW([weight]))
        False
    """
    return _step_grows_with_gradient(optimizer, group)


@once_per_recipe
def _step_grows_with_gradient(recipe: Recipe) -> bool | None:
    small = _path(recipe, gradient=1.0, weight_decay=0.0)
    large = _path(recipe, gradient=1000.0, weight_decay=0.0)
    if small is None or large is None:
        return None
    last, last_large = (float((path[-1] - path[-2]).norm()) for path in (small, large))
    ratio = last_large / last if last > 0 else 0.0
    return True if 500 < ratio < 2000 else False if 0.2 < ratio < 5 else None


def decay_coupling(optimizer: Optimizer, group: int = 0) -> str | None:
    """Return how ``weight_decay`` acts: "decoupled" (w ← (1 − lr·λ)·w), "coupled" (added to the gradient).

    For SGD without momentum the two are the same, and the result is "decoupled".

    Args:
        optimizer: The optimizer; it is not changed.
        group: The index of the param_group whose settings are used.

    Returns:
        None if it is neither, or cannot be measured.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> decay_coupling(torch.optim.SGD([weight], momentum=0.9))
        'coupled'
        >>> decay_coupling(torch.optim.AdamW([weight]))
        'decoupled'
    """
    return _decay_coupling(optimizer, group)


@once_per_recipe
def _decay_coupling(recipe: Recipe) -> str | None:
    decay = 0.1
    path = _path(recipe, gradient=0.0, weight_decay=decay)
    if path is None or torch.equal(path[0], path[-1]):
        return None
    moved = path[-1] - path[0]
    decoupled = _start() * ((1 - PROBE_LR * decay) ** _STEPS - 1)
    if torch.allclose(moved, decoupled, rtol=1e-6, atol=0):
        return "decoupled"
    without_rate = _start() * ((1 - decay) ** _STEPS - 1)
    return None if torch.allclose(moved, without_rate, rtol=1e-6, atol=0) else "coupled"


def _start() -> Tensor:
    return torch.linspace(0.5, 2.0, 16, dtype=torch.float64).view(4, 4)


def _path(recipe: Recipe, gradient: float, weight_decay: float) -> list[Tensor] | None:
    """Return the path of a matrix that a probe steps with a constant gradient."""
    path = [_start()]

    def step(probe: Optimizer, weight: Tensor, _: int) -> None:
        weight.grad = gradient * torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4).sin()
        probe.step()
        path.append(weight.detach().clone())

    return path if recipe.train(_start(), _STEPS, step, weight_decay) else None
