"""Find the invariances of any network: the stages, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.invariance.confirm import Judge, replace_values, scale_units, shift_units
from normwise.invariance.elasticity import Row, gather
from normwise.invariance.joint import find_joint
from normwise.invariance.parts import Part
from normwise.invariance.probe import JITTER, NonFiniteOutputsError, Probe
from normwise.invariance.progress import Progress
from normwise.invariance.result import Evidence, Invariances, SearchStats
from normwise.invariance.splits import propose_splits
from normwise.invariance.swap import check_model, preserved_random_state
from normwise.invariance.thresholds import Thresholds
from normwise.invariance.trees import bind_forward, take_batches
from normwise.invariance.verdicts import Draft, Rows, draft_verdicts

__all__ = ["find_invariances"]

# Up to this many weights the probe computes in float64, where a zero is a zero.
DOUBLE_UP_TO = 1 << 27
DOUBLE_UP_TO_HALF = 1 << 24  # of half-precision models, whose own memory is a quarter of that
MOST_BATCHES = 8
POINTS, COTANGENTS = 2, 4  # verdicts: points probed with shrunk eps, and backward passes at each
_ITEM_SEEDS = (0, 1)
_DETACHED = "no gradient reaches it (torch.no_grad or detach)"


def find_invariances(
    model: nn.Module,
    batches: Any,
    forward: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    *,
    joint: bool = True,
    progress: bool = True,
) -> Invariances:
    """Find which weights of any network are scale-invariant, and every joint rescaling symmetry.

    For an output f, a random cotangent v and a parameter w with gradient g = Jᵀv, Euler's identity
    Σ wᵢgᵢ = v·∂f(αw)/∂α at α = 1 vanishes where the scale of w has no effect (Li, Chen & Yang 2020,
    doi 10.1609/aaai.v34i04.5904, section 2, for the normalised case). One backward pass gives the sum for
    every parameter, row and column at once; the null space of the sums holds all joint symmetries. The
    network is probed at random values near its own, in training mode (a model that is given in training
    mode keeps the flags of its parts), dropout off, the eps of its norms shrunk; what is found is
    confirmed by rescaling. The model is left as it was, also after an exception.

    Args:
        model: Any module with a trainable parameter. Frozen parameters get verdicts too.
        batches: An iterable of batches, at most 8 of which are read; or one tensor or mapping. A batch: a
            tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``).
        forward: A function (model, batch) → outputs instead, if the model is called differently or only
            some outputs count. Nothing in the outputs (tensors in nested tuples, lists, mappings,
            dataclasses) may change for a symmetry to hold.
        tolerance: The residual |Σwg|/√Σ(wg)² up to which a unit is invariant, below 0.1. Default 1e-5 in
            float64, 1e-3 in float32.
        joint: Whether to look for joint symmetries, which needs more passes.
        progress: Whether to show a bar on a terminal after two seconds.

    Raises:
        TypeError: If the model cannot be probed (scripted or sharded), or an argument has a wrong type.
        ValueError: If the model has no trainable parameter, there are no batches, no output carries a
            gradient, or the outputs are NaN.
        RuntimeError: If the model fails on a batch, or memory runs out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> norm = nn.BatchNorm2d(8)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        >>> inv = find_invariances(net, [torch.randn(16, 3, 4, 4)])
        >>> inv.scale_invariant, inv.no_effect
        ({'0.weight': 0}, {'0.bias'})
        >>> inv.joint
        [{'1.weight': 1, '1.bias': 1, '4.weight': -1}]
    """
    check_model(model)
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < 0.1
    ):
        raise ValueError(
            f"tolerance={tolerance!r} must be a number above 0 and below 0.1, or None for the default"
        )
    call = bind_forward(forward)
    devices = {p.device for p in model.parameters()}
    with torch.inference_mode(False), preserved_random_state(devices), Progress(progress) as bar:
        taken = take_batches(batches, MOST_BATCHES)
        ways = _ways(model)
        for dtype, narrow in ways:
            at = Thresholds.of(dtype, tolerance)
            for jitter in (JITTER, JITTER / 10):
                probe = Probe(model, taken, call, dtype, jitter, at.eps_factor, narrow=narrow)
                try:
                    with probe:
                        return _Search(model, probe, at, bar).run(joint)
                except NonFiniteOutputsError:
                    if jitter != JITTER:
                        raise
                except RuntimeError as error:
                    if (dtype, narrow) == ways[-1] or not _is_about_precision(error):
                        raise
                    break
    raise AssertionError("unreachable: the last precision returns or raises")


def _ways(model: nn.Module) -> list[tuple[torch.dtype, bool]]:
    """Return (type to compute in, whether weights are stored narrow), the best first."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    weights = sum(p.numel() for p in parameters)
    if any(p.device.type == "mps" for p in parameters):
        return [(torch.float32, False)]
    if any(p.dtype == torch.float64 for p in parameters):
        return [(torch.float64, False)]
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
    fits = weights <= (DOUBLE_UP_TO_HALF if half else DOUBLE_UP_TO)
    ways = [(torch.float64, True), (torch.float64, False), (torch.float32, False)]
    return ways if fits else ways[-1:]


