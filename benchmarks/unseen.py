"""Results of nw.find_invariances on networks that it was not developed on, judged by brute force.

    python -m benchmarks.unseen [NAME ...]      # default: all; writes benchmarks/results/unseen.md
    python -m benchmarks.unseen --set-aside 1   # those of benchmarks.set_aside_networks; set_aside.md
    python -m benchmarks.unseen --set-aside 2   # those of benchmarks.set_aside_networks_2; set_aside_2.md
    python -m benchmarks.unseen --random 0-299  # of benchmarks.random_networks, by seed; random.md

Needs the `hf` extra, except for random networks. The judge shares no code with the search. It copies the
network in float64, with every module's eps times 1e-12 and dropout off, moves all values at random, and then

- scales every unit that is called invariant, and every parameter that is not, and compares outputs;
- replaces the values of parameters without effect;
- applies every joint symmetry;
- counts the joint symmetries of whole parameters: the nullity (SVD) of the matrix of Σwg. At a third of its
  points whole parameters are up to 16 times larger, so that no clamp is linear everywhere.

Scales are changed by factors of 3.7, 700 and 1/14. Each verdict and each symmetry is right, undetermined or
wrong; a symmetry that was not found is missed.
"""

from __future__ import annotations

import argparse
import copy
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.random_networks import random_network
from benchmarks.set_aside_networks import SET_ASIDE
from benchmarks.set_aside_networks_2 import SET_ASIDE_2
from benchmarks.unseen_networks import NETWORKS, Network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import normwise as nw
from normwise.invariance import Invariances, expand_parts, parameter_of

RESULTS = Path(__file__).parent / "results"
HEADER = (
    "| network | parameters | invariant | joint | right | undetermined | wrong | missed | seconds | remarks |"
)
CHANGED, UNCHANGED = 1e-9, 1e-4  # relative changes of outputs
FACTOR = 3.7
POWERS = (1, 5, -2)  # of the factor


class Judge:
    """A float64 copy of a network at a random point."""

    def __init__(
        self, network: Network, model: nn.Module, batch: Any, seed: int, *, wide: bool = False
    ) -> None:
        self.forward, self.seed = network.forward, seed
        self.model = copy.deepcopy(model).double().train()
        self.batch = _double(batch)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for module in self.model.modules():
            for name in ("eps", "epsilon", "variance_epsilon", "layer_norm_eps"):
                value = getattr(module, name, None)
                if isinstance(value, float):
                    setattr(module, name, value * 1e-12)
            for name in vars(module):
                if "drop" in name.lower() and isinstance(getattr(module, name), float):
                    setattr(module, name, 0.0)
            if type(module).__name__.startswith(("Dropout", "AlphaDropout")):
                module.eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters.values():
                if p.is_complex():
                    p.data = p.data.to(torch.complex128)
                if not p.is_floating_point():
                    continue
                noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
                varies = p.numel() > 1 and float(p.std()) > 0
                spread = float(p.abs().mean()) if varies else 0.3
                p.mul_(1 + 0.4 * noise)
                p.add_((torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.4) * spread)
                if wide:  # far enough that clamps clamp: what holds below a clamp only is no symmetry
                    p.mul_(2.0 ** (6 * float(torch.rand((), generator=generator)) - 2))
        self.buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        self.before = self.outputs()

    def run(self) -> list[Tensor]:
        """Return the outputs, with the same draws and buffers every time."""
        torch.manual_seed(self.seed)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _InDouble():
                return _tensors(self.forward(self.model, self.batch))
        finally:
            torch.set_default_dtype(default)

    def outputs(self) -> list[Tensor]:
        """Return the outputs without a graph."""
        with torch.no_grad():
            return [t.detach().clone() for t in self.run()]

    def change(self, edit: Callable[[dict[str, Tensor]], object], *names: str) -> float:
        """Return the relative change of the outputs when ``edit`` changes the parameters ``names``."""
        kept = {name: self.parameters[name].detach().clone() for name in names}
        with torch.no_grad():
            edit(self.parameters)
            after = self.outputs()
            for name, value in kept.items():
                self.parameters[name].copy_(value)
        changes = [
            float((b - a).norm() / a.norm().clamp_min(1e-300))
            for a, b in zip(self.before, after, strict=True)
            if a.numel()
        ]
        return max(changes, default=0.0)

    def elasticities(self, names: list[str], rows: int) -> np.ndarray[Any, Any]:
        """Return Σwg for random cotangents, rows × parameters."""
        found = []
        wanted = [self.parameters[n] for n in names]
        flags = {n: p.requires_grad for n, p in self.parameters.items()}
        for p in wanted:
            p.requires_grad_()
        outputs = [t for t in self.run() if t.requires_grad]
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(rows):
            total = sum(
                (torch.randn(t.shape, generator=generator, dtype=torch.float64) * t).sum() / t.detach().norm()
                for t in outputs
            )
            gradients = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
            found.append(
                [
                    0.0
                    if g is None
                    else float(
                        (g.conj() * p.detach()).real.sum() if p.is_complex() else (g * p.detach()).sum()
                    )
                    for g, p in zip(gradients, wanted, strict=True)
                ]
            )
        for n, flag in flags.items():
            self.parameters[n].requires_grad_(flag)
        return np.array(found)


