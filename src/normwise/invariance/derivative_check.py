"""Whether gradients are those of the outputs: straight-through estimators, for one, define others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from normwise.invariance.probe import Probe
from normwise.invariance.scale_gradients import Array, ScaleGradients, cotangents_at

__all__ = ["false_gradients"]

_STEPS = (2.0**-26, 2.0**-19, 2.0**-12)  # relative
_LARGE = 1e-2  # of the largest: groups of larger gradients begin with the smallest step
_TOLERANCE = 1e-3  # of the norm of the terms, and of √Σ(wg)²
_DECADES = 1.5  # gradients in one group are at most so many decades apart, so that each would show
_RESOLVED = 1e-7  # of the largest: differences of smaller gradients are rounding errors


def false_gradients(
    probe: Probe,
    points: Sequence[tuple[int, Sequence[ScaleGradients]]],
    candidates: Sequence[int],
    outputs_at: Callable[[int], list[Tensor]],
) -> list[int]:
    """Return the parameters whose Σwg is not zero although central differences say v·∂f(αw)/∂α = 0.

    Parameters whose gradients are about as large move together, each with a random sign; bisection finds
    those that disagree. Rounding, binary weights and hard samples with straight-through estimators have such
    gradients. A parameter must have a false gradient at every point. Gradients that are too small for
    differences count as true.

    Args:
        probe: The probe, in float64.
        points: (number of the point, its backward passes with shrunk eps), in the default mode.
        candidates: The parameters to check.
        outputs_at: Moves the probe to a point, and returns the outputs there.
    """
    suspects = list(candidates)
    for seed, rows in points:
        if not suspects:
            break
        suspects = _Differences(probe, seed, rows, outputs_at(seed)).disagreeing(suspects)
    return suspects


class _Differences:
    """Central differences of v·f at the point of the probe, for the cotangents of its backward passes."""

    def __init__(
        self, probe: Probe, seed: int, rows: Sequence[ScaleGradients], outputs: list[Tensor]
    ) -> None:
        self._probe = probe
        self._sums = np.stack([row.sums for row in rows])
        squares = np.mean([row.squares for row in rows if row.has_squares], axis=0)
        self._sizes = np.sqrt((self._sums**2).sum(0) + len(rows) * squares)
        self._signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=len(probe.parameters))
        self._cotangents = cotangents_at(outputs, seed, len(rows))
        self._known: dict[tuple[tuple[int, ...], float], tuple[float, float]] = {}

    def disagreeing(self, candidates: Sequence[int]) -> list[int]:
        """Return the candidates whose gradients are false at this point."""
        found: list[int] = []
        largest = self._sizes.max(initial=0.0)
        for group in self._groups([k for k in candidates if self._sizes[k] > _RESOLVED * largest]):
            # Kinks and curvature ask for small steps, rounding errors of faint gradients for large ones.
            large = self._sizes[group].max() > _LARGE * largest
            steps = _STEPS if large else _STEPS[::-1]
            residuals: dict[float, float] = {}
            for step in steps:
                residuals[step] = self._disagreement(group, step)[0]
                if residuals[step] <= _TOLERANCE:
                    break
            found += self._bisected(group, min(residuals, key=lambda step: residuals[step]))
        return sorted(found)

    def _bisected(self, group: list[int], step: float) -> list[int]:
        """Return the members of a group whose gradients are false: bisection finds them."""
        found: list[int] = []
        waiting = [group]
        while waiting:
            together = waiting.pop()
            residual, slope = self._disagreement(together, step)
            if residual <= _TOLERANCE:
                continue
            if len(together) == 1:
                found += together if slope <= _TOLERANCE else []
            else:
                middle = len(together) // 2
                waiting += [together[:middle], together[middle:]]
        return found

    def _disagreement(self, together: list[int], step: float) -> tuple[float, float]:
        """Return the difference between slope and gradient, and the slope, divided by the gradient's size."""
        key = tuple(together), step
        if key not in self._known:
            signs = self._signs[together]
            slope = self._slope(together, signs, step)
            size = np.linalg.norm(self._sizes[together])
            expected = self._sums[:, together] @ signs
            residual = np.linalg.norm(slope - expected)
            self._known[key] = float(residual / size), float(np.linalg.norm(slope) / size)
        return self._known[key]

    def _groups(self, candidates: Sequence[int]) -> list[list[int]]:
        """Return the candidates in groups of similar size."""
        groups: list[list[int]] = []
        for k in sorted(candidates, key=lambda k: float(self._sizes[k])):
            if groups and self._sizes[k] <= 10**_DECADES * self._sizes[groups[-1][0]]:
                groups[-1].append(k)
            else:
                groups.append([k])
        return groups

    def _slope(self, together: Sequence[int], signs: Array, step: float) -> Array:
        ahead, behind = (self._values(together, 1.0 + sign * step * signs) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * step)

    def _values(self, together: Sequence[int], factors: Array) -> Array:
        """Return v·f for each cotangent, with the parameters multiplied by factors."""
        with self._probe.scaled(dict(zip(together, factors.tolist(), strict=True))), torch.no_grad():
            outputs = self._probe.outputs(gradients=False)
        self._probe.release()
        if [t.shape for t in outputs] != [v.shape for v in self._cotangents[0]]:
            return np.full(len(self._cotangents), np.nan)
        return np.array(
            [
                sum(
                    float((v * t.nan_to_num(0.0, 0.0, 0.0)).sum())
                    for v, t in zip(vectors, outputs, strict=True)
                )
                for vectors in self._cotangents
            ]
        )
