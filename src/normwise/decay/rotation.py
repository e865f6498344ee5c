"""The sphere with the update scaled too, so that every unit turns by the same angle in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.units import Unit

__all__ = ["turned"]


def turned(unit: Unit, before: list[Tensor], norms: Tensor, angle: float | Tensor) -> list[Tensor]:
    """Return the tensors of a Unit turned by an angle towards where a step has moved them.

    With ŵ the direction before the step and û⊥ that of the tangential part of the update, the unit becomes
    n·(cos(angle)·ŵ + sin(angle)·û⊥). Sources: Sphere(rotate=True).

    Args:
        unit: The unit, after the step.
        before: Its tensors as they were before the step; they are written over.
        norms: n, the norm that each unit is given, of shape (count,).
        angle: In radians.

    Returns:
        Tensors of the shapes and types of ``before``. A unit whose update has no tangential part beyond
        rounding keeps its direction; one that had no direction is left as the step made it.

    Example:
        >>> before, after = torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 0.5]])
        >>> turned(Unit(after), [before], torch.tensor([2.0]), torch.pi / 6)
        [tensor([[1.7321, 1.0000]])]
    """
    lengths = Unit(before, unit.dim).norms()
    rays, tangents, along = [], [], torch.zeros_like(lengths)
    for param, start in zip(unit.params, before, strict=True):
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        update = param.detach() - start
        ray = start.div_(unit.broadcast(lengths.masked_fill(~(lengths > 0), 1.0).to(start), start))
        along += _sums(ray * update, unit)
        rays.append(ray)
        tangents.append(update)
    steps = Unit(tangents, unit.dim).norms()
    for ray, tangent in zip(rays, tangents, strict=True):
        tangent.addcmul_(ray, unit.broadcast(along.to(ray), ray), value=-1)
    arcs = Unit(tangents, unit.dim).norms()
    rounding = 4 * max(torch.finfo(param.dtype).eps for param in unit.params)
    turns = arcs > rounding * torch.maximum(lengths, steps)  # what is shorter has no direction to trust
    full = angle.to(arcs).expand_as(arcs) if isinstance(angle, Tensor) else torch.full_like(arcs, angle)
    cosine, sine = full.cos().masked_fill(~turns, 1.0), full.sin().masked_fill(~turns, 0.0)
    had_direction = (lengths > 0) & lengths.isfinite() & arcs.isfinite()
    results = []
    for param, ray, tangent in zip(unit.params, rays, tangents, strict=True):
        ray.mul_(unit.broadcast((norms * cosine).to(ray), ray))
        ray.addcmul_(tangent, unit.broadcast((norms * sine / arcs.masked_fill(~turns, 1.0)).to(ray), ray))
        results.append(torch.where(unit.broadcast(had_direction, ray), ray.to(param.dtype), param.detach()))
    return results


def _sums(values: Tensor, unit: Unit) -> Tensor:
    reduced = [k for k in range(values.ndim) if k != unit.dim]
    return (values.sum(reduced) if reduced else values).reshape(-1)
