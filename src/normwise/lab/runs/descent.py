"""The whole objective, loss plus penalty: along rays of the weights, and under monotone descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from normwise.lab.data.images import Images
from normwise.lab.models.convnet import directions
from normwise.lab.runs.image_setup import build
from normwise.lab.runs.settings import ImageSettings, rule_from
from normwise.norms import slice_norms

__all__ = ["DescentSettings", "descend"]

ARMIJO = 1e-4  # the share of the predicted decrease that a step must reach


@dataclass(frozen=True, kw_only=True)
class DescentSettings(ImageSettings):
    """Minimise loss plus penalty on all training images at once, in float64, by steps that never climb.

    Attributes:
        length: Number of steps.
        rest: Coefficient of a plain L2 penalty on all that is no direction (gains, biases, head), so that
            the optimum in these is finite.
        scales: Of the directions, at which the objective is looked at along their rays.
    """

    kind: ClassVar[str] = "descent"
    carried_out_by: ClassVar[str] = "normwise.lab.runs.descent:descend"

    length: int = 600
    rest: float = 1e-3
    scales: tuple[float, ...] = (1.0,)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.length

    @property
    def cost(self) -> float:
        """Seconds, roughly."""
        return 1 + 1e-2 * self.length


def descend(settings: DescentSettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Look at the objective along the rays of the initial weights, then go down by gradient descent.

    Each step is along the negative gradient, doubled after a step that went well and halved until the
    objective falls by Armijo's condition.

    Args:
        settings: What to do. The rule's penalty is on the directions.
        log: Is called some 60 times with the objective, the loss, the median norm and the step size.

    Returns:
        The summary: ``ray`` (for each scale the loss, the objective and the norm of the loss's gradient with
        respect to the directions), and the median norm of the units ``at_half`` and at the ``end``.
    """
    images = Images(settings)
    x, y = images.train.double(), images.train_labels
    model = build(settings, images.classes).double()
    weights = list(directions(model).values())
    own = {id(weight) for weight in weights}
    params = list(model.parameters())
    others = [param for param in params if id(param) not in own]
    rule = rule_from(settings.rule)

    def loss() -> Tensor:
        return cross_entropy(model(x), y)

    def penalty() -> Tensor:
        total = settings.rest / 2 * sum((p.square().sum() for p in others), torch.zeros(()))
        if rule is not None:
            for weight in weights:
                norms = weight.flatten(1).norm(dim=1)
                total = total + rule.penalty(norms).sum()
        return total

    ray = _along_rays(settings, weights, loss, penalty)
    step_size = 1e-3
    at_half = float("nan")
    current = loss() + penalty()
    for step in range(1, settings.length + 1):
        gradients = torch.autograd.grad(current, params)
        slope = float(sum(g.square().sum() for g in gradients))
        start = [param.detach().clone() for param in params]
        step_size *= 2
        while True:
            with torch.no_grad():
                for param, origin, gradient in zip(params, start, gradients, strict=True):
                    param.copy_(origin - step_size * gradient)
            reached = loss() + penalty()
            if reached.item() <= current.item() - ARMIJO * step_size * slope or step_size < 1e-300:
                break
            step_size /= 2
        current = reached
        if step == settings.length // 2:
            at_half = _median_norm(weights)
        if step % max(1, settings.length // 60) == 0:
            log(
                {
                    "step": step,
                    "objective": current.item(),
                    "loss": loss().item(),
                    "norm": _median_norm(weights),
                    "step_size": step_size,
                }
            )
    return {
        "status": "finished",
        "step": settings.length,
        "ray": ray,
        "at_half": at_half,
        "end": _median_norm(weights),
        "objective": current.item(),
    }


def _along_rays(
    settings: DescentSettings,
    weights: list[torch.nn.Parameter],
    loss: Callable[[], Tensor],
    penalty: Callable[[], Tensor],
) -> list[dict[str, float]]:
    """Measure with all directions at each scale, and put them back."""
    start = [weight.detach().clone() for weight in weights]
    found = []
    for scale in settings.scales:
        with torch.no_grad():
            for weight, origin in zip(weights, start, strict=True):
                weight.copy_(scale * origin)
        value = loss()
        gradients = torch.autograd.grad(value, weights)
        slope = float(sum(g.square().sum() for g in gradients)) ** 0.5
        found.append(
            {
                "scale": scale,
                "loss": value.item(),
                "objective": (value + penalty()).item(),
                "gradient": slope,
            }
        )
    with torch.no_grad():
        for weight, origin in zip(weights, start, strict=True):
            weight.copy_(origin)
    return found


def _median_norm(weights: list[torch.nn.Parameter]) -> float:
    return float(torch.cat([slice_norms(weight.detach()).flatten() for weight in weights]).median())
