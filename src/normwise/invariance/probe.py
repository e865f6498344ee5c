"""The generic-point probe: run a model at random values near its own, and leave it as it was."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normwise.invariance.interception import Interception
from normwise.invariance.narrow import CHUNK
from normwise.invariance.swap import Swap, eager, preserved_random_state
from normwise.invariance.trees import Forward, describe, differentiable_outputs, map_tensors

__all__ = ["NonFiniteOutputsError", "Probe", "generic_values"]

# How far the values move: weights by up to this part of their size and of their tensor's RMS.
JITTER = 0.3
# Constants below this (zero biases, zero gains, layer scales) are replaced by values of order one half.
SMALL_CONSTANT = 0.05


class NonFiniteOutputsError(ValueError):
    """The outputs at the probed point contain NaN, or nothing finite."""


def generic_values(out: Tensor, own: Tensor, generator: torch.Generator, jitter: float = JITTER) -> None:
    """Write into ``out`` random values near ``own``, with its signs, at which nothing is special.

    Each value moves away from zero by up to ``jitter`` × (its size + the tensor's RMS); zeros take random
    signs. A tensor of one constant below 0.05 in size (as initialised: zero biases, layer scales) gets
    values of 0.25 to 0.75, divided by √fan_in where it is a matrix, so that its branch is not negligible.

    Args:
        out: Where to write, contiguous, any floating-point type.
        own: The model's values, of the same shape.
        generator: On the device of ``own``.
        jitter: The fraction; 0 keeps all values but small constants.
    """
    if not own.numel():
        return
    low, high = own.aminmax()
    size = abs(float(low))
    if bool(low == high) and size < SMALL_CONSTANT and jitter > 0:
        fan_in = own[0].numel() if own.ndim > 1 else 1
        base, spread = 0.25 / fan_in**0.5, 0.5 / fan_in**0.5
    else:
        wide = torch.float64 if own.device.type != "mps" else None
        norms = [float(torch.linalg.vector_norm(part, dtype=wide)) for part in _pieces(own)]
        norm = math.sqrt(sum(n * n for n in norms))
        base, spread = 0.0, jitter * norm / own.numel() ** 0.5
    for target, source in zip(_pieces(out), _pieces(own), strict=True):
        values = source.to(out.dtype)
        noise = torch.rand(values.shape, generator=generator, device=own.device, dtype=torch.float32).to(
            out.dtype
        )
        signs = torch.where(values == 0, torch.sign(_remixed(noise) - 0.5), torch.sign(values))
        moved = values if base else values.add(values.abs() * noise * signs, alpha=jitter)
        target.copy_(moved.add(signs * (base + spread * noise)))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a few values at a time: views where ``tensor`` is contiguous, else copies."""
    pieces: Sequence[Tensor] = tensor.reshape(-1).split(CHUNK if tensor.device.type == "cpu" else 16 * CHUNK)
    return pieces


def _remixed(noise: Tensor) -> Tensor:
    """Return uniform numbers that look independent of the uniform ``noise`` (its low digits)."""
    return torch.remainder(noise * 4096.0, 1.0)


class Probe:
    """A model at generic points: everything it owns is swapped for stand-ins until the context ends.

    Args:
        model: The model.
        batches: Its batches.
        forward: A function (model, batch) → outputs.
        dtype: The floating-point type that the probe computes in.
        jitter: See :func:`generic_values`.
        eps_factor: What "shrunk eps" means: every eps times this.
        narrow: Whether weights may be stored in float32 and widened at each read.

    Attributes:
        names: The name of each parameter.
        parameters: The stand-ins, which may be changed freely.
        reads: Those of them that are stored narrow, whose gradients go to ``reads.receive``.
        originals: The model's own, never changed.
        whole: Whether layers and branches that are dropped at random are all kept.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward,
        dtype: torch.dtype,
        jitter: float = JITTER,
        eps_factor: float = 1e-8,
        *,
        narrow: bool = True,
    ) -> None:
        self._model, self._batches, self._forward = model, batches, forward
        self._swap = Swap(model, dtype, narrow=narrow)
        self._stack = contextlib.ExitStack()
        self.names, self.parameters = self._swap.names, self._swap.parameters
        self.originals, self.reads = self._swap.originals, self._swap.reads
        self.dtype, self.jitter, self.eps_factor = dtype, jitter, eps_factor
        self.seed = -1
        self.whole = True

    def __enter__(self) -> Probe:
        devices = {p.device for p in self.parameters}
        try:
            self._stack.callback(self._swap.restore)
            self._stack.enter_context(preserved_random_state(devices))
            self._stack.enter_context(eager(self._model))
            default = torch.get_default_dtype()
            self._stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(self.dtype)
            if not self._model.training:
                self._swap.train(self._model)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def move_to(self, seed: int, moved: Sequence[int] | None = None) -> None:
        """Move all parameters, or those in ``moved``, to the generic point number ``seed``."""
        self.seed = seed
        for index in range(len(self.parameters)) if moved is None else moved:
            self.reset(index)

    def reset(self, index: int) -> None:
        """Move parameter ``index`` back to the current generic point."""
        own = self.originals[index].detach()
        generator = torch.Generator(own.device).manual_seed(1_000_003 * (self.seed + 1) + index)
        with torch.no_grad():
            generic_values(self.parameters[index], own, generator, self.jitter)

    def outputs(self, *, real_eps: bool = False, gradients: bool = True) -> list[Tensor]:
        """Run the model at the current point on the batch of the current seed.

        Args:
            real_eps: Leave the eps of norm layers as they are.
            gradients: Record a graph.

        Returns:
            The outputs that carry a gradient; without ``gradients``, detached.

        Raises:
            ValueError: If nothing in the outputs depends on a parameter.
            NonFiniteOutputsError: If an output is NaN.
        """
        which = self.seed % len(self._batches)
        batch = map_tensors(self._batches[which], self._own_copy)
        self._swap.install()
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - the state that models draw from
        with torch.enable_grad(), self.reads.unheld(), self._interception(real_eps):
            result = _in_one_line(
                lambda: self._forward(self._model, batch), f"batch {which} {describe(batch)}"
            )
        found = differentiable_outputs(result)
        if not found:
            raise ValueError(
                "no output depends on a parameter with a gradient: return floating-point tensors (in tuples, "
                "lists, mappings or dataclasses) computed outside torch.no_grad, or give forward="
            )
        for tensor in found:
            if bool(tensor.detach().isnan().any()) or not bool(tensor.detach().isfinite().any()):
                raise NonFiniteOutputsError(
                    f"the outputs contain NaN on batch {which} {describe(batch)}: check the inputs and the "
                    "model's values (the probe moves them by up to 60 %)"
                )
        return found if gradients else [tensor.detach().clone() for tensor in found]

    def backward(
        self, outputs: list[Tensor], cotangents: list[Tensor], *, real_eps: bool, keep: bool
    ) -> None:
        """Run the backward pass of :meth:`outputs`; ``keep`` the graph for another one.

        Checkpointed parts run forward again in it, so it needs what the forward pass had.
        torch.autograd.backward would switch the interception off meanwhile; the engine itself does not.
        """
        with torch.enable_grad(), self.reads.unheld(), self._interception(real_eps):
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(outputs),
                tuple(cotangents),
                keep,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _interception(self, real_eps: bool) -> Interception:
        return Interception(1.0 if real_eps else self.eps_factor, self.dtype, self.whole)

    def release(self) -> None:
        """Drop the graph that the modules may still hold, and the clones of buffers."""
        self._swap.restore()

    def _own_copy(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().clone()
        return kept.to(self.dtype) if kept.is_floating_point() else kept


def _in_one_line(run: Callable[[], Any], what: str) -> Any:
    """Return ``run()``; an error of torch becomes one line that names ``what`` and the remedy."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
            raise RuntimeError(
                f"out of memory in the probe of {what}: give smaller batches ({text})"
            ) from error
        kind = type(error) if type(error) in (ValueError, TypeError) else RuntimeError
        raise kind(f"the model failed on {what}: give batches it can run, or forward=: {text}") from error
