"""The complete objective, loss plus penalty: along rays of the weights, and under monotone descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.convnet import directions
from normwise.lab.runs.base import ImageRun, rule_from
from normwise.lab.runs.images import Images
from normwise.norms import slice_norms

__all__ = ["DescentRun"]

ARMIJO = 1e-4  # a step must reach this fraction of the decrease that the gradient predicts


@dataclass(frozen=True, kw_only=True)
class DescentRun(ImageRun):
    """Minimise loss plus penalty on all training images at once, in float64, by steps that never increase it.

    Attributes:
        length: Number of steps.
        rest: Coefficient of a plain L2 penalty on everything that is not a direction (gains, biases, head).
            It makes the optimum of these parameters finite.
        scales: Scales of the directions at which to evaluate the objective along their rays.
    """

    length: int = 600
    rest: float = 1e-3
    scales: tuple[float, ...] = (1.0,)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.length

    @property
    def cost(self) -> float:
        """Rough number of seconds."""
        return 1 + 1e-2 * self.length

    def run(self, log: Log) -> Metrics:
        """Evaluate the objective along the rays of the initial weights, then minimise it by gradient descent.

        The step size doubles before each step and is then halved until the objective falls by Armijo's
        condition. The penalty of the rule acts on the directions.

        Args:
            log: Called about 60 times with the objective, the loss, the median norm and the step size.

        Returns:
            The summary: ``ray`` (for each scale the loss, the objective and the norm of the loss's gradient
                with
            respect to the directions), and the median norm of the units after half of the steps (``at_half``)
            and at the ``end``.
        """
        images = Images(self)
        x, y = images.train.double(), images.train_labels
        model = self.build(images.classes).double()
        weights = list(directions(model).values())
        ids = {id(weight) for weight in weights}
        params = list(model.parameters())
        others = [param for param in params if id(param) not in ids]
        rule = rule_from(self.rule)

        def loss() -> Tensor:
            return cross_entropy(model(x), y)

        def penalty() -> Tensor:
            total = self.rest / 2 * sum((p.square().sum() for p in others), torch.zeros(()))
            if rule is not None:
                for weight in weights:
                    total = total + rule.penalty(weight.flatten(1).norm(dim=1)).sum()
            return total

        ray = self._along_rays(weights, loss, penalty)
        step_size = 1e-3
        at_half = float("nan")
        current = loss() + penalty()
        for step in range(1, self.length + 1):
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
            if step == self.length // 2:
                at_half = _median_norm(weights)
            if step % max(1, self.length // 60) == 0:
                line = {"step": step, "objective": current.item(), "loss": loss().item()}
                log(line | {"norm": _median_norm(weights), "step_size": step_size})
        return {
            "status": "finished",
            "step": self.length,
            "ray": ray,
            "at_half": at_half,
            "end": _median_norm(weights),
            "objective": current.item(),
        }

    def _along_rays(
        self,
        weights: list[torch.nn.Parameter],
        loss: Callable[[], Tensor],
        penalty: Callable[[], Tensor],
    ) -> list[dict[str, float]]:
        """Evaluate the objective with all directions at each scale, then restore them."""
        start = [weight.detach().clone() for weight in weights]
        points = []
        for scale in self.scales:
            with torch.no_grad():
                for weight, origin in zip(weights, start, strict=True):
                    weight.copy_(scale * origin)
            value = loss()
            gradients = torch.autograd.grad(value, weights)
            slope = float(sum(g.square().sum() for g in gradients)) ** 0.5
            point = {"scale": scale, "loss": value.item(), "objective": (value + penalty()).item()}
            points.append(point | {"gradient": slope})
        with torch.no_grad():
            for weight, origin in zip(weights, start, strict=True):
                weight.copy_(origin)
        return points


def _median_norm(weights: list[torch.nn.Parameter]) -> float:
    return float(torch.cat([slice_norms(weight.detach()).flatten() for weight in weights]).median())
