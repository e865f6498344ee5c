"""Slow float64 runs on a small scale-invariant network, with a decay rule or without one.

Written from the equations: they share no code with the library but the rules.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import normwise as nw
from normwise.decay.rules import Rule
from normwise.theory import UndecayedSteps

STEPS = 160
BETAS, EPS = (0.9, 0.98), 1e-2  # an ε that matters
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


INPUTS, TARGETS = draw(64, 6), draw(64, 2)
# Rows of many lengths, so that a rule that is not L2 treats every unit differently; none so short, and the
# learning rates so small, that training is calm: a change in the last place grows to at most 2e-11 rad.
WEIGHTS = [
    torch.nn.functional.normalize(draw(8, 6)) * torch.logspace(-0.5, 0.5, 8, dtype=torch.float64)[:, None],
    draw(5, 8),
]
HEAD = draw(2, 5)

RULES: list[Rule] = [
    nw.L2(0.3),
    nw.AdaptiveWeightShrink(0.1),
    nw.PowerShrink(0.02, power=2.0),
    nw.EpsilonShiftedL2(0.3, epsilon=0.5),
    nw.Sphere(2.0),
]
SCHEDULES = {
    "constant": torch.full((STEPS,), 0.015, dtype=torch.float64),
    "warm-up and cosine": torch.cat(  # begins and ends with a learning rate of 0
        [
            torch.linspace(0.0, 0.03, 30, dtype=torch.float64),
            0.015 + 0.015 * torch.cos(torch.linspace(0, math.pi, STEPS - 30, dtype=torch.float64)),
        ]
    ),
}


def row_norms(weight: Tensor) -> Tensor:
    return (weight * weight).sum(dim=1).sqrt()


def outputs(weights: list[Tensor], head: Tensor, hidden: Tensor = INPUTS) -> Tensor:
    for weight in weights:
        hidden = torch.tanh(2 * hidden @ (weight / row_norms(weight)[:, None]).T)
    return hidden @ head.T


def loss(weights: list[Tensor], head: Tensor, step: int) -> Tensor:
    """The loss on the minibatch of this step."""
    batch = torch.arange(16) + 16 * (step % 4)
    return (outputs(weights, head)[batch] - TARGETS[batch]).square().mean()


def gradients(weights: list[Tensor], head: Tensor, step: int) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (*weights, head)]
    return list(torch.autograd.grad(loss(leaves[:-1], leaves[-1], step), leaves))


class Run:
    """Weights as they stand, norms that the rule saw at each step, and norms at the start of each step."""

    def __init__(self) -> None:
        self.weights, self.head = list(WEIGHTS), HEAD
        self.seen: list[list[Tensor]] = [[] for _ in WEIGHTS]
        self.starts: list[list[Tensor]] = [[] for _ in WEIGHTS]

    def norms(self, which: int) -> Tensor:
        return torch.stack(self.seen[which])

    def angle(self, other: Run) -> float:
        """The largest angle between the units of two runs."""
        angles = []
        for mine, theirs in zip(self.weights, other.weights, strict=True):
            a, b = mine / row_norms(mine)[:, None], theirs / row_norms(theirs)[:, None]
            angles.append(2 * torch.atan2(row_norms(a - b), row_norms(a + b)).max())
        return torch.stack(angles).max().item()


def decayed_sgd(rule: Rule, lrs: Tensor, momentum: float, mode: str, times: Tensor | None = None) -> Run:
    run = Run()
    buffers = [torch.zeros_like(w) for w in (*WEIGHTS, HEAD)]
    for step, (lr, time) in enumerate(zip(lrs, lrs if times is None else times, strict=True)):
        grads = gradients(run.weights, run.head, step)
        now = rule.at(step)
        for k, weight in enumerate(run.weights):
            norm = row_norms(weight)
            run.starts[k].append(norm)
            if mode == "coupled":
                grads[k] = grads[k] + now.rate(norm)[:, None] * weight
            buffers[k] = momentum * buffers[k] + grads[k]
            if mode == "explicit":
                weight = weight - time * now.rate(norm)[:, None] * weight
            weight = weight - lr * buffers[k]
            if mode == "flow":
                norm = row_norms(weight)
                weight = weight * (now.flow(norm, time) / norm)[:, None]
            run.seen[k].append(norm)
            run.weights[k] = weight
        buffers[-1] = momentum * buffers[-1] + grads[-1]
        run.head = run.head - lr * buffers[-1]
    return run


def undecayed_sgd(lrs: Tensor, momentum: float, steps: list[UndecayedSteps] | None = None) -> Run:
    """With the given steps of each unit; None: naively, with the learning rate of the decayed run."""
    run = Run()
    buffers = [torch.zeros_like(w) for w in (*WEIGHTS, HEAD)]
    for step, lr in enumerate(lrs):
        grads = gradients(run.weights, run.head, step)
        for k, grad in enumerate(grads[:-1]):
            run.starts[k].append(row_norms(run.weights[k]))
            buffers[k] = (steps[k].momentum[step][:, None] if steps else momentum) * buffers[k] + grad
            run.weights[k] = run.weights[k] - (steps[k].lr[step][:, None] if steps else lr) * buffers[k]
        buffers[-1] = momentum * buffers[-1] + grads[-1]
        run.head = run.head - lr * buffers[-1]
    return run


def adam(rule: Rule | None, mode: str, lrs: Tensor, steps: list[UndecayedSteps] | None = None) -> Run:
    """Adam with a decoupled rule, or without one and with the steps that replace it."""
    run = Run()
    tensors = [*WEIGHTS, HEAD]
    first = [torch.zeros_like(w) for w in tensors]
    second = [torch.zeros_like(w) for w in tensors]
    one = torch.ones(1, 1, dtype=torch.float64)
    for t, lr in enumerate(lrs):
        for k, grad in enumerate(gradients(tensors[:-1], tensors[-1], t)):
            ratio, scale, size = one, one, lr * one
            if steps and k < 2:
                ratio, scale, size = (x[t][:, None] for x in (steps[k].ratio, steps[k].scale, steps[k].lr))
            first[k] = BETAS[0] * ratio * first[k] + (1 - BETAS[0]) * grad
            second[k] = BETAS[1] * ratio**2 * second[k] + (1 - BETAS[1]) * grad**2
            denominator = (second[k] / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS * scale
            update = size * first[k] / (1 - BETAS[0] ** (t + 1)) / denominator
            tensors[k], norm = shrunk(tensors[k], update, rule if k < 2 else None, mode, lr)
            if k < 2:
                run.seen[k].append(norm)
    *run.weights, run.head = tensors
    return run


def shrunk(
    weight: Tensor, update: Tensor, rule: Rule | None, mode: str, time: Tensor
) -> tuple[Tensor, Tensor]:
    """Subtract the update and shrink by a decoupled rule; return the weight and the norms that it saw."""
    norm = row_norms(weight)
    if rule is None:
        return weight - update, norm
    if mode == "explicit":
        return weight - time * rule.rate(norm)[:, None] * weight - update, norm
    weight = weight - update
    norm = row_norms(weight)
    return weight * (rule.flow(norm, time) / norm)[:, None], norm


@functools.cache
def naive_sgd(schedule: str, momentum: float) -> Run:
    return undecayed_sgd(SCHEDULES[schedule] * (1 - momentum), momentum)
