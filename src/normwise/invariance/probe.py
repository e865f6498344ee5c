"""The probe: runs a model at random values near those of its parameters, and leaves the model unchanged."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from normwise.invariance.inputs_outputs import (
    Forward,
    converted,
    describe,
    differentiable_outputs,
    is_probed,
    map_tensors,
    suggested_forward,
)
from normwise.invariance.stand_ins import CHUNK, StandIns
from normwise.invariance.torch_overrides import TorchOverrides

__all__ = [
    "JITTER",
    "NonFiniteOutputsError",
    "Probe",
    "ProbeMode",
    "check_model",
    "place_of",
    "preserved_random_state",
]

# Weights move by up to this fraction of their size, plus this fraction of their tensor's RMS.
JITTER = 0.3
# Tensors of one constant below this (zero biases, zero gains, layer scales) get values of order one half.
SMALL_CONSTANT = 0.05
# Rows and columns move by up to this factor (its logarithm) from one point to another nearby.
_VARIATION = 0.3


class ProbeMode(NamedTuple):
    """How the probe runs the model.

    Attributes:
        keep_branches: Whether branches that the model drops at random are all kept, by fixing the draws that
            may decide on them. Layers that it skips by an ``if`` on a draw are always kept.
        balanced: Whether weights are as large as their fan-in asks for, so that no signal dies, however deep
            the network and however small its weights.
        real_constants: Whether constants from 1e-4 to 0.01 that are added, or clamp, keep their values.
        as_is: Whether values are the model's own.
        every_draw: Whether no draw is fixed, even if the model skips layers by it.
    """

    keep_branches: bool = True
    balanced: bool = False
    real_constants: bool = False
    as_is: bool = False
    every_draw: bool = False


class NonFiniteOutputsError(ValueError):
    """The outputs at the probed point contain NaN, or nothing finite."""


class Probe:
    """A model at generic points. Stand-ins replace its parameters and buffers until the context ends.

    Args:
        model: The model.
        batches: The batches.
        forward: A function (model, batch) → outputs.
        dtype: The floating-point type of the computation.
        jitter: See :func:`generic_values`.
        eps_factor: The factor by which every eps is shrunk.
        narrow: Whether weights may be stored in float32 and widened at each read.

    Attributes:
        names: The name of each parameter.
        unprobed: {name: reason} for parameters of other types, which the probe leaves alone.
        originals: The model's parameters, which never change.
        parameters: Their stand-ins, which the caller may change freely.
        narrow: The stand-ins that are stored narrow; their gradients go to ``narrow.on_gradient``.
        mode: How the model runs. It must not change between :meth:`move_to` and the passes at that point.
        shrinks_constants: Whether any such constant has counted as an eps so far.
        largest_result: The number of values of the largest tensor that the model has computed so far.
        draws_single_numbers: Whether the model has drawn a single random number, or any outside of torch.
        nudge: The fraction by which all values move away from the generic point, to tell gradients from
            rounding errors.
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
        self._stand_ins = StandIns(model, dtype, narrow=narrow)
        self._stack = contextlib.ExitStack()
        self.names, self.parameters = self._stand_ins.names, self._stand_ins.parameters
        self._layers = _layers(model, self._stand_ins.originals)
        self.originals, self.narrow = self._stand_ins.originals, self._stand_ins.narrow
        self.unprobed = self._stand_ins.unprobed
        self.dtype, self.jitter, self.eps_factor = dtype, jitter, eps_factor
        self.seed = -1
        self.mode = ProbeMode()
        self._skips_layers = self._differentiates = False
        self._fixes_several = self._fixes_single = False
        self.shrinks_constants = self.draws_single_numbers = False
        self.largest_result = 0
        self.nudge = 0.0
        self._point: tuple[int, bool, bool, float] | None = None  # where all parameters are
        self._factors: dict[int, tuple[Tensor, ...]] = {}
        self._spreads: dict[int, _Spread] = {}
        self._noise = _Noise()

    def __enter__(self) -> Probe:
        devices = {p.device for p in self.parameters}
        try:
            self._stack.callback(self._stand_ins.restore)
            self._stack.enter_context(preserved_random_state(devices))
            self._stack.enter_context(_without_compilation(self._model))
            default = torch.get_default_dtype()
            self._stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(self.dtype)
            if not self._model.training:
                self._stand_ins.train(self._model)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def fixes_draws(self) -> bool:
        """Whether random draws have been fixed, other than those by which the model skips whole layers."""
        return self._fixes_several or (self._fixes_single and not self._skips_layers)

    def move_to(self, seed: int) -> None:
        """Move all parameters to the generic point with the number ``seed``."""
        self.seed = seed
        point = seed, self.mode.balanced, self.mode.as_is, self.nudge
        if point != self._point:
            self._point = point
            self._factors.clear()
            for index in range(len(self.parameters)):
                self.reset(index)

    def vary(self, seed: int, moved: Sequence[int]) -> None:
        """Move the parameters in ``moved`` to a point with the number ``seed`` that is near the current one.

        Random factors of rows and columns cost much less than new values. They replace those of the last
        time.
        """
        self.seed, self._point = seed, None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for index in moved:
                weight = self.parameters[index].detach()
                factors = tuple(
                    torch.exp(_VARIATION * (2 * torch.rand(count, generator=generator) - 1)).to(weight)
                    for count in weight.shape[:2] or (1,)
                )
                last = self._factors.get(index)
                self._factors[index] = factors
                if last is not None:
                    factors = tuple(f / g for f, g in zip(factors, last, strict=True))
                _scale_rows_and_columns(weight, *factors)

    def reset(self, index: int) -> None:
        """Move parameter ``index`` back to the current generic point."""
        original = self.originals[index].detach()
        seed = 1_000_003 * (self.seed + 1) + index
        out = self.parameters[index].detach()
        if original.is_complex():
            out, original = torch.view_as_real(out), torch.view_as_real(original.resolve_conj())
        self._factors.pop(index, None)
        with torch.no_grad():
            if index not in self._spreads and original.numel():
                self._spreads[index] = _Spread.of(original)
            jitter = 0.0 if self.mode.as_is else self.jitter
            spread = self._spreads.get(index)
            generic_values(out, original, seed, jitter, spread=spread, noise=self._noise)
            if self.mode.balanced and index in self._layers:
                _balance(out, is_bias=self._layers[index])
            if self.nudge:
                generator = torch.Generator(out.device).manual_seed(seed + 1)
                for chunk in _chunks(out):
                    noise = torch.rand(chunk.shape, generator=generator, device=chunk.device)
                    chunk.mul_(1.0 + self.nudge * noise.to(chunk.dtype))

    @contextlib.contextmanager
    def scaled(self, factors: Mapping[int, float]) -> Iterator[None]:
        """Return a context that multiplies parameters by factors; narrow storage does not round them."""
        self.narrow.factors = {k: factor for k, factor in factors.items() if k in self.narrow}
        changed = factors.keys() - self.narrow.factors.keys()
        try:
            with torch.no_grad():
                for k in changed:
                    self.parameters[k].mul_(factors[k])
            yield
        finally:
            self.narrow.factors = {}
            for k in changed:
                self.reset(k)

    def outputs(self, *, real_eps: bool = False, gradients: bool = True) -> list[Tensor]:
        """Run the model at the current point, on the batch that belongs to the current seed.

        Args:
            real_eps: Whether norm layers use the model's eps instead of the shrunk one.
            gradients: Whether to record a graph.

        Returns:
            The outputs that depend on a parameter; detached copies without ``gradients``.

        Raises:
            ValueError: If no output depends on a parameter.
            NonFiniteOutputsError: If an output contains NaN.
        """
        number = self.seed % len(self._batches)
        batch = map_tensors(self._batches[number], self._converted_copy)
        self._stand_ins.install(self.seed)
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - the state that models draw from
        before = _state_outside_torch()
        overrides = self._overrides(real_eps)
        with torch.enable_grad(), self.narrow.not_saved_for_backward(), overrides:
            result = _with_short_errors(
                lambda: self._forward(self._model, batch), f"batch {number} {describe(batch)}", batch
            )
        self._skips_layers = self._skips_layers or overrides.branches_on_draws
        self._differentiates = self._differentiates or overrides.differentiates
        self.draws_single_numbers = (
            self.draws_single_numbers or overrides.draws_single_numbers or before != _state_outside_torch()
        )
        self._fixes_several = self._fixes_several or overrides.fixed_draws
        self._fixes_single = self._fixes_single or overrides.fixed_single_draws
        self.shrinks_constants = self.shrinks_constants or overrides.shrunk_constants
        self.largest_result = max(self.largest_result, overrides.largest_result)
        outputs = differentiable_outputs(result)
        if not outputs:
            raise ValueError(
                "no output depends on a parameter with a gradient: return floating-point tensors (in tuples, "
                "lists, mappings or dataclasses) computed outside torch.no_grad, or give forward="
            )
        for tensor in outputs:
            if bool(tensor.detach().isnan().any()) or not bool(tensor.detach().isfinite().any()):
                raise NonFiniteOutputsError(
                    f"the outputs contain NaN on batch {number} {describe(batch)}: check the inputs and the "
                    "model's values (the probe moves them by up to 60 %)"
                )
        return outputs if gradients else [tensor.detach().clone() for tensor in outputs]

    def backward(
        self, outputs: list[Tensor], cotangents: list[Tensor], *, real_eps: bool, keep: bool
    ) -> None:
        """Run the backward pass of :meth:`outputs`, and keep the graph for another one if ``keep``.

        Checkpointed modules run forward again in the backward pass, so it uses the same overrides.
        torch.autograd.backward would disable them; the engine does not.
        """
        with torch.enable_grad(), self.narrow.not_saved_for_backward(), self._overrides(real_eps):
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(outputs),
                tuple(cotangents),
                keep,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def batched_gradients(
        self, outputs: list[Tensor], cotangents: list[Tensor], wanted: Sequence[int], *, real_eps: bool
    ) -> list[Tensor | None]:
        """Return the gradients of the parameters ``wanted`` for several cotangents, by one backward pass.

        No stand-in may be stored narrow: see :meth:`widen`.

        Args:
            outputs: The outputs of the model; the graph is kept.
            cotangents: For each output, its cotangents, stacked along dimension 0.
            wanted: The numbers of the parameters.
            real_eps: As in :meth:`outputs`.

        Raises:
            RuntimeError: An operation of the backward pass cannot be batched.
        """
        inputs = tuple(self.parameters[k] for k in wanted)
        reached: list[bool] = []

        def pull_back(*vectors: Tensor) -> tuple[Tensor, ...]:
            gradients = torch.autograd.Variable._execution_engine.run_backward(
                tuple(outputs), vectors, True, False, inputs, allow_unreachable=True, accumulate_grad=False
            )
            reached[:] = [gradient is not None for gradient in gradients]
            return tuple(gradient for gradient in gradients if gradient is not None)

        with torch.enable_grad(), self._overrides(real_eps), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = iter(torch.vmap(pull_back)(*cotangents))
        return [next(found) if is_reached else None for is_reached in reached]

    def ignore_gradients(self, indices: Iterable[int]) -> None:
        """Let these parameters need no gradient from now on, unless the model differentiates by itself."""
        self._stand_ins.without_gradients(() if self._differentiates else indices)

    def widen(self) -> None:
        """Store all stand-ins in the type of the computation from now on."""
        self._stand_ins.widen()

    def _overrides(self, real_eps: bool) -> TorchOverrides:
        return TorchOverrides(
            1.0 if real_eps else self.eps_factor,
            self.dtype,
            self.mode.keep_branches,
            keep_layers=self._skips_layers and not self.mode.every_draw,
            shrink_constants=not self.mode.real_constants,
        )

    def release(self) -> None:
        """Drop the graph that the modules may still hold, and the clones of buffers."""
        self._stand_ins.restore()

    def _converted_copy(self, tensor: Tensor) -> Tensor:
        return converted(tensor.detach().clone(), self.dtype)


