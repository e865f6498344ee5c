"""How far an optimizer's steps lengthen a weight: measured on a second optimizer, with random gradients.

Σ lr is not time for every optimizer, and the length of its steps need not be the learning rate: settled steps
over lr are 0.23 for AdamW, and depend on the shape for Muon. So growth is measured and not looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.planning.optimizer_probe import PROBE_LR, Recipe, once_per_recipe

__all__ = ["Stepping", "stepping_of", "textbook_stepping"]

_EARLY, _SETTLED = 3, 24  # steps; RAdam takes plain momentum steps at first
_CONSTANT = 200
_WALK = 400  # several times as long as the memory of usual momentum
_SMALL = (48, 32)
_OTHER_SHAPES = ((16, 96), (64, 96))


@dataclass
class Stepping:
    """How the steps of an optimizer lengthen a weight whose gradients are random and independent.

    After N steps at learning rate η the squared norm has grown by η²·D·N, with the diffusivity D. For steps
    that grow with the gradient, D is for gradients of norm 1.

    Attributes:
        grows_with_gradient: Whether a gradient k times as large makes steps k times as large.
        buffers: {name: exponent}: the optimizer's buffers of the weight's shape, and how they scale when the
            weight is scaled by s and its gradient by 1/s. None where a buffer does not scale by a power.
        per_element: D over the number of elements, where that is the same for every shape; else NaN.
    """

    grows_with_gradient: bool
    buffers: dict[str, float] | None
    per_element: float
    _measure: Callable[[tuple[int, ...], torch.device], float | None] = field(repr=False)
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    def diffusivity(self, shape: Sequence[int], device: torch.device | None = None) -> float:
        """Return D for a parameter of this shape (for steps that grow with the gradient: D as it is)."""
        if self.grows_with_gradient:
            return self.per_element
        if not math.isnan(self.per_element):
            return self.per_element * math.prod(shape)
        key = tuple(shape)
        if key not in self._known:
            measured = self._measure(key, device or torch.device("cpu"))
            self._known[key] = math.nan if measured is None else measured
        return self._known[key]


def stepping_of(optimizer: Optimizer, group: int = 0) -> Stepping | str:
    """Measure how the steps of an optimizer lengthen a weight.

    Args:
        optimizer: The optimizer; it is not changed.
        group: The index of the param_group whose settings are used.

    Returns:
        A string with the reason where no norm is in balance with such steps, or where they cannot be
        measured.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> found = stepping_of(torch.optim.SGD([weight], momentum=0.5))
        >>> found.grows_with_gradient, round(found.per_element / 4, 1)  # 1/(1 − μ)² = 4
        (True, 1.0)
    """
    return _stepping_of(optimizer, group)


@once_per_recipe
def _stepping_of(recipe: Recipe) -> Stepping | str:
    name = recipe.kind.__name__
    usual = _step_length(recipe, _SMALL)
    strong = _step_length(recipe, _SMALL, gradient=1000.0)
    light = _step_length(recipe, _SMALL, weight=0.01)
    if not usual or not strong or not light:
        return f"the steps of {name} could not be measured"
    if not (0.2 < strong / usual < 5 or 500 < strong / usual < 2000):
        return f"the steps of {name} grow with the gradient in some other way than in proportion"
    if not 0.5 < light / usual < 2:
        return (
            f"the steps of {name} grow with the norm of the weights, so the norm does not set the effective "
            "learning rate"
        )
    steady = _constant_steps(recipe)
    if steady is None or max(steady) > 1.5 * min(steady):
        return f"{name} changes its own step size as training goes on, so Σlr does not measure its time"
    growth = _growth(recipe)
    if growth is None:
        return f"the steps of {name} could not be measured"
    numel, buffers = math.prod(_SMALL), _exponents(recipe)
    if strong > 5 * usual:
        return Stepping(True, buffers, growth / numel, lambda *_: None)
    others = [(_step_length(recipe, shape), math.prod(shape)) for shape in _OTHER_SHAPES]
    alike = all(own and 0.8 < own / usual * (numel / size) ** 0.5 < 1.25 for own, size in others)
    first = _step_length(recipe, _SMALL, _EARLY)

    def measure(shape: tuple[int, ...], device: torch.device) -> float | None:
        # how steps add up does not depend on the shape, only how long they are
        own = _step_length(recipe, shape, _EARLY, device=device)
        return None if own is None or not first else growth * (own / first) ** 2

    return Stepping(False, buffers, growth / numel if alike else math.nan, measure)


def textbook_stepping(group: Mapping[str, Any], kind: str) -> Stepping:
    """Return what theory says of plain SGD with momentum (kind "sgd") or of Adam (kind "adam").

    Args:
        group: The param_group, which may hold "momentum".
        kind: "sgd" or "adam".

    Raises:
        ValueError: ``kind`` is not known.
    """
    if kind == "sgd":
        return Stepping(True, None, 1 / (1 - float(group.get("momentum") or 0.0)) ** 2, lambda *_: None)
    if kind == "adam":
        return Stepping(False, None, 1.0, lambda *_: None)
    raise ValueError(f"kind={kind!r} is not known: choose from 'sgd', 'adam'")


def _growth(recipe: Recipe) -> float | None:
    """Return the growth of ‖w‖² per step and lr² under random gradients, after the first steps."""
    distances: list[float] = []
    start = torch.randn(_SMALL, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def step(probe: Optimizer, param: Tensor, number: int) -> None:
        param.grad = torch.randn(_SMALL, generator=generator)
        probe.step()
        if number + 1 in (_WALK // 2, _WALK):
            distances.append(float((param.detach() - start).double().square().sum()))

    if not recipe.train(start, _WALK, step):
        return None
    growth = (distances[1] - distances[0]) / (_WALK / 2 * PROBE_LR**2)
    return growth if math.isfinite(growth) and growth > 0 else None


def _step_length(
    recipe: Recipe,
    shape: tuple[int, ...],
    number: int = _SETTLED,
    *,
    gradient: float = 1.0,
    weight: float = 1.0,
    device: torch.device | None = None,
) -> float | None:
    """Return the length of the step with this number under random gradients."""
    lengths: list[float] = []
    generator = torch.Generator().manual_seed(2)
    start = weight * torch.randn(shape, generator=generator).to(device)

    def step(probe: Optimizer, param: Tensor, _: int) -> None:
        before = param.detach().clone()
        param.grad = gradient * torch.randn(shape, generator=generator).to(device)
        probe.step()
        lengths.append(float((param.detach() - before).norm()))

    return lengths[-1] if recipe.train(start, number, step) else None


def _constant_steps(recipe: Recipe) -> list[float] | None:
    """Return the lengths of a middle and of the last step under a constant gradient."""
    lengths: list[float] = []
    gradient = torch.randn(_SMALL, generator=torch.Generator().manual_seed(3))

    def step(probe: Optimizer, param: Tensor, number: int) -> None:
        before = param.detach().clone()
        param.grad = gradient.clone()
        probe.step()
        if number + 1 in (_CONSTANT // 4, _CONSTANT):
            lengths.append(float((param.detach() - before).norm()))

    start = torch.randn(_SMALL, generator=torch.Generator().manual_seed(0))
    return lengths if recipe.train(start, _CONSTANT, step) else None


def _exponents(recipe: Recipe) -> dict[str, float] | None:
    """Return how the buffers scale when a weight is scaled by 8 and its gradients by 1/8."""
    kept: list[dict[str, Tensor]] = []
    for scale in (1.0, 8.0):
        start = scale * torch.randn(_SMALL, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)

        def step(probe: Optimizer, param: Tensor, number: int, scale: float = scale) -> None:
            param.grad = torch.randn(_SMALL, generator=generator) / scale  # noqa: B023
            probe.step()
            if number == 2:
                state = probe.state.get(param, {})
                kept.append({k: v.detach().clone() for k, v in state.items() if _is_buffer(v)})

        if not recipe.train(start, 3, step):
            return None
    exponents: dict[str, float] = {}
    for name, value in kept[0].items():
        ratio = (kept[1][name] / value).flatten().double().nanmedian()
        exponent = round(math.log(float(ratio), 8)) if ratio > 0 else 0
        if not torch.allclose(kept[1][name], value * 8.0**exponent, rtol=1e-3, atol=0):
            return None
        exponents[name] = float(exponent)
    return exponents


def _is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == _SMALL
