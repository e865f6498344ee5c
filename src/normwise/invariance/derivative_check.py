"""Whether gradients are those of the outputs: straight-through estimators, for one, define others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from normwise.invariance.probe import Probe
from normwise.invariance.scale_gradients import Array, ScaleGradients, cotangents_at

__all__ = ["false_gradients"]

_STEP = 2.0**-12  # relative; the values may be stored in float32
_TOLERANCE = 1e-3  # of the norm of the terms, and of √Σ(wg)², as values are rounded to float32
_DECADES = 1.5  # gradients in one group are at most so many decades apart, so that each would show
_RESOLVED = 1e-7  # of the largest: differences of smaller gradients are rounding errors


def false_gradients(
    probe: Probe,
    points: Sequence[tuple[int, Sequence[ScaleGradients]]],
    candidates: Sequence[int],
    outputs_at: Callable[[int], list[Tensor]],
) -> list[int]:
    """Return the parameters with a Σwg at every point, but v·∂f(αw)/∂α = 0 by central differences.

    Parameters whose gradients are about as large move together, each with a random sign; bisection finds
    those that disagree. Rounding, binary weights and hard samples with straight-through estimators have such
    gradients. Gradients that are too small for differences count as true.

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

    def disagreeing(self, candidates: Sequence[int]) -> list[int]:
        """Return the candidates whose sums are no zeros, but those of the differences are, by bisection."""
        found: list[int] = []
        least = _RESOLVED * self._sizes.max(initial=0.0)
        waiting = self._groups([k for k in candidates if self._sizes[k] > least])
        while waiting:
            together = waiting.pop()
            signs = self._signs[together]
            expected = self._sums[:, together] @ signs
            size = np.linalg.norm(self._sizes[together])
            slope = self._slope(together, signs)
            if np.linalg.norm(slope - expected) <= _TOLERANCE * size:
                continue
            if len(together) == 1:
                found += together if np.linalg.norm(slope) <= _TOLERANCE * size else []
            else:
                middle = len(together) // 2
                waiting += [together[:middle], together[middle:]]
        return sorted(found)

    def _groups(self, candidates: Sequence[int]) -> list[list[int]]:
        """Return the candidates in groups of similar size."""
        groups: list[list[int]] = []
        for k in sorted(candidates, key=lambda k: float(self._sizes[k])):
            if groups and self._sizes[k] <= 10**_DECADES * self._sizes[groups[-1][0]]:
                groups[-1].append(k)
            else:
                groups.append([k])
        return groups

    def _slope(self, together: Sequence[int], signs: Array) -> Array:
        ahead, behind = (self._values(together, direction * signs) for direction in (1.0, -1.0))
        return (ahead - behind) / (2 * _STEP)

    def _values(self, together: Sequence[int], signs: Array) -> Array:
        """Return v·f for each cotangent, with the values of the parameters scaled by 1 ± the step."""
        try:
            with torch.no_grad():
                for k, sign in zip(together, signs, strict=True):
                    self._probe.parameters[k].mul_(1.0 + float(sign) * _STEP)
                outputs = self._probe.outputs(gradients=False)
            self._probe.release()
        finally:
            for k in together:
                self._probe.reset(k)
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
