"""From rows of sums to a verdict for each parameter, before it is confirmed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.blocks import invariant_blocks, residual
from normwise.invariance.elasticity import Array, Row
from normwise.invariance.result import Evidence
from normwise.invariance.thresholds import Thresholds

__all__ = ["Draft", "Rows", "draft_verdicts"]


_FALLS = 1e-3  # the part of a residual that is left when eps shrinks, if it was due to it
_LIT = 100.0  # a gradient this many times larger at the model's eps is due to it


class _Is(IntEnum):
    """What a residual says."""

    UNSEEN = 0
    INVARIANT = 1
    UNCLEAR = 2
    NOT = 3


@dataclass
class Rows:
    """The rows behind the verdicts.

    Attributes:
        small: With shrunk eps.
        real: With the model's eps.
        twins: Those of ``small`` that differ from ``real`` in nothing but the eps.
    """

    small: list[Row] = field(default_factory=list)
    real: list[Row] = field(default_factory=list)
    twins: list[Row] = field(default_factory=list)


@dataclass
class Draft:
    """Evidence for every parameter, and what only replacing values can decide.

    Attributes:
        evidence: One per parameter; the verdict is empty where it is not decided yet.
        masks: {parameter: mask of invariant units} of the partly invariant.
        silent: Parameters without a visible gradient: no effect, an effect of their signs alone, or dead.
        unreached: Those of them to which no gradient arrived at all.
        lit: Those of them whose gradient shows at the model's own eps: their size is removed but for it.
    """

    evidence: list[Evidence]
    masks: dict[int, Tensor] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    unreached: set[int] = field(default_factory=set)
    lit: set[int] = field(default_factory=set)


def draft_verdicts(shapes: list[torch.Size], rows: Rows, strays: dict[int, str], at: Thresholds) -> Draft:
    """Return a draft for each parameter.

    Args:
        shapes: The shape of each parameter.
        rows: The rows, with the sums over units.
        strays: {parameter: reason} of those that cannot be probed.
        at: The thresholds.
    """
    squares = np.stack([row.squares for row in rows.small])
    loudest = np.sqrt(squares.max(axis=1, keepdims=True))
    loud = (np.sqrt(squares) > at.silent * loudest).any(axis=0)
    draft = Draft([])
    size, size_real = (np.sqrt(np.max([r.squares for r in of], axis=0)) for of in (rows.twins, rows.real))
    lit = size_real > _LIT * size
    for k, shape in enumerate(shapes):
        if k in strays:
            draft.evidence.append(Evidence("undetermined", reason=strays[k]))
        elif 0 in shape:
            draft.evidence.append(Evidence("undetermined", reason="it has no elements"))
        elif not loud[k]:
            draft.evidence.append(Evidence(""))
            draft.silent.append(k)
            if lit[k]:
                draft.lit.add(k)
            if not any(row.reached[k] for row in rows.small):
                draft.unreached.add(k)
        else:
            draft.evidence.append(_judge(k, shape, rows, at, draft))
    return draft


def _judge(k: int, shape: torch.Size, rows: Rows, at: Thresholds, draft: Draft) -> Evidence:
    """Return the evidence of a parameter that has a gradient."""
    total = _Sums.of(k, None, rows)
    overall = int(total.read(at)[0])
    whole, whole_real = float(residual(*total.small)[0]), float(residual(*total.real)[0])
    evidence = Evidence("not invariant", residual=whole, residual_real_eps=whole_real)
    evidence.shift_dim, evidence.shift_residual = _shift(k, shape, rows.small, at)
    dims = [d for d in range(min(2, len(shape))) if d == 0 or shape[d] > 1]
    sums = {d: _Sums.of(k, d, rows) for d in dims}
    readings = {d: sums[d].read(at) for d in dims}
    for d, codes in readings.items():
        seen = codes != _Is.UNSEEN
        if seen.any() and (codes[seen] == _Is.INVARIANT).all():
            evidence.dim, evidence.units = d, len(codes)
            evidence.invariant_units, evidence.unseen_units = int(seen.sum()), int((~seen).sum())
            evidence.residual = float(residual(*sums[d].small)[seen].max())
            evidence.residual_real_eps = float(residual(*sums[d].real)[seen].max())
            return _invariant(evidence, "scale-invariant", at)
    if overall == _Is.INVARIANT:
        for d in dims:
            blocks = sums[d].blocks(at)
            if len(blocks) > 1 and not evidence.blocks:
                evidence.blocks, evidence.units = blocks, shape[d]
        evidence.invariant_units = evidence.units
        return _invariant(evidence, "scale-invariant", at)
    for d in dims:
        if _partial(k, d, readings[d], sums[d], at, evidence, draft):
            return _invariant(evidence, "partly scale-invariant", at)
    unclear = [d for d in dims if not (readings[d] == _Is.NOT).any()]
    if overall != _Is.NOT or unclear:
        evidence.verdict = "undetermined"
        evidence.reason = (
            f"too noisy: residual {whole:.1e}, {whole_real:.1e} at the model's eps; "
            f"zero is up to {at.invariant:.0e}, and {at.honest:.0e} is not"
        )
    return evidence


def _invariant(evidence: Evidence, verdict: str, at: Thresholds) -> Evidence:
    up_to_eps = evidence.residual_real_eps > max(at.invariant, 2 * evidence.residual)
    evidence.verdict = f"{verdict} up to eps" if up_to_eps and verdict == "scale-invariant" else verdict
    if up_to_eps:
        evidence.reason = f"residual {evidence.residual_real_eps:.1e} at the model's eps"
    return evidence


Pair = tuple[Array, Array]


@dataclass
class _Sums:
    """Σ wg and Σ (wg)² of each unit, rows × units, at shrunk eps, its twins, and at the model's eps."""

    small: Pair
    twins: Pair
    real: Pair

    @staticmethod
    def of(k: int, d: int | None, rows: Rows) -> _Sums:
        """Return the sums of parameter ``k`` over the units of ``d``, in the rows that reach it."""
        small, twins, real = (
            _stacked(k, d, [r for r in of if r.reached[k]]) for of in (rows.small, rows.twins, rows.real)
        )
        assert small is not None
        nothing = np.zeros((0, small[0].shape[1])), np.zeros((0, small[0].shape[1]))
        return _Sums(small, twins or nothing, real or nothing)

    def read(self, at: Thresholds) -> NDArray[np.int64]:
        """Return what the residuals of units say: invariant if zero, or if they fall with eps."""
        r, twin, real = residual(*self.small), residual(*self.twins), residual(*self.real)
        codes = np.full(len(r), _Is.UNCLEAR, dtype=np.int64)
        with np.errstate(invalid="ignore"):
            # A small sum that is honest stays as it is when eps shrinks by orders of magnitude.
            codes[r >= at.honest] = _Is.NOT
            codes[(r <= at.invariant) | ((r < at.honest) & (twin <= _FALLS * real))] = _Is.INVARIANT
        mass = self.small[1].sum(0)
        codes[~(mass > at.silent**2 * mass.max())] = _Is.UNSEEN
        return codes

    def blocks(self, at: Thresholds) -> list[tuple[int, int]]:
        """Return the ranges of units that are invariant together."""
        return invariant_blocks(*self.small, at.invariant, at.silent)