class _InDouble(TorchFunctionMode):
    """Casts to other floating-point types become casts to float64; F.layer_norm has a tiny eps."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {k: _wide(v) for k, v in (kwargs or {}).items()}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func is F.layer_norm and len(args) < 5:
            kwargs["eps"] = 1e-17
        return func(*map(_wide, args), **kwargs)


def _wide(argument: Any) -> Any:
    is_narrow = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if is_narrow else argument


def _double(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: _double(v) for k, v in tree.items()}
    return tuple(map(_double, tree)) if isinstance(tree, (tuple, list)) else tree


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [torch.view_as_real(outputs) if outputs.is_complex() else outputs]
    return [t for item in outputs for t in _tensors(item)]


@dataclass
class Score:
    """How many verdicts and symmetries are right, undetermined or wrong, how many are missed, and why."""

    right: int = 0
    undetermined: int = 0
    wrong: int = 0
    missed: int = 0
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, is_right: bool, what: str) -> None:
        """Count a verdict or a symmetry."""
        self.right += is_right
        self.wrong += not is_right
        if not is_right:
            self.remarks.append(f"{name}: {what}")


def scaled(
    weight: Tensor, dim: int | None, mask: Tensor | None, blocks: list[tuple[int, int]], power: int
) -> None:
    """Scale each unit of a weight by a factor of its own, in place."""
    if dim is None:
        weight.mul_(FACTOR**power)
        return
    factors = 2.0 ** (power * (torch.rand(weight.shape[dim], dtype=torch.float64) * 4 - 2))
    if mask is not None:
        factors[~mask] = 1.0
        for a, b in blocks:
            factors[a:b] = FACTOR**power
    weight.mul_(factors.view([-1 if d == dim else 1 for d in range(weight.ndim)]))


def judged(inv: Invariances, judges: list[Judge]) -> Score:
    """Judge every verdict and every symmetry."""
    score = Score()
    torch.manual_seed(1)
    for name in inv.names:
        if name in inv.undetermined:
            score.undetermined += 1
            score.remarks.append(f"{name}: undetermined, {inv.undetermined[name]}")
        else:
            _judge_verdict(name, inv, judges, score)
    for symmetry in inv.joint:
        names = {parameter_of(key) for key in symmetry}

        def rescale(p: dict[str, Tensor], power: int, symmetry: dict[str, int] = symmetry) -> None:
            for key, exponent in symmetry.items():
                name = parameter_of(key)
                eval("p" + key.removeprefix(name), {"p": p[name]}).mul_(FACTOR ** (power * exponent))

        change = _largest_change(judges, rescale, *names)
        score.add(str(symmetry), change < UNCHANGED, f"symmetry changes by {change:.0e}")
    return score


def _largest_change(
    judges: list[Judge], edit: Callable[[dict[str, Tensor], int], object], *names: str
) -> float:
    """Return the largest change of the outputs over all points and all powers of the factor."""

    def change(judge: Judge, power: int) -> float:
        return judge.change(lambda parameters: edit(parameters, power), *names)

    return max(change(judge, power) for judge in judges for power in POWERS)


def _judge_verdict(name: str, inv: Invariances, judges: list[Judge], score: Score) -> None:
    evidence = inv.evidence[name]
    dim, mask = inv.partial.get(name, (inv.scale_invariant.get(name), None))
    blocks = evidence.blocks if mask is not None else []

    def edit(p: dict[str, Tensor], power: int) -> None:
        if evidence.verdict == "no effect":
            p[name].mul_(FACTOR**power).add_(0.3)
        elif evidence.verdict == "not invariant":
            p[name].mul_(FACTOR**power)
        else:
            scaled(p[name], dim, mask, blocks, power)

    change = _largest_change(judges, edit, name)
    right = change > CHANGED if evidence.verdict == "not invariant" else change < UNCHANGED
    score.add(name, right, f"{evidence.verdict}, changes by {change:.0e}")


def columns(inv: Invariances) -> list[str]:
    """Return the parameters that may be in symmetries."""
    return [n for n in inv.names if n in inv.not_invariant or n in inv.partial]


def nullity(inv: Invariances, network: Network, model: nn.Module, batches: list[Any]) -> int:
    """Return how many independent symmetries of whole parameters there are."""
    names = columns(inv)
    rows: list[np.ndarray[Any, Any]] = []
    while names and (sum(map(len, rows)) < len(names) + 12 or len(rows) < 12):
        wide = len(rows) % 3 == 2
        judge = Judge(network, model, batches[len(rows) % len(batches)], 200 + len(rows), wide=wide)
        per_point = max(1, min(8, sum(t.numel() for t in judge.before) // 2))
        rows.append(judge.elasticities(names, per_point))
    if not rows:
        return 0
    matrix = np.concatenate(rows)
    usable = np.isfinite(matrix).all(axis=1) & matrix.any(axis=1)  # values may be too large together, or dead
    matrix = matrix[usable]
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix /= np.sqrt(np.mean(matrix**2, axis=0)).clip(1e-300)
    values = np.linalg.svd(matrix, compute_uv=False)
    return len(names) - int(np.sum(values > 1e-8 * len(matrix) ** 0.5))


def whole_symmetries(inv: Invariances) -> int:
    """Return the dimension of the found symmetries that scale whole parameters."""
    names = columns(inv)
    keys = [key for name in names for key in inv.parts.get(name, [name])]
    basis = np.array([[expand_parts(s, inv.parts).get(k, 0) for k in keys] for s in inv.joint], dtype=float)
    differences = [
        (keys.index(parts[0]), keys.index(other)) for parts in inv.parts.values() for other in parts[1:]
    ]
    if not len(basis):
        return 0
    if not differences:
        return len(basis)
    conditions = np.stack([basis[:, a] - basis[:, b] for a, b in differences], axis=1)
    return len(basis) - int(np.linalg.matrix_rank(conditions))


def row(name: str, network: Network) -> tuple[str, Score]:
    """Return a row of the table."""
    torch.manual_seed(0)
    model, batches = network.build(), network.batches()
    start = time.perf_counter()
    inv = nw.find_invariances(model, batches, network.forward, progress=False)
    seconds = time.perf_counter() - start
    judges = [Judge(network, model, batch, 100 + i) for i, batch in enumerate(batches[:2])]
    score = judged(inv, judges)
    score.missed = nullity(inv, network, model, batches) - whole_symmetries(inv)
    if score.missed:
        score.remarks.append(f"{score.missed:+d} symmetries of whole parameters by brute force")
    if inv.unnamed_joint:
        score.remarks.append(f"{inv.unnamed_joint} symmetries without names")
    remarks = "; ".join(r.replace("|", "/")[:160] for r in score.remarks[:3])
    if len(score.remarks) > 3:
        remarks += f"; and {len(score.remarks) - 3} more"
    if inv.stats.note:
        remarks = f"float32; {remarks}"
    invariant = len(inv.scale_invariant) + len(inv.partial)
    cells = [name, len(inv.names), invariant, len(inv.joint), score.right, score.undetermined]
    cells += [score.wrong, score.missed, f"{seconds:.1f}", remarks]
    return "| " + " | ".join(map(str, cells)) + " |", score


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description="Judge nw.find_invariances by brute force.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; default: all")
    parser.add_argument("--set-aside", type=int, choices=(1, 2), help="the first or second list set aside")
    parser.add_argument("--random", metavar="A-B", help="random networks with these seeds")
    arguments = parser.parse_args()
    networks, page = NETWORKS, "unseen.md"
    if arguments.set_aside == 1:
        networks, page = SET_ASIDE, "set_aside.md"
    elif arguments.set_aside == 2:
        networks, page = SET_ASIDE_2, "set_aside_2.md"
    if arguments.random:
        first, last = map(int, arguments.random.split("-"))
        networks, page = (
            {f"random {seed}": random_network(seed) for seed in range(first, last + 1)},
            "random.md",
        )
    lines = [HEADER, "|---" * 10 + "|"]
    print("\n".join(lines), flush=True)
    total, failed, clean = Score(), 0, 0
    for name, network in networks.items():
        if arguments.names and name not in arguments.names:
            continue
        try:
            line, score = row(name, network)
        except Exception as error:  # a crash is a result
            failed += 1
            text = (str(error) or type(error).__name__).splitlines()[0][:160].replace("|", "/")
            line = f"| {name} | | | | | | | | | failed: {type(error).__name__}: {text} |"
            if arguments.names:
                traceback.print_exc()
        else:
            for key in ("right", "undetermined", "wrong", "missed"):
                setattr(total, key, getattr(total, key) + getattr(score, key))
            clean += not (score.undetermined or score.wrong or score.missed)
        lines.append(line)
        print(line, flush=True)
    summary = (
        f"{len(lines) - 2} networks, {clean} without a fault, {failed} failed. Verdicts and symmetries: "
        f"{total.right} right, {total.undetermined} undetermined, {total.wrong} wrong; {total.missed} missed."
    )
    print(summary)
    if not arguments.names:
        (RESULTS / page).write_text("\n".join([summary, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
