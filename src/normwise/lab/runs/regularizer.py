"""The regulariser ½λ‖W′‖² on normalised weights W′: its value, its gradient and its effect on training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.lab.engine.run import Log, Metrics
from normwise.lab.models.convnet import directions
from normwise.lab.runs.base import ImageRun
from normwise.lab.runs.images import Images, batches
from normwise.monitor.motion import angles
from normwise.norms import slice_norms

__all__ = ["SCALES", "RegularizerRun"]

SCALES = tuple(10.0**k for k in range(-30, 31, 10))
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class RegularizerRun(ImageRun):
    """Measure the regulariser on the initial weights, and train with it.

    Attributes:
        strength: λ.
        length: Number of steps of each training.
    """

    strength: float = 1.0
    length: int = 150

    @property
    def steps(self) -> int:
        """Number of steps of a training."""
        return self.length

    @property
    def cost(self) -> float:
        """Rough number of seconds, for four trainings in float64."""
        return 1 + 4 * 8e-3 * self.length

    def run(self, log: Log) -> Metrics:
        """Measure ½‖W′‖² and its gradient at many scales, then train with it, without it, and with L2 on W.

        Args:
            log: Called for each step with the largest angle (radians) to the run without a regulariser.

        Returns:
            The summary. ``static``: by type and norm of the units, the largest deviation of a unit's ½‖W′‖²
            from its constant and the largest ‖∂/∂w ½‖W′‖²‖·‖w‖, both relative to ‖W′‖² and in epsilons of the
            type; and the fraction of the gradient's elements that are exactly zero. ``angles``: the largest
            angle to the run without a regulariser, for the run with it, for a *twin* without it from a start
            that differs in one weight by one unit in the last place, and for a run with L2 of the same λ on
            W.
        """
        images = Images(self)
        static = {
            str(dtype).removeprefix("torch."): {
                f"{scale:g}": self._static(images.classes, dtype, scale) for scale in SCALES
            }
            for dtype in DTYPES
        }
        plain = self._trained(images)
        others = {
            "regularized": self._trained(images, penalty="normalized"),
            "twin": self._trained(images, ulp=True),
            "L2": self._trained(images, penalty="weights"),
        }
        largest = {name: _largest_angles(plain, other) for name, other in others.items()}
        for step in range(self.steps):
            log({"step": step + 1, **{name: float(angle[step]) for name, angle in largest.items()}})
        maxima = {name: float(angle.max()) for name, angle in largest.items()}
        return {"status": "finished", "step": self.steps, "static": static, "angles": maxima}

    def _normalized(self, weight: Tensor) -> Tensor:
        """Return W′ of rows (units, elements)."""
        function: Callable[[Tensor], Tensor] = getattr(nw.functional, self.member)
        return function(weight)

    def _static(self, classes: int, dtype: torch.dtype, scale: float) -> dict[str, float]:
        value = gradient = 0.0
        zeros = elements = 0
        epsilon = torch.finfo(dtype).eps
        for original in directions(self.build(classes)).values():
            weight = original.detach().flatten(1).to(dtype)
            weight = (weight * (scale / slice_norms(weight).to(dtype).view(-1, 1))).requires_grad_()
            # sum in float64, so that only the rounding of W′ itself is measured
            squares = self._normalized(weight).double().square().sum(1)
            (grad,) = torch.autograd.grad(0.5 * squares.sum(), weight)
            constant = weight.shape[1] if self.member == "weight_standardization" else 1
            norms = slice_norms(weight.detach()).double().flatten()
            value = max(value, float((squares.detach() / constant - 1).abs().max()) / epsilon)
            pull = slice_norms(grad).double().flatten() * norms / constant
            gradient = max(gradient, float(pull.max()) / epsilon)
            zeros += int((grad == 0).sum())
            elements += grad.numel()
        return {"value": value, "gradient": gradient, "exactly_zero": zeros / elements}

    def _trained(self, images: Images, penalty: str | None = None, ulp: bool = False) -> list[Tensor]:
        """Train in float64; return by layer the directions after each step, (steps, units, elements)."""
        model = self.build(images.classes).double()
        weights = list(directions(model).values())
        if ulp:
            with torch.no_grad():
                first = weights[0].view(-1)[:1]
                first.copy_(torch.nextafter(first, torch.full_like(first, math.inf)))
        optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum)
        path = [torch.empty(self.steps, *w.detach().flatten(1).shape, dtype=w.dtype) for w in weights]
        for step, (x, y) in enumerate(batches(self, images, torch.float64)):
            optimizer.param_groups[0]["lr"] = self.lr_at(step)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            for weight in weights:
                if penalty == "normalized":
                    normalized = self._normalized(weight.flatten(1))
                    loss = loss + self.strength / 2 * normalized.square().sum()
                elif penalty == "weights":
                    loss = loss + self.strength / 2 * weight.square().sum()
            loss.backward()
            optimizer.step()
            for layer, weight in zip(path, weights, strict=True):
                layer[step] = nw.functional.weight_norm(weight.detach().flatten(1))
        return path


def _largest_angles(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Return the largest angle between the units of two runs after each step."""
    layers = [angles(a, b).amax(1) for a, b in zip(one, other, strict=True)]
    return torch.stack(layers).amax(0)
