"""Scale gradients: how the outputs respond to the scale of each parameter and of each of its units.

For an output f, a random cotangent v and a parameter w with gradient g = Jᵀv, Euler's identity says that
Σ wᵢgᵢ = v·∂f(αw)/∂α at α = 1. One backward pass gives this sum for every parameter, row and column. Compared
with √Σ(wᵢgᵢ)² it is about 1 where nothing is invariant, and 0 by cancellation where the scale has no effect.
Each gradient is reduced to these sums as soon as it arrives, and then freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from normwise.invariance.probe import NonFiniteOutputsError, Probe
from normwise.invariance.stand_ins import CHUNK
from normwise.norms import wide_dtype

__all__ = [
    "Array",
    "ScaleGradients",
    "UnitSums",
    "batched_scale_gradients",
    "cotangents_at",
    "scale_gradients",
]

Array = NDArray[np.float64]

_DIRECTION = 0.8 - 0.6j  # complex shifts are summed along one direction; the final check uses random ones


@dataclass
class UnitSums:
    """Sums over each unit of one dimension of a parameter, from one backward pass.

    Attributes:
        scale: Σ wg of each unit.
        scale_squares: Σ (wg)² of each unit.
        shift: Σ g of each unit, if it was requested.
        shift_squares: Σ g² of each unit, if it was requested.
    """

    scale: Array
    scale_squares: Array
    shift: Array | None = None
    shift_squares: Array | None = None


@dataclass
class ScaleGradients:
    """The sums that one backward pass gives for every parameter.

    Attributes:
        sums: Σ wg of each parameter.
        squares: Σ (wg)² of each parameter. A parameter that is read several times adds one term per read.
        reached: Whether a gradient arrived at all.
        has_squares: Whether ``squares``, and those of the units, were summed; else they are zeros, or empty.
        units: {(parameter, dimension): sums per unit} of the parameters for which they were requested.
    """

    sums: Array
    squares: Array
    reached: NDArray[np.bool_]
    has_squares: bool = True
    units: dict[tuple[int, int], UnitSums] = field(default_factory=dict)


def scale_gradients(
    probe: Probe,
    seed: int,
    cotangents: int,
    per_unit: set[int] | None = None,
    *,
    real_eps: bool = False,
    outside: dict[int, str] | None = None,
    moved: Sequence[int] | None = None,
    shifts: bool = False,
    squares: int | None = None,
    only: set[int] | None = None,
    keep_outputs: Callable[[list[Tensor]], None] | None = None,
) -> Iterator[ScaleGradients]:
    """Yield the scale gradients of ``cotangents`` backward passes, which share one forward pass.

    Args:
        probe: The probe.
        seed: The number of the generic point, batch, random draws and cotangents.
        cotangents: The number of backward passes.
        per_unit: The parameters whose units are summed as well.
        real_eps: Whether norm layers use the model's eps instead of the shrunk one.
        outside: Receives {parameter: reason} for parameters that are used outside of their module.
        moved: The parameters that move to a nearby point, by factors of rows and columns, while the others
            stay. Default: all move to the generic point.
        shifts: Whether Σg and Σg² of units are summed too, where Σ(wg)² are.
        squares: The number of passes, the first ones, in which Σ(wg)² are summed; in the others most linear
            layers need no gradient of their weight. Default: all passes.
        only: The parameters whose gradients are summed. Default: all.
        keep_outputs: Receives the outputs of the forward pass.

    Raises:
        NonFiniteOutputsError: If outputs or gradients are NaN.
    """
    if moved is None:
        probe.move_to(seed)
    else:
        probe.vary(seed, moved)
    squares = cotangents if squares is None else squares
    ignored = set() if only is None else set(range(len(probe.parameters))) - only
    reducer = _GradientReducer(probe, per_unit or set(), ignored, sums_suffice=squares < cotangents)
    try:
        outputs = probe.outputs(real_eps=real_eps)
        if keep_outputs is not None:
            keep_outputs([tensor.detach().clone() for tensor in outputs])
        if outside is not None:
            outside.update(_used_outside(outputs, probe))
        for number, weights in enumerate(cotangents_at(outputs, seed, cotangents)):
            kinds = 1 if number >= squares else 4 if shifts else 2
            gradients = reducer.start(kinds)
            try:
                probe.backward(outputs, weights, real_eps=real_eps, keep=number + 1 < cotangents)
            except RuntimeError as error:
                if number == 0 or "second time" not in str(error):
                    raise _backward_error(error) from error
                outputs = probe.outputs(real_eps=real_eps)  # this graph allows only one backward pass
                gradients = reducer.start(kinds)
                probe.backward(outputs, weights, real_eps=real_eps, keep=False)
            _check_finite(gradients, probe)
            yield gradients
    finally:
        reducer.close()
        probe.release()


def batched_scale_gradients(
    probe: Probe, seed: int, cotangents: int, per_unit: set[int], moved: Sequence[int]
) -> list[ScaleGradients]:
    """Return what :func:`scale_gradients` yields without squares, by one backward pass for all cotangents.

    No stand-in may be stored narrow, and the gradients of all cotangents are in memory at once.

    Raises:
        RuntimeError: An operation of the backward pass cannot be batched.
        NonFiniteOutputsError: If outputs or gradients are NaN.
    """
    probe.vary(seed, moved)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the backward passes of the other kernels cannot be batched
            outputs = probe.outputs()
        weights = cotangents_at(outputs, seed, cotangents)
        stacked = [torch.stack(of_output) for of_output in zip(*weights, strict=True)]
        gradients = probe.batched_gradients(outputs, stacked, moved, real_eps=False)
    finally:
        probe.release()
    n = len(probe.parameters)
    found = [
        ScaleGradients(np.zeros(n), np.zeros(n), np.zeros(n, dtype=bool), has_squares=False)
        for _ in range(cotangents)
    ]
    none = np.zeros(0)
    for k, gradient in zip(moved, gradients, strict=True):
        if gradient is None:
            continue
        with torch.no_grad():
            weight = probe.parameters[k].detach()
            products = (gradient.conj() * weight).real if weight.is_complex() else gradient * weight
            products = products.flatten(3).sum(-1) if products.ndim > 3 else products
            rows = _to_numpy(products.sum(2) if products.ndim > 2 else products)
            columns = _to_numpy(products.sum(1)) if products.ndim > 2 else None
        for number, row in enumerate(found):
            row.reached[k] = True
            row.sums[k] = rows[number].sum()
            if k in per_unit and weight.ndim:
                for d, sums in enumerate((rows, columns)):
                    if sums is not None:
                        row.units[k, d] = UnitSums(sums[number], none)
    for row in found:
        _check_finite(row, probe)
    return found


class _GradientReducer:
    """Reduces each gradient to its sums as it arrives, and frees it.

    Gradients of narrow stand-ins arrive from their reads, all others from hooks. The memory for all sums of a
    backward pass is allocated before it begins: small arrays that are allocated between gradients and outlive
    them would keep the allocator from returning the memory of the gradients.
    """

    def __init__(self, probe: Probe, per_unit: set[int], ignored: set[int], *, sums_suffice: bool) -> None:
        self._parameters, self._narrow = probe.parameters, probe.narrow
        self._places: dict[int, list[slice]] = {}
        self._units = 0
        for k in sorted(per_unit):
            self._places[k] = []
            for count in probe.parameters[k].shape[:2]:
                self._places[k].append(slice(self._units, self._units + count))
                self._units += count
        self._result: ScaleGradients | None = None  # none before the first backward pass of the probe
        self._ignored = self._narrow.ignored = ignored
        self._narrow.on_gradient = self._reduce
        self._narrow.on_sums = self._take_sums if sums_suffice else None
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, k=k: self._take(k, p))
            for k, p in enumerate(probe.parameters)
            if p.requires_grad
        ]

    def start(self, kinds: int) -> ScaleGradients:
        """Return the sums, still zero, that the next backward pass fills.

        Args:
            kinds: 1 for Σwg only, 2 for Σ(wg)² too, 4 for Σg and Σg² too.
        """
        for parameter in self._parameters:  # of a backward pass by the model itself
            parameter.grad = None
        n = len(self._parameters)
        self._kinds = kinds
        self._narrow.on_sums = self._take_sums if kinds == 1 else None
        self._result = ScaleGradients(np.zeros(n), np.zeros(n), np.zeros(n, dtype=bool), kinds > 1)
        self._unit_sums = np.zeros((kinds, self._units))
        return self._result

    def close(self) -> None:
        self._narrow.on_gradient = self._narrow.on_sums = None
        self._narrow.ignored = frozenset()
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _take(self, index: int, parameter: Tensor) -> None:
        if self._result is None:
            return
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._reduce(index, gradient, slice(None))

    def _sums_at(self, place: slice) -> UnitSums:
        if self._kinds == 1:
            return UnitSums(self._unit_sums[0, place], np.zeros(0))
        return UnitSums(*self._unit_sums[:, place])

    def _take_sums(self, index: int, rows: Tensor, columns: Tensor) -> None:
        """Add Σwg of each row and column."""
        if self._result is None:
            return
        self._result.reached[index] = True
        of_rows = _to_numpy(rows)
        self._result.sums[index] += float(of_rows.sum())
        for d, place in enumerate(self._places.get(index, ())):
            self._result.units[index, d] = self._sums_at(place)
            self._unit_sums[0, place] += _to_numpy(columns) if d else of_rows

    def _reduce(self, index: int, gradient: Tensor, rows: slice | Tensor) -> None:
        """Add the sums of a gradient (of some rows), a few rows at a time, so that no product is large."""
        if index in self._ignored or self._result is None:
            return
        # The overrides are active in the backward pass, and must not change this arithmetic.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
            weight = self._parameters[index].detach()
            if not weight.ndim:
                gradient, weight = gradient.reshape(1), weight.view(1)
            self._result.reached[index] = True
            for d, place in enumerate(self._places.get(index, ())):
                self._result.units[index, d] = self._sums_at(place)
            step = _rows_at_once(gradient)
            for start in range(0, len(gradient), step):
                chunk = gradient[start : start + step]
                if isinstance(rows, slice):
                    first = (rows.start or 0) + start
                    some: slice | Tensor = slice(first, first + len(chunk))
                else:
                    some = rows[start : start + step]
                self._add(index, chunk, weight[some], some)

    def _add(self, index: int, gradient: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        assert self._result is not None
        # Added, not assigned: a weight that is read twice has a gradient for each read.
        wide = wide_dtype(weight.device)
        if weight.is_complex():  # the derivative along w is Re(ḡw)
            products, gradient = (gradient.conj() * weight).real, (gradient * _DIRECTION).real
        else:
            products = gradient * weight
        if not self._places.get(index):
            self._result.sums[index] += float(products.sum(dtype=wide))
            if self._kinds == 1:
                return
            self._result.squares[index] += float(products.square_().sum(dtype=wide))
            return
        units = rows if isinstance(rows, slice) else rows.cpu().numpy()
        self._result.sums[index] += self._add_units(0, index, products, units, wide)
        if self._kinds == 1:
            return
        self._result.squares[index] += self._add_units(1, index, products.square_(), units, wide)
        if self._kinds < 4:
            return
        self._add_units(2, index, gradient, units, wide)
        self._add_units(3, index, torch.mul(gradient, gradient, out=products), units, wide)

    def _add_units(
        self, which_sum: int, index: int, values: Tensor, rows: slice | NDArray[np.int64], wide: torch.dtype
    ) -> float:
        """Add the sums of ``values`` over rows and columns; return the sum of all."""
        if values.ndim > 2:
            values = values.flatten(2).sum(-1, dtype=wide)
        places = self._places[index]
        of_rows = _to_numpy(values.sum(1, dtype=wide) if values.ndim > 1 else values)
        self._unit_sums[which_sum, places[0]][rows] += of_rows
        if values.ndim > 1:
            self._unit_sums[which_sum, places[1]] += _to_numpy(values.sum(0, dtype=wide))
        return float(of_rows.sum())


def _rows_at_once(gradient: Tensor) -> int:
    most = CHUNK if gradient.device.type == "cpu" else 16 * CHUNK  # launches cost time on other devices
    return max(1, most // max(1, gradient[:1].numel()))


def _to_numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.cpu().double().numpy())


def _backward_error(error: RuntimeError) -> RuntimeError:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return RuntimeError(f"out of memory in the backward pass of the probe: give smaller batches ({text})")
    return RuntimeError(f"the backward pass failed: give a model that is differentiable, or forward=: {text}")


def _check_finite(gradients: ScaleGradients, probe: Probe) -> None:
    finite = np.isfinite(gradients.sums)
    if not finite.all():
        raise NonFiniteOutputsError(
            "a gradient is NaN or infinite at the probed point: check the model's values and inputs "
            f"(parameter {probe.names[int(np.argmin(finite))]!r})"
        )


def cotangents_at(outputs: list[Tensor], seed: int, count: int) -> list[list[Tensor]]:
    """Return the random cotangents of the point with the number ``seed``, each for all outputs."""
    generators: dict[torch.device, torch.Generator] = {}
    found = []
    for _ in range(count):
        of_outputs = []
        for tensor in outputs:
            generator = generators.setdefault(
                tensor.device, torch.Generator(tensor.device).manual_seed(77_003 + seed)
            )
            of_outputs.append(_cotangent(tensor.detach(), generator))
        found.append(of_outputs)
    return found


def _cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return random weights for the entries of ``output``, divided by its norm: outputs count alike."""
    v = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32).to(
        output.dtype
    )
    finite = output.isfinite()
    size: Tensor = torch.linalg.vector_norm(torch.where(finite, output, torch.zeros_like(output)))
    masked: Tensor = torch.where(finite, v, torch.zeros_like(v))
    return masked / size.clamp_min(torch.finfo(output.dtype).tiny ** 0.5)


def _used_outside(outputs: list[Tensor], probe: Probe) -> dict[int, str]:
    """Return {parameter: reason} for parameters whose originals, not stand-ins, are in the graph.

    A closure or a global variable that holds a parameter cannot be made to refer to a stand-in.
    """
    originals = {id(p): k for k, p in enumerate(probe.originals)}
    outside: dict[int, str] = {}
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if id(leaf) in originals and leaf is not None:
            outside[originals[id(leaf)]] = (
                "used through a reference outside its module, so it could not be probed"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return outside
