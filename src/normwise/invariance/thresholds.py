"""The thresholds of the verdicts, fixed on the development networks of benchmarks/invariances.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

__all__ = ["Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """What counts as zero, for one floating-point type.

    Attributes:
        eps_factor: What every eps is multiplied by on the probe.
        invariant: Residuals up to this are zero.
        honest: Residuals from this on are not zero, if they do not fall with eps.
        silent: A parameter whose products wg are this small beside the largest of any parameter has no
            visible gradient; a unit, beside the largest of its parameter.
        unchanged: Relative changes of the outputs up to this are none, when parameters are rescaled.
        same: The same, when values that should have no effect are replaced.
        null: Singular values up to this, of unit-RMS columns, are zero.
    """

    eps_factor: float
    invariant: float
    honest: float
    silent: float
    unchanged: float
    same: float
    null: float

    @staticmethod
    def of(dtype: torch.dtype, tolerance: float | None = None) -> Thresholds:
        """Return the thresholds for ``dtype``, with ``tolerance`` as ``invariant`` if it is given.

        Example:
            >>> Thresholds.of(torch.float64, 1e-4).invariant
            0.0001
        """
        found = _DOUBLE if dtype == torch.float64 else _SINGLE
        if tolerance is None:
            return found
        return dataclasses.replace(found, invariant=tolerance, honest=max(found.honest, tolerance))


_DOUBLE = Thresholds(
    eps_factor=1e-12, invariant=1e-5, honest=1e-3, silent=1e-9, unchanged=1e-4, same=1e-7, null=1e-6
)
_SINGLE = Thresholds(
    eps_factor=1e-6, invariant=1e-3, honest=3e-2, silent=1e-5, unchanged=5e-3, same=1e-3, null=1e-4
)
