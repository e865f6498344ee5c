"""Training of a user's own network, on her own data and loss."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

import normwise as nw
from normwise.inspection.models import called, load
from normwise.lab.engine.run import Log, Metrics, Run
from normwise.lab.runs.devices import Execution, device_named

__all__ = ["OPTIMIZERS", "PARTS", "RULES", "OwnRun", "Parts", "own_parts", "source_of"]

RULES = ("none", "l2", "aws")
OPTIMIZERS = ("sgd", "adamw")
PARTS = ("train", "validation", "test")
_LINES = 40  # of metrics per run


class Parts(NamedTuple):
    """The three functions that a user's ``setup()`` returns.

    Attributes:
        model: () → a new network; called under a fixed random seed.
        data: (part, seed) → the batches, pairs of inputs and targets, of "train" (those of one whole
            training, in an order that may depend on the seed), "validation" or "test". Inputs are a tensor,
            a tuple of arguments or a mapping of keyword arguments.
        loss: (outputs, targets) → the mean loss of a batch.
    """

    model: Callable[[], nn.Module]
    data: Callable[[str, int], Iterable[tuple[Any, Any]]]
    loss: Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class OwnRun(Run):
    """Train the network of a ``setup`` and evaluate it.

    The rule acts on the weights that ``normwise.plan`` finds scale-invariant. Nothing else is decayed. The
    learning rate follows half a cosine from ``lr`` towards zero.

    Attributes:
        target: ``package.module:setup``.
        source: SHA-256 of the file of that module.
        rule: "none"; "l2", by its flow, with the coefficient 3/Σlr times ``multiple``; or "aws" with nothing
            tuned, from equilibrium.
        multiple: See ``rule``.
        optimizer: "sgd" with momentum 0.9, or "adamw" with the usual β.
        lr: Peak learning rate.
        init_scale: Factor on the initial weights that are scale-invariant alone, which changes no output.
        seed: Seed of the initial weights, and what the data are asked for.
    """

    target: str
    source: str
    rule: str = "aws"
    multiple: float = 1.0
    optimizer: str = "sgd"
    lr: float = 0.1
    init_scale: float = 1.0

    @property
    def cost(self) -> float:
        """A guess: it is not known before the first run."""
        return 30.0

    def run(self, log: Log) -> Metrics:
        """Train on the CPU; see :meth:`run_in`."""
        return self.run_in(None, None, log)

    def run_in(self, folder: Path | None, execution: Any, log: Log) -> Metrics:
        """Train and evaluate. Of ``execution``, an :class:`Execution`, the device counts.

        Returns:
            The summary. ``status`` is "finished" or "not finite", ``step`` the last step, ``initial_loss``
            the test loss of the initial network. A finished run has validation_loss and test_loss.
        """
        device = device_named((execution or Execution(device="cpu")).device)
        parts = own_parts(self.target)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = _made(parts, self.target)
            plan = _planned(self.target, self.source).apply_to(model)
            if self.init_scale != 1:
                _scale(model, plan, self.init_scale)
            model.to(device)
            plan = plan.apply_to(model)
            batches = _batches(parts, "train", self.seed)
            lrs = [self.lr * 0.5 * (1 + math.cos(math.pi * k / len(batches))) for k in range(len(batches))]
            optimizer = self._optimizer(model, plan, lrs)
            held_out = {part: _batches(parts, part, 0) for part in PARTS[1:]}
            initial = _evaluated(parts, model, held_out["test"], device)
            losses: list[Tensor] = []
            every = max(1, len(batches) // _LINES)
            model.train()
            for step, (lr, batch) in enumerate(zip(lrs, batches, strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                loss = _loss(parts, model, batch, device)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if (step + 1) % every == 0 or step + 1 == len(batches):
                    mean = float(torch.stack(losses).mean())
                    losses.clear()
                    if not math.isfinite(mean):
                        return _unfinished(step + 1, f"the training loss was {mean}", initial)
                    log({"step": step + 1, "train_loss": mean, "lr": lr})
            summary: Metrics = {"status": "finished", "step": len(batches), "initial_loss": initial}
            for part, of_part in held_out.items():
                summary[f"{part}_loss"] = _evaluated(parts, model, of_part, device)
        if not all(math.isfinite(summary[f"{part}_loss"]) for part in held_out):
            return _unfinished(len(batches), "the final loss is not finite", initial)
        return summary

    def _optimizer(self, model: nn.Module, plan: nw.Plan, lrs: list[float]) -> Optimizer:
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer: Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(weights, self.lr, 0.9)
        else:
            optimizer = torch.optim.AdamW(weights, self.lr, weight_decay=0.0)
        time = sum(lrs)
        if self.rule == "aws":
            plan.attach(optimizer, time, announce=lambda line: None)
        elif self.rule == "l2":
            nw.Decay(optimizer, nw.L2(3.0 / time * self.multiple), plan.units)
        return optimizer


def own_parts(target: str) -> Parts:
    """Return what ``setup()`` returns.

    Raises:
        ValueError: It cannot be found, raises, or returns something else.
    """
    found = called(target, load(target))
    if not isinstance(found, tuple) or len(found) != 3 or not all(map(callable, found)):
        raise ValueError(
            f"{target!r} returned a {type(found).__name__}: return the three functions model, data and loss"
        )
    return Parts(*found)


def source_of(target: str) -> str:
    """Return the SHA-256 of the file of the module that a target names, on which the results depend."""
    value = load(target)
    file = inspect.getsourcefile(inspect.unwrap(value)) if callable(value) else None
    if file is None:
        raise ValueError(f"{target!r} is not a function in a file: give package.module:setup")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _made(parts: Parts, target: str) -> nn.Module:
    model = parts.model()
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{target!r}: model() made a {type(model).__name__}, and a torch.nn.Module is needed"
        )
    return model


@lru_cache(maxsize=1)
def _planned(target: str, source: str) -> nw.Plan:
    """Return the plan of a network of a target. It is cached, as all runs share it."""
    parts = own_parts(target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _made(parts, target)
        found = nw.plan(model, [inputs for inputs, _ in _batches(parts, "train", 0)[:4]], progress=False)
    if not found.units:
        raise ValueError(
            f"{target!r}: no weight of its model is scale-invariant, so there is nothing to compare"
        )
    return found


@torch.no_grad()
def _scale(model: nn.Module, plan: nw.Plan, scale: float) -> None:
    """Multiply the weights that are scale-invariant as a whole and alone."""
    weights = dict(model.named_parameters())
    for treatment in plan.treatments:
        alone = treatment.verdict == "shrink" and not treatment.symmetry and treatment.mask is None
        if alone and not treatment.in_blocks:
            weights[treatment.name].mul_(scale)


def _batches(parts: Parts, part: str, seed: int) -> list[tuple[Any, Any]]:
    batches = list(parts.data(part, seed))
    if not batches:
        raise ValueError(f"data({part!r}, {seed}) gave no batches")
    return batches


def _loss(parts: Parts, model: nn.Module, batch: tuple[Any, Any], device: torch.device) -> Tensor:
    inputs, targets = tree_map(partial(_moved, device=device), batch)
    if isinstance(inputs, tuple):
        return parts.loss(model(*inputs), targets)
    return parts.loss(model(**inputs) if isinstance(inputs, dict) else model(inputs), targets)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def _evaluated(parts: Parts, model: nn.Module, batches: list[tuple[Any, Any]], device: torch.device) -> float:
    """Return the mean loss over batches, which count alike."""
    model.eval()
    losses = [_loss(parts, model, batch, device) for batch in batches]
    model.train()
    return float(torch.stack(losses).mean())


def _unfinished(step: int, reason: str, initial: float) -> Metrics:
    return {"status": "not finite", "step": step, "reason": reason, "initial_loss": initial}
