"""Elasticities: how outputs answer to the scale of each parameter and of each of its units.

For an output f, a cotangent v and a parameter w with gradient g = Jᵀv: Σ wᵢgᵢ = v·∂f(αw)/∂α at α = 1.
One backward pass gives this sum for every parameter, every row and every column at once. The sum is
compared with √Σ(wᵢgᵢ)², of which it is about 1 part where nothing is invariant, and 0 by cancellation
where it is. Each gradient is reduced to these sums as it arrives, and freed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwise.invariance.narrow import CHUNK
from normwise.invariance.probe import NonFiniteOutputsError, Probe
from normwise.norms import wide_dtype

__all__ = ["Array", "Row", "UnitSums", "gather", "stray_parameters"]

Array = NDArray[np.float64]


@dataclass
class UnitSums:
    """The sums of one parameter over each unit of one dimension, for one row.

    Attributes:
        scale: Σ wg of each unit. scale_squares: Σ (wg)². shift: Σ g. shift_squares: Σ g².
    """

    scale: Array
    scale_squares: Array
    shift: Array
    shift_squares: Array


@dataclass
class Row:
    """What one backward pass says about every parameter.

    Attributes:
        elasticity: Σ wg of each parameter.
        squares: Σ (wg)² of each parameter. Of one that is read several times, the reads are summed apart.
        reached: Whether a gradient arrived at all.
        units: {(parameter, dimension): sums per unit} of the parameters that were asked for.
    """

    elasticity: Array
    squares: Array
    reached: NDArray[np.bool_]
    units: dict[tuple[int, int], UnitSums] = field(default_factory=dict)


class _Collector:
    """Reduces each gradient to its sums as it arrives, and frees it.

    Gradients of stand-ins stored narrow come from their reads, those of the others from hooks. A row has
    room for all sums before the pass begins: small arrays that outlive the gradients between which they
    were made would keep the allocator from ever giving those back.
    """

    def __init__(self, probe: Probe, detailed: set[int]) -> None:
        self._parameters, self._reads = probe.parameters, probe.reads
        self._places: dict[int, list[slice]] = {}
        self._units = 0
        for k in sorted(detailed):
            self._places[k] = []
            for count in probe.parameters[k].shape[:2]:
                self._places[k].append(slice(self._units, self._units + count))
                self._units += count
        self.row = self.new_row()
        self._reads.receive = self._reduce
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, k=k: self._take(k, p))
            for k, p in enumerate(probe.parameters)
            if p.requires_grad
        ]

    def new_row(self) -> Row:
        n = len(self._parameters)
        self.row = Row(np.zeros(n), np.zeros(n), np.zeros(n, dtype=bool))
        self._room = np.zeros((4, self._units))
        return self.row

    def close(self) -> None:
        self._reads.receive = None
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _take(self, index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._reduce(index, gradient, slice(None))

    def _reduce(self, index: int, gradient: Tensor, rows: slice | Tensor) -> None:
        """Add what a gradient (of some rows) says, a few rows at a time: no product needs much memory."""
        # The backward pass runs under the interception, which must not see this arithmetic.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
            weight = self._parameters[index].detach()
            if not weight.ndim:
                gradient, weight = gradient.view(1), weight.view(1)
            self.row.reached[index] = True
            for d, place in enumerate(self._places.get(index, ())):
                self.row.units[index, d] = UnitSums(*self._room[:, place])
            step = _rows_at_once(gradient)
            for start in range(0, len(gradient), step):
                part = gradient[start : start + step]
                if isinstance(rows, slice):
                    first = (rows.start or 0) + start
                    some: slice | Tensor = slice(first, first + len(part))
                else:
                    some = rows[start : start + step]
                self._add(index, part, weight[some], some)

    def _add(self, index: int, gradient: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        # Added, not assigned: a weight that is read twice has a gradient for each.
        wide = wide_dtype(weight.device)
        products = gradient * weight
        if index not in self._places:
            self.row.elasticity[index] += float(products.sum(dtype=wide))
            self.row.squares[index] += float(products.square_().sum(dtype=wide))
            return
        units = rows if isinstance(rows, slice) else rows.cpu().numpy()
        self.row.elasticity[index] += self._add_units(0, index, products, units, wide)
        self.row.squares[index] += self._add_units(1, index, products.square_(), units, wide)
        self._add_units(2, index, gradient, units, wide)
        self._add_units(3, index, torch.mul(gradient, gradient, out=products), units, wide)

    def _add_units(
        self, kind: int, index: int, values: Tensor, rows: slice | NDArray[np.int64], wide: torch.dtype
    ) -> float:
        """Add sums over rows and over columns; return the sum of all."""
        if values.ndim > 2:
            values = values.flatten(2).sum(-1, dtype=wide)
        places = self._places[index]
        of_rows = _numbers(values.sum(1, dtype=wide) if values.ndim > 1 else values)
        self._room[kind, places[0]][rows] += of_rows
        if values.ndim > 1:
            self._room[kind, places[1]] += _numbers(values.sum(0, dtype=wide))
        return float(of_rows.sum())


def _rows_at_once(gradient: Tensor) -> int:
    most = CHUNK if gradient.device.type == "cpu" else 16 * CHUNK  # elsewhere launches cost
    return max(1, most // max(1, gradient[:1].numel()))


def _numbers(tensor: Tensor) -> Array:
    return np.asarray(tensor.cpu().double().numpy())


def gather(
    probe: Probe,
    seed: int,
    cotangents: int,
    detailed: set[int] | None = None,
    *,
    real_eps: bool = False,
    strays: dict[int, str] | None = None,
    moved: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Yield ``cotangents`` rows at the generic point ``seed``, which share one forward pass.

    Args:
        probe: The probe.
        seed: Numbers the point, the batch, the random draws and the cotangents.
        cotangents: How many backward passes.
        detailed: The parameters whose units are summed as well.
        real_eps: Leave the eps of norm layers as they are.
        strays: Receives {parameter: reason} for parameters used outside of their module.
        moved: The parameters that move to the point; the others stay where they are. Default: all.

    Raises:
        NonFiniteOutputsError: If outputs or gradients are NaN.
    """
    probe.move_to(seed, moved)
    collector = _Collector(probe, detailed or set())
    generators: dict[torch.device, torch.Generator] = {}
    try:
        outputs = probe.outputs(real_eps=real_eps)
        if strays is not None:
            strays.update(stray_parameters(outputs, probe))
        for number in range(cotangents):
            weights = []
            for tensor in outputs:
                generator = generators.setdefault(
                    tensor.device, torch.Generator(tensor.device).manual_seed(77_003 + seed)
                )
                weights.append(_cotangent(tensor.detach(), generator))
            row = collector.new_row()
            try:
                probe.backward(outputs, weights, real_eps=real_eps, keep=number + 1 < cotangents)
            except RuntimeError as error:
                if number == 0 or "second time" not in str(error):
                    raise _backward_error(error) from error
                outputs = probe.outputs(real_eps=real_eps)  # a graph that can be walked once only
                row = collector.new_row()
                probe.backward(outputs, weights, real_eps=real_eps, keep=False)
            if not np.isfinite(row.elasticity).all():
                raise NonFiniteOutputsError(
                    "a gradient is NaN or infinite at the probed point: check the model's values and inputs "
                    f"(parameter {probe.names[int(np.argmin(np.isfinite(row.elasticity)))]!r})"
                )
            yield row
    finally:
        collector.close()
        probe.release()


def _backward_error(error: RuntimeError) -> RuntimeError:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return RuntimeError(f"out of memory in the backward pass of the probe: give smaller batches ({text})")
    return RuntimeError(f"the backward pass failed: give a model that is differentiable, or forward=: {text}")


def _cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return random weights for the entries of ``output``, so that every output counts alike."""
    v = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32).to(
        output.dtype
    )
    finite = output.isfinite()
    size: Tensor = torch.linalg.vector_norm(torch.where(finite, output, torch.zeros_like(output)))
    masked: Tensor = torch.where(finite, v, torch.zeros_like(v))
    return masked / size.clamp_min(torch.finfo(output.dtype).tiny ** 0.5)


def stray_parameters(outputs: list[Tensor], probe: Probe) -> dict[int, str]:
    """Return {parameter: reason} for those that the graph reaches as the model's own, not as stand-ins.

    A parameter that a closure or a global holds cannot be swapped: nothing can be said about it.
    """
    own = {id(p): k for k, p in enumerate(probe.originals)}
    found: dict[int, str] = {}
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if id(leaf) in own and leaf is not None:
            found[own[id(leaf)]] = "used through a reference outside its module, so it could not be probed"
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
