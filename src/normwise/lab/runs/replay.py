"""A decayed run, and the undecayed run that turns every unit in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normwise.lab.data.images import Images
from normwise.lab.models.convnet import ConvNet
from normwise.lab.runs.courses import Course, decayed_course, undecayed_course
from normwise.lab.runs.settings import ReplaySettings

__all__ = ["replay"]


def replay(settings: ReplaySettings, log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compare a decayed run in float64 with three others, unit by unit and step by step.

    The others are the *replay*, without decay, with the steps of :func:`normwise.theory.without_decay`;
    the *naive* run, without decay, with the learning rates of the decayed run; and the *twin*, with decay,
    from a start in which one weight differs by one unit in the last place: it shows how far rounding alone
    would carry the runs apart.

    Args:
        settings: The decayed run.
        log: Is called for each step with the largest angle (radians) between the units of the decayed run
            and those of each other run, the decayed run's median norm, and its learning rate.

    Returns:
        The summary: the largest angles over all steps, and how many test images the final models classify
        differently.
    """
    images = Images(settings)
    decayed = decayed_course(settings, images)
    others = {
        "replay": undecayed_course(settings, images, decayed.norms),
        "naive": decayed_course(replace(settings, rule=None), images),
        "twin": decayed_course(settings, images, ulp=True),
    }
    angles = {name: _angles(decayed, other) for name, other in others.items()}
    for step in range(settings.steps):
        norm = torch.cat([norms[step] for norms in decayed.norms.values()]).median()
        line = {name: float(angle[step]) for name, angle in angles.items()}
        log({"step": step + 1, "norm": float(norm), "lr": settings.lr_at(step), **line})
    expected = _logits(decayed.model, images.test)
    summary: dict[str, Any] = {"status": "finished", "step": settings.steps, "test_images": len(expected)}
    for name, other in others.items():
        logits = _logits(other.model, images.test)
        summary[name] = {
            "largest_angle": float(angles[name].max()),
            "predictions_that_differ": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "largest_logit_difference": float((logits - expected).abs().max()),
        }
    first, last = (torch.cat([norms[k] for norms in decayed.norms.values()]) for k in (0, -1))
    summary["norm_change"] = float((last / first).median())
    return summary


def _angles(one: Course, other: Course) -> Tensor:
    """The largest angle between the units of two runs after each step."""
    largest = []
    for name in one.turns:
        difference = one.turns[name] - other.turns[name]
        # half of the chord is the sine of half of the angle: exact for small angles, as a cosine is not
        largest.append(2 * torch.asin((difference.norm(dim=2) / 2).clamp(max=1)).amax(1))
    return torch.stack(largest).amax(0)


@torch.no_grad()
def _logits(model: ConvNet, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(x.double()) for x in images.split(1000)])