def _stacked(k: int, d: int | None, rows: list[Row]) -> Pair | None:
    if not rows:  # a random draw left the parameter out
        return None
    if d is None:
        return np.array([[r.elasticity[k]] for r in rows]), np.array([[r.squares[k]] for r in rows])
    found = [row.units[k, d] for row in rows]
    return np.stack([u.scale for u in found]), np.stack([u.scale_squares for u in found])


def _partial(
    k: int,
    d: int,
    codes: NDArray[np.int64],
    sums: _Sums,
    at: Thresholds,
    evidence: Evidence,
    draft: Draft,
) -> bool:
    """Enter the invariant rows or columns, alone or in blocks, if there are any beside others."""
    mask = codes == _Is.INVARIANT
    blocks = sums.blocks(at)
    for a, b in blocks:
        mask[a:b] = True
    if not mask.any() or mask.all():
        return False
    alone = codes == _Is.INVARIANT
    evidence.dim, evidence.units = d, len(mask)
    evidence.invariant_units, evidence.unseen_units = int(mask.sum()), int((codes == _Is.UNSEEN).sum())
    evidence.blocks = [(a, b) for a, b in blocks if not alone[a:b].all()]
    starts = blocks or [(int(i), int(i) + 1) for i in np.flatnonzero(alone)]
    for name, (scale, squares) in (("residual", sums.small), ("residual_real_eps", sums.real)):
        ranges = [
            float(residual(scale[:, a:b].sum(1, keepdims=True), squares[:, a:b].sum(1, keepdims=True))[0])
            for a, b in starts
        ]
        setattr(evidence, name, float(np.nanmax(ranges)))
    draft.masks[k] = torch.from_numpy(mask.copy())
    return True


def _shift(k: int, shape: torch.Size, rows: list[Row], at: Thresholds) -> tuple[int | None, float]:
    """Return the dimension whose units can be shifted, and the residual (above the threshold if none can)."""
    choices: list[tuple[int | None, Array]] = []
    for d in range(min(2, len(shape))):
        found = [row.units[k, d] for row in rows if row.reached[k]]
        sums, squares = np.stack([u.shift for u in found]), np.stack([u.shift_squares for u in found])
        mass = squares.sum(0)
        choices.insert(d, (d, residual(sums, squares)[mass > at.silent**2 * mass.max()]))
        if d == 0:
            choices.append((None, residual(sums.sum(1)[:, None], squares.sum(1)[:, None])))
    for dim, found_residuals in choices:
        if len(found_residuals) and found_residuals.max() <= at.invariant:
            return dim, float(found_residuals.max())
    largest = [float(r.max()) for _, r in choices if len(r)]
    return None, min(largest, default=float("nan"))