@dataclass(frozen=True)
class _Spread:
    """How far the values of a tensor move, as far as that depends on the tensor only.

    Attributes:
        rms: The root mean square of its values.
        constant: Whether all values are one constant below 0.05, as zero biases and layer scales are.
        has_zeros: Whether some values are zero, which get random signs.
    """

    rms: float
    constant: bool
    has_zeros: bool

    @staticmethod
    def of(original: Tensor) -> _Spread:
        """Return the spread of the values of ``original``."""
        low, high = original.aminmax()
        wide = torch.float64 if original.device.type != "mps" else None
        norms = [float(torch.linalg.vector_norm(chunk, dtype=wide)) for chunk in _chunks(original)]
        rms = math.sqrt(sum(n * n for n in norms) / original.numel())
        constant = bool(low == high) and abs(float(low)) < SMALL_CONSTANT
        return _Spread(rms, constant, any(bool((chunk == 0).any()) for chunk in _chunks(original)))


class _Noise:
    """Uniform numbers from a pool that is drawn once: drawing is slower than all arithmetic with them."""

    SIZE = (1 << 19) - 1  # prime, so that no two rows of a tensor get the same numbers

    def __init__(self) -> None:
        self._pools: dict[torch.device, Tensor] = {}

    def take(self, count: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """Return ``count`` numbers from 0 to 1 in float32, from a random place on."""
        if device not in self._pools:
            drawn = torch.Generator(device).manual_seed(20_011)
            pool = torch.rand(self.SIZE, generator=drawn, device=device, dtype=torch.float32)
            most = _values_at_once(device)
            self._pools[device] = pool.repeat(1 + -(-most // self.SIZE))[: self.SIZE + most]
        start = int(torch.randint(self.SIZE, (), generator=generator))
        return self._pools[device][start : start + count]


def generic_values(
    out: Tensor,
    original: Tensor,
    seed: int,
    jitter: float = JITTER,
    *,
    spread: _Spread | None = None,
    noise: _Noise | None = None,
) -> None:
    """Write random values near ``original``, with the same signs, into ``out``.

    Each value moves away from zero by up to ``jitter`` × (its size + the tensor's RMS); zeros get random
    signs. A tensor that holds one constant below 0.05 (zero biases, layer scales) gets values from 0.25 to
    0.75, divided by √fan_in if it is a matrix, so that its branch contributes.

    Args:
        out: The destination, contiguous, of any floating-point type.
        original: The model's values, of the same shape.
        seed: The number of the random values.
        jitter: The fraction; 0 leaves all values unchanged.
        spread: What was measured of ``original`` before.
        noise: The random numbers.
    """
    if not original.numel():
        return
    spread, noise = spread or _Spread.of(original), noise or _Noise()
    base, width = 0.0, jitter * spread.rms
    if spread.constant and jitter > 0:
        fan_in = original[0].numel() if original.ndim > 1 else 1
        base, width = 0.25 / fan_in**0.5, 0.5 / fan_in**0.5
    generator = torch.Generator().manual_seed(seed)
    for target, source in zip(_chunks(out), _chunks(original), strict=True):
        values = source.to(out.dtype)
        numbers = noise.take(values.numel(), values.device, generator).to(out.dtype)
        signs = torch.sign(values)
        if spread.has_zeros:
            signs = torch.where(values == 0, torch.sign(_remixed(numbers) - 0.5), signs)
        moved = torch.mul(numbers, width).add_(base).mul_(signs).add_(values)
        if base:
            moved.sub_(values)
        else:
            moved.addcmul_(values, numbers, value=jitter)
        target.copy_(moved)


def _scale_rows_and_columns(weight: Tensor, rows: Tensor, columns: Tensor | None = None) -> None:
    """Multiply each row and each column by its factor, in place, a few rows at a time."""
    if weight.ndim < 2:
        weight.mul_(rows.view(weight.shape))
        return
    inner = [1] * (weight.ndim - 2)
    step = max(1, _values_at_once(weight.device) // max(1, weight[:1].numel()))
    for some, factors in zip(weight.split(step), rows.split(step), strict=True):
        some.mul_(factors.view(-1, 1, *inner))
        if columns is not None:
            some.mul_(columns.view(1, -1, *inner))


def _layers(model: nn.Module, parameters: Sequence[Tensor]) -> dict[int, bool]:
    """Return {parameter: whether it is a bias} for the weights and biases of layers."""
    index = {id(p): k for k, p in enumerate(parameters)}
    layers: dict[int, bool] = {}
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is not None and weight.ndim > 1 and not weight.is_complex() and id(weight) in index:
            layers[index[id(weight)]] = False
            if bias is not None and id(bias) in index:
                layers[index[id(bias)]] = True
    return layers


def _balance(values: Tensor, *, is_bias: bool) -> None:
    """Make biases positive, and scale weights to a gain of one, with a mean that keeps ReLUs alive."""
    if not values.numel():
        return
    if is_bias:
        values.abs_()
        return
    fan_in = values[0].numel()
    size = float(torch.linalg.vector_norm(values)) / values.numel() ** 0.5
    if size > 0:
        values.mul_(0.5 / fan_in**0.5 / size).add_(1.0 / fan_in)


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Return the values of ``tensor`` in chunks: views if it is contiguous, else copies."""
    chunks: Sequence[Tensor] = tensor.reshape(-1).split(_values_at_once(tensor.device))
    return chunks


def _values_at_once(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else 16 * CHUNK


def _remixed(noise: Tensor) -> Tensor:
    """Return the low digits of the uniform ``noise``: uniform numbers that look independent of it."""
    return torch.remainder(noise * 4096.0, 1.0)


def _with_short_errors(run: Callable[[], Any], what: str, batch: Any) -> Any:
    """Return ``run()``; turn any error into one line that names ``what``, the place and the remedy."""
    try:
        return run()
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
            raise RuntimeError(
                f"out of memory in the probe of {what}: give smaller batches ({text})"
            ) from error
        raised = type(error) if type(error) in (ValueError, TypeError) else RuntimeError
        if type(error) not in (RuntimeError, ValueError, TypeError):
            text = f"{type(error).__name__}: {text}"
        raise raised(
            f"the model failed on {what}: give batches it can run, or {suggested_forward(batch)}: "
            f"{text}{place_of(error)}"
        ) from error


def place_of(error: BaseException) -> str:
    """Return where an error was raised: the last line outside torch, normwise and the standard library."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    standard = sysconfig.get_paths()["stdlib"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        in_standard = frame.filename.startswith(standard) and "site-packages" not in frame.filename
        if not in_standard and not frame.filename.startswith(libraries):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def check_model(model: Any) -> None:
    """Raise a one-line error if ``model`` cannot be probed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(
            "model contains a scripted module, whose parameters cannot be swapped: give the eager model"
        )
    trainable = False
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of a lazy module has no shape yet: run the model on one batch first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device: move the model to a real device first"
            )
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"parameter {name!r} is a DTensor: find the invariances before sharding the model"
            )
        trainable = trainable or (parameter.requires_grad and is_probed(parameter))
    if not trainable:
        raise ValueError(
            "model has no trainable parameter (none with requires_grad=True): unfreeze what will be trained"
        )


@contextlib.contextmanager
def preserved_random_state(devices: set[torch.device]) -> Iterator[None]:
    """Restore the random state of torch (on the CPU and on ``devices``), Python and numpy at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that models use
    cuda = [d for d in devices if d.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - see above


def _state_outside_torch() -> object:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002 - the state that models use
    return random.getstate(), np.asarray(keys).tobytes(), position


def _without_compilation(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the compiled modules of ``model`` run uncompiled."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    if compiled or "torch._dynamo" in sys.modules:
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