def _is_about_precision(error: RuntimeError) -> bool:
    text = str(error).lower()
    # torch.func transforms allow neither saved-tensor hooks nor the autograd functions of narrow weights.
    words = ("dtype", "scalar type", "double", "float64", "functorch", "torch.func", "saved tensor hooks")
    return any(word in text for word in words)


@dataclass(frozen=True)
class _Item:
    """A parameter to rescale: its index, units, and where they are blocks or only some."""

    index: int
    dim: int | None
    mask: Tensor | None = None
    blocks: tuple[tuple[int, int], ...] = ()


def _touched(item: _Item) -> list[int]:
    return [item.index]


class _Search:
    """One search, at one precision."""

    def __init__(self, model: nn.Module, probe: Probe, at: Thresholds, bar: Progress) -> None:
        self._probe, self._at, self._bar = probe, at, bar
        self._judge = Judge(probe, _ITEM_SEEDS)
        self._result = Invariances(
            frozen={
                name for name, p in zip(probe.names, probe.originals, strict=True) if not p.requires_grad
            },
            stats=SearchStats(dtype=str(probe.dtype).removeprefix("torch.")),
        )

    def run(self, joint: bool) -> Invariances:
        """Return the result."""
        rows, splits, draft = self._verdicts(joint)
        self._judge_silent(draft)
        self._confirm_scaling(draft)
        self._confirm_shifts(draft)
        self._file(draft)
        if joint:
            find_joint(self._probe, rows, splits, self._result, self._at, self._judge, self._bar)
        self._result.stats.trials = self._judge.passes
        return self._result

    def _verdicts(self, joint: bool) -> tuple[list[Row], list[list[Part]], Draft]:
        everything = set(range(len(self._probe.parameters)))
        expected = (POINTS + 1) * COTANGENTS
        strays: dict[int, str] = {}
        rows = Rows()

        def add(seed: int, *, real_eps: bool) -> None:
            to = rows.real if real_eps else rows.small
            for row in gather(
                self._probe,
                seed,
                COTANGENTS,
                everything,
                real_eps=real_eps,
                strays=None if real_eps else strays,
            ):
                to.append(row)
                self._bar.update("verdicts", len(rows.small) + len(rows.real), expected)
            if real_eps:
                rows.twins += rows.small[-COTANGENTS:]

        for seed in range(1, POINTS):
            add(seed, real_eps=False)
        add(0, real_eps=False)
        add(0, real_eps=True)
        if not all((row.reached == rows.small[0].reached).all() for row in rows.small):
            self._probe.whole = False  # what random draws leave out gets a chance to be drawn
            add(POINTS, real_eps=False)
            add(POINTS, real_eps=True)
            self._probe.whole = True
        self._result.stats.passes = len(rows.small) + len(rows.real)
        shapes = [p.shape for p in self._probe.parameters]
        if not any(row.reached.any() for row in rows.small) and not strays:
            raise ValueError(
                "the outputs depend on no parameter: return what the model computes, or give forward="
            )
        draft = draft_verdicts(shapes, rows, strays, self._at)
        plain = [k for k, evidence in enumerate(draft.evidence) if evidence.verdict == "not invariant"]
        splits = propose_splits(rows.small, self._probe.names, shapes, plain, self._at) if joint else []
        packed = {parts[0].index for parts in splits}
        for row in rows.small:
            row.units = {place: sums for place, sums in row.units.items() if place[0] in packed}
        return rows.small, splits, draft

    def _judge_silent(self, draft: Draft) -> None:
        """Decide by new values on parameters without a visible gradient."""
        items = [_Item(k, None) for k in draft.silent]

        def replace(signs: bool) -> Callable[[_Item, torch.Generator], None]:
            return lambda item, generator: replace_values(
                self._probe.parameters[item.index], generator, signs=signs
            )

        sizes_matter = self._judge.offenders(items, replace(False), _touched, self._at.same)
        for i, change in sizes_matter.items():
            k = items[i].index
            why = _DETACHED if k in draft.unreached else "dead: its gradient is zero at the probed points"
            reason = f"{why}, but other values change the outputs by {change:.0e}"
            draft.evidence[k] = Evidence("undetermined", reason=reason)
        sized = {items[i].index for i in sizes_matter}
        unlit = [item for item in items if item.index not in sized | draft.lit]
        signs_matter = self._judge.offenders(unlit, replace(True), _touched, self._at.same)
        signed = {unlit[i].index for i in signs_matter}
        for k in set(draft.silent) - sized:
            if k in signed:
                why = _DETACHED if k in draft.unreached else "dead: its gradient is zero at the probed points"
                draft.evidence[k] = Evidence(
                    "undetermined", reason=f"{why}, but other signs change the outputs"
                )
            else:
                draft.evidence[k] = self._of_gain(k) if k in draft.lit else Evidence("no effect")

    def _of_gain(self, k: int) -> Evidence:
        """Return the evidence of a parameter of which only signs have an effect: each value is a unit."""
        shape = self._probe.parameters[k].shape
        dim = None if not shape else 1 if len(shape) > 1 and shape[1] == shape.numel() > 1 else 0
        units = shape[dim] if dim is not None else 1
        reason = "only the signs of its values have an effect"
        return Evidence(
            "scale-invariant", dim, residual=0.0, units=units, invariant_units=units, reason=reason
        )

    def _confirm_scaling(self, draft: Draft) -> None:
        items = []
        for k, evidence in enumerate(draft.evidence):
            if k in draft.masks:
                items.append(_Item(k, evidence.dim, draft.masks[k], tuple(evidence.blocks)))
            elif evidence.verdict.startswith("scale-invariant"):
                items.append(_Item(k, evidence.dim, None, tuple(evidence.blocks)))
        found = self._judge.offenders(items, self._rescale, _touched, self._at.unchanged)
        for position, change in found.items():
            k = items[position].index
            draft.masks.pop(k, None)
            evidence = draft.evidence[k]
            evidence.verdict, evidence.dim = "undetermined", None
            evidence.reason = (
                f"its gradient says invariant, but rescaling changes the outputs by {change:.0e}"
            )

    def _rescale(self, item: _Item, generator: torch.Generator) -> None:
        weight = self._probe.parameters[item.index]
        alone = item.mask
        if item.dim is not None and item.mask is not None:
            alone = item.mask.clone()
            for a, b in item.blocks:
                alone[a:b] = False
                scale_units(weight.narrow(item.dim, a, b - a), None, generator)
        scale_units(weight, item.dim, generator, alone)

    def _confirm_shifts(self, draft: Draft) -> None:
        shifted = [
            k
            for k, evidence in enumerate(draft.evidence)
            if evidence.shift_residual <= self._at.invariant and evidence.verdict != "no effect"
        ]
        items = [_Item(k, draft.evidence[k].shift_dim) for k in shifted]

        def shift(item: _Item, generator: torch.Generator) -> None:
            shift_units(self._probe.parameters[item.index], item.dim, generator)

        found = self._judge.offenders(items, shift, _touched, self._at.unchanged)
        self._result.shift_invariant = {
            self._probe.names[k] for position, k in enumerate(shifted) if position not in found
        }

    def _file(self, draft: Draft) -> None:
        """Enter every verdict under its name."""
        result = self._result
        for k, (name, evidence) in enumerate(zip(self._probe.names, draft.evidence, strict=True)):
            result.evidence[name] = evidence
            if evidence.verdict == "no effect":
                result.no_effect.add(name)
            elif evidence.verdict == "undetermined":
                result.undetermined[name] = evidence.reason
            elif evidence.verdict == "not invariant":
                result.not_invariant.add(name)
            elif k in draft.masks:
                assert evidence.dim is not None
                result.partial[name] = (evidence.dim, draft.masks[k])
            else:
                result.scale_invariant[name] = evidence.dim
            if evidence.invariant_units and evidence.residual_real_eps > self._at.invariant:
                result.up_to_eps[name] = evidence.residual_real_eps
