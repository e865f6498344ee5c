"""One matrix for every rule beside every optimizer, in every mode, on every clock, along every dim.

Mode "flow" also applies the rule at every second step.

Each cell takes three steps with two parameter groups whose learning rates change at every step, one decayed
parameter without a gradient and one parameter that is not decayed. A bare optimizer without a rule is given
what the optimizer saw when its step began. Where the rule acts before the step or through the gradient, the
bare optimizer must end at the same bits; where it acts after the step, within 8 ULP of each unit's norm of
the slow reference below, and so must what the optimizer saw.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer, RMSprop

import normwise as nw
from normwise.decay.clock import CLOCKS
from normwise.decay.rules import RULES, Rule

RULE_CASES: dict[str, Rule] = {
    "L2": nw.L2(0.02),
    "AdaptiveWeightShrink": nw.AdaptiveWeightShrink(0.02),
    "PowerShrink": nw.PowerShrink(0.02, 1.7),
    "EpsilonShiftedL2": nw.EpsilonShiftedL2(0.02, epsilon=0.5),
    "Sphere": nw.Sphere(1.5),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD momentum loop": lambda p: SGD(p, momentum=0.9, foreach=False),
    "SGD nesterov foreach": lambda p: SGD(p, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: SGD(p, momentum=0.9, fused=True),
    "SGD maximize": lambda p: SGD(p, maximize=True),
    "Adam": lambda p: Adam(p),
    "Adam foreach": lambda p: Adam(p, amsgrad=True, foreach=True),
    "Adam fused": lambda p: Adam(p, fused=True),
    "AdamW": lambda p: AdamW(p, weight_decay=0),
    "AdamW fused": lambda p: AdamW(p, weight_decay=0, fused=True),
    "Adagrad": lambda p: Adagrad(p),
    "Adagrad fused": lambda p: Adagrad(p, fused=True),
    "RMSprop": lambda p: RMSprop(p, momentum=0.5, centered=True),
    "Adafactor": lambda p: Adafactor(p),
    "LBFGS": lambda p: LBFGS(p[0]["params"] + p[1]["params"], max_iter=3),
    "Lion (pytorch_optimizer)": lambda p: pytorch_optimizer.Lion(p, weight_decay=0),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, weight_decay=0)
MODES = ("flow", "explicit", "coupled")
DIMS = (0, 1, None)


class Cell(NamedTuple):
    """What a test holds fixed; clocks and dims are run through inside it."""

    optimizer: str
    rule: str
    mode: str


CELLS = [
    Cell(optimizer, name, mode)
    for optimizer, (name, rule), mode in itertools.product(OPTIMIZERS, RULE_CASES.items(), MODES)
    if mode in rule.modes and (optimizer != "LBFGS" or mode == "flow")
]


def runs(cell: Cell, full: bool) -> Iterator[tuple[str, int | None, int]]:
    """The clocks, dims and values of ``every`` in a cell; mode "coupled" has no clock.

    Unless ``full``, each clock has one dim, which takes turns over the cells.
    """
    turn = CELLS.index(cell)
    for i, clock in enumerate(CLOCKS if cell.mode != "coupled" else ("lr",)):
        for j, dim in enumerate(DIMS):
            if full or (i + j + turn) % len(DIMS) == 0:
                yield clock, dim, 1
    if cell.mode == "flow":
        for k, (clock, dim) in enumerate(zip(CLOCKS, DIMS, strict=True)):
            if full or (k + turn) % len(DIMS) == 0:
                yield clock, dim, 2


def test_every_rule_is_in_the_matrix() -> None:
    assert {type(rule) for rule in RULE_CASES.values()} == set(RULES)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell))
def test_matrix(cell: Cell, full: bool) -> None:
    for clock, dim, every in runs(cell, full):
        run(cell, clock, dim, every, f"clock={clock}, dim={dim}, every={every}")


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 4), (3, 6), (4, 2), (2, 2)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def built(name: str, params: list[torch.nn.Parameter]) -> Optimizer:
    first, second, idle, undecayed = params
    groups = [{"params": [first, idle], "lr": 0.1}, {"params": [second, undecayed], "lr": 0.03}]
    return OPTIMIZERS[name](groups)


def run(cell: Cell, clock: str, dim: int | None, every: int, what: str) -> None:
    rule, params, bare_params = RULE_CASES[cell.rule], parameters(), parameters()
    first, second, idle, _ = params
    optimizer, bare = built(cell.optimizer, params), built(cell.optimizer, bare_params)
    nw.Decay(optimizer, rule, [first, second, idle], dim=dim, mode=cell.mode, clock=clock, every=every)
    seen: list[tuple[Tensor, Tensor | None]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(
            (p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in params
        )
    )
    generator = torch.Generator().manual_seed(4)
    lrs, peaks, elapsed = [0.1, 0.2, 0.05], [0.0, 0.0], [0.0, 0.0]
    for step, lr in enumerate(lrs):
        for group, bare_group, factor in zip(
            optimizer.param_groups, bare.param_groups, (1, 0.3), strict=False
        ):
            group["lr"] = bare_group["lr"] = lr * factor
        before = [p.detach().clone() for p in params]
        given = [torch.randn(p.shape, generator=generator) for p in params]
        for param, grad in zip(params, given, strict=True):
            param.grad = None if param is idle else grad.clone()
        seen.clear()
        if cell.optimizer == "LBFGS":
            optimizer.step(functools.partial(quadratic, params, given, skip=2))
            bare.step(functools.partial(quadratic, bare_params, given, skip=2))
        else:
            optimizer.step()
            for bare_param, (weight, saw) in zip(bare_params, seen, strict=True):
                bare_param.data.copy_(weight)
                bare_param.grad = None if saw is None else saw.clone()
            bare.step()
        sign = -1 if optimizer.param_groups[0].get("maximize") else 1
        groups = [min(k % 2, len(optimizer.param_groups) - 1) for k in range(4)]
        peaks = [max(peak, g["lr"]) for peak, g in zip(peaks, optimizer.param_groups, strict=False)]
        for k, (param, other) in enumerate(zip(params, bare_params, strict=True)):
            rate = optimizer.param_groups[groups[k]]["lr"]
            time = {"lr": rate, "lr^2/max_lr": rate**2 / peaks[groups[k]], "step": 1.0}[clock]
            decayed = param is first or param is second
            if cell.optimizer != "LBFGS":
                kept = (
                    given[k] if decayed and cell.mode == "coupled" else other.grad
                )  # some optimizers write into it
                assert param is idle or torch.equal(param.grad, kept), f"gradient changed: {what}"  # type: ignore[arg-type]
                expected = (
                    slow_sight(rule, cell.mode, before[k], given[k], dim, time, sign) if decayed else None
                )
                weight, saw = expected or (before[k], given[k])
                close(seen[k][0], weight, dim, f"weight {k} as seen, {what}", before[k])
                if param is not idle:
                    scale = weight if decayed and cell.mode == "coupled" else saw
                    close(seen[k][1], saw, dim, f"gradient {k} as seen, {what}", scale)  # type: ignore[arg-type]
            if decayed and cell.mode == "flow":
                elapsed[k] += time
            if decayed and cell.mode == "flow" and (step + 1) % every == 0:
                close(param.detach(), slow_flow(rule, other.detach(), dim, elapsed[k]), dim, f"{k}, {what}")
                elapsed[k] = 0.0
            else:
                assert torch.equal(param, other), f"parameter {k} differs from the bare optimizer: {what}"
            other.data.copy_(param.data)


def quadratic(params: list[torch.nn.Parameter], targets: list[Tensor], skip: int) -> float:
    loss = torch.zeros(())
    for k, (param, target) in enumerate(zip(params, targets, strict=True)):
        param.grad = None
        if k != skip:
            loss = loss + (param - target).square().sum()
    loss.backward()
    return loss.item()


# -- the slow reference: one unit after the other, in float64 ----------------------------------------------


def slices(weight: Tensor, dim: int | None) -> list[tuple[slice | int, ...]]:
    if dim is None:
        return [(slice(None),)]
    return [(*[slice(None)] * dim, k) for k in range(weight.shape[dim])]


def slow_flow(rule: Rule, weight: Tensor, dim: int | None, time: float) -> Tensor:
    result = weight.double()
    for part in slices(weight, dim):
        norm = result[part].norm().item()
        result[part] *= rule.flow(norm, time).item() / norm
    return result


def slow_sight(
    rule: Rule, mode: str, weight: Tensor, grad: Tensor, dim: int | None, time: float, sign: int
) -> tuple[Tensor, Tensor]:
    """The weight and the gradient that the optimizer must see when its step begins."""
    weight, grad = weight.double(), grad.double()
    for part in slices(weight, dim):
        if mode == "explicit":
            weight[part] *= 1 - time * rule.rate(weight[part].norm().item()).item()
        elif mode == "coupled":
            grad[part] += sign * rule.rate(weight[part].norm().item()).item() * weight[part]
    return weight, grad


def close(actual: Tensor, expected: Tensor, dim: int | None, what: str, scale: Tensor | None = None) -> None:
    """Within 8 ULP of each unit's norm (of the larger one, where ``scale`` gives a second)."""
    others = [k for k in range(actual.ndim) if k != dim]
    sizes = [
        torch.linalg.vector_norm(one.double(), dim=others) for one in (expected, scale) if one is not None
    ]
    error = torch.linalg.vector_norm(actual.double() - expected, dim=others)
    allowed = 8 * torch.finfo(actual.dtype).eps * functools.reduce(torch.maximum, sizes)
    assert bool((error <= allowed).all()), f"{what}: off by {error.tolist()}, allowed {allowed.tolist()}"
