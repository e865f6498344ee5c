"""The sphere with the update scaled too, so that every unit turns by the same angle in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.units import Unit, wide_dtype

__all__ = ["turned"]


def turned(unit: Unit, before: list[Tensor], norms: Tensor, angle: float | Tensor) -> list[Tensor]:
    """Return the tensors of a Unit turned by an angle towards where a step has moved them.

    With ŵ the direction before the step and û⊥ that of the tangential part of the update, the unit becomes
    n·(cos(angle)·ŵ + sin(angle)·û⊥). Sources: Sphere(rotate=True).

    Args:
        unit: The unit, after the step.
        before: Its tensors as they were before the step.
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
    wide = wide_dtype(before[0].device)
    starts = [one.to(wide) for one in before]
    lengths = Unit(starts, unit.dim).norms()
    rays = [_ratio(one, unit.broadcast(lengths, one)) for one in starts]
    updates = [param.detach().to(wide) - start for param, start in zip(unit.params, starts, strict=True)]
    along = torch.stack([_sums(ray * update, unit) for ray, update in zip(rays, updates, strict=True)]).sum(0)
    tangents = [u - unit.broadcast(along, u) * ray for u, ray in zip(updates, rays, strict=True)]
    arcs = Unit(tangents, unit.dim).norms()
    rounding = max(torch.finfo(one.dtype).eps for one in before)  # what is shorter has no direction to trust
    full = angle.to(arcs).expand_as(arcs) if isinstance(angle, Tensor) else torch.full_like(arcs, angle)
    angles = torch.where(arcs > rounding * lengths, full, torch.zeros_like(arcs))
    results = []
    for param, ray, tangent in zip(unit.params, rays, tangents, strict=True):
        cosine, sine = unit.broadcast(angles.cos(), ray), unit.broadcast(angles.sin(), ray)
        turned_ray = cosine * ray + sine * _ratio(tangent, unit.broadcast(arcs, ray))
        scaled = (unit.broadcast(norms.to(wide), ray) * turned_ray).to(param.dtype)
        had_direction = unit.broadcast((lengths > 0) & lengths.isfinite() & arcs.isfinite(), ray)
        results.append(torch.where(had_direction, scaled, param.detach()))
    return results


def _ratio(values: Tensor, norms: Tensor) -> Tensor:
    return values / torch.where(norms > 0, norms, torch.ones_like(norms))


def _sums(values: Tensor, unit: Unit) -> Tensor:
    reduced = [k for k in range(values.ndim) if k != unit.dim]
    return (values.sum(reduced) if reduced else values).reshape(-1)
