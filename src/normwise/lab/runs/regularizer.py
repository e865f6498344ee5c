"""What the regulariser ½λ‖W′‖² on normalised weights W′ amounts to: its value, its gradient, its effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.data.images import Images, batches
from normwise.lab.models.convnet import directions
from normwise.lab.runs.image_setup import build
from normwise.lab.runs.settings import ImageSettings
from normwise.norms import slice_norms

__all__ = ["SCALES", "RegularizerSettings", "measure"]

SCALES = tuple(10.0**k for k in range(-30, 31, 10))
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class RegularizerSettings(ImageSettings):
    """Measure the regulariser on the weights of the network, and train with it.

    Attributes:
        strength: λ.
        length: Number of steps of each training run.
    """

    kind: ClassVar[str] = "regularizer"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.regularizer:measure"

    strength: float = 1.0
    length: int = 150

    @property
    def steps(self) -> int:
        """Number of steps of a training run."""
        return self.length

    @property
    def cost(self) -> float:
        """Seconds, roughly: four runs in float64."""
        return 1 + 4 * 8e-3 * self.length


def measure(settings: RegularizerSettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure ½‖W′‖² and its gradient at many scales, then train with it, without it, and with L2 on W.

    Args:
        settings: The network and the runs.
        log: Is called for each step with the largest angle (radians) to the run without a regulariser.

    Returns:
        The summary. ``static``: by type and norm of the units, the largest deviation of ½‖W′‖² of a unit from
        its constant and the largest ‖∂/∂w ½‖W′‖²‖·‖w‖ of a unit, both relative to ‖W′‖² and in units of the
        type's epsilon; and the share of the gradient's elements that are exactly zero. ``angles``: the
        largest angle to the run without a regulariser, of the run with it, of a *twin* without it from a
        start that differs in one weight by one unit in the last place, and of a run with L2 of the same λ
        on W.
    """
    images = Images(settings)
    static = {
        str(dtype).removeprefix("torch."): {
            f"{scale:g}": _static(settings, images.classes, dtype, scale) for scale in SCALES
        }
        for dtype in DTYPES
    }
    plain = _course(settings, images)
    others = {
        "regularized": _course(settings, images, penalty="normalized"),
        "twin": _course(settings, images, ulp=True),
        "L2": _course(settings, images, penalty="weights"),
    }
    angles = {name: _angles(plain, other) for name, other in others.items()}
    for step in range(settings.steps):
        log({"step": step + 1, **{name: float(angle[step]) for name, angle in angles.items()}})
    largest = {name: float(angle.max()) for name, angle in angles.items()}
    return {"status": "finished", "step": settings.steps, "static": static, "angles": largest}


def _normalized(member: str, weight: Tensor) -> Tensor:
    """Return W′ of rows (units, elements)."""
    function: Callable[[Tensor], Tensor] = getattr(nw.functional, member)
    return function(weight)


def _static(
    settings: RegularizerSettings, classes: int, dtype: torch.dtype, scale: float
) -> dict[str, float]:
    value = gradient = 0.0
    zeros = elements = 0
    epsilon = torch.finfo(dtype).eps
    for original in directions(build(settings, classes)).values():
        weight = original.detach().flatten(1).to(dtype)
        weight = (weight * (scale / slice_norms(weight).to(dtype).view(-1, 1))).requires_grad_()
        # float64 for what comes after W′: it is W′ that is looked at
        squares = _normalized(settings.member, weight).double().square().sum(1)
        (found,) = torch.autograd.grad(0.5 * squares.sum(), weight)
        constant = weight.shape[1] if settings.member == "weight_standardization" else 1
        norms = slice_norms(weight.detach()).double().flatten()
        value = max(value, float((squares.detach() / constant - 1).abs().max()) / epsilon)
        pull = slice_norms(found).double().flatten() * norms / constant
        gradient = max(gradient, float(pull.max()) / epsilon)
        zeros += int((found == 0).sum())
        elements += found.numel()
    return {"value": value, "gradient": gradient, "exactly_zero": zeros / elements}


def _course(
    settings: RegularizerSettings, images: Images, penalty: str | None = None, ulp: bool = False
) -> list[Tensor]:
    """Train in float64; return the directions of all units, layer by layer, after each step."""
    model = build(settings, images.classes).double()
    weights = list(directions(model).values())
    if ulp:
        with torch.no_grad():
            first = weights[0].view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, math.inf)))
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum)
    turns = [torch.empty(settings.steps, *w.detach().flatten(1).shape, dtype=w.dtype) for w in weights]
    for step, (x, y) in enumerate(batches(settings, images, torch.float64)):
        optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        for weight in weights:
            if penalty == "normalized":
                normalized = _normalized(settings.member, weight.flatten(1))
                loss = loss + settings.strength / 2 * normalized.square().sum()
            elif penalty == "weights":
                loss = loss + settings.strength / 2 * weight.square().sum()
        loss.backward()
        optimizer.step()
        for room, weight in zip(turns, weights, strict=True):
            room[step] = nw.functional.weight_norm(weight.detach().flatten(1))
    return turns


def _angles(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Return the largest angle between the units of two runs after each step."""
    chords = [(a - b).norm(dim=2).amax(1) for a, b in zip(one, other, strict=True)]
    return 2 * torch.asin((torch.stack(chords).amax(0) / 2).clamp(max=1))
