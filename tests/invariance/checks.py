"""What tests of the invariances share: comparing spaces of symmetries, rescaling, snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from normwise.invariance import Invariances, expand_parts


def rank_of(symmetries: list[dict[str, int]], names: list[str]) -> int:
    rows = [[s.get(name, 0) for name in names] for s in symmetries]
    return int(np.linalg.matrix_rank(np.array(rows, dtype=np.float64))) if rows else 0


def assert_same_space(
    found: list[dict[str, int]],
    expected: list[dict[str, int]],
    names: list[str],
    parts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Assert that ``found`` is a basis of the space that ``expected`` spans; ``parts`` are inv.parts."""
    parts = parts or {}
    names = list(expand_parts(dict.fromkeys(names, 1), parts))
    found, expected = [expand_parts(s, parts) for s in found], [expand_parts(s, parts) for s in expected]
    dimension = rank_of(expected, names)
    assert len(found) == rank_of(found, names) == dimension, f"found {found}, expected {expected}"
    assert rank_of(found + expected, names) == dimension, f"found {found}, expected {expected}"
    assert {name for s in [*found, *expected] for name in s} <= set(names)


def assert_every_parameter_has_one_verdict(inv: Invariances) -> None:
    verdicts: list[Iterable[str]] = [
        inv.scale_invariant,
        inv.partial,
        inv.no_effect,
        inv.not_invariant,
        inv.undetermined,
    ]
    listed = [str(name) for names in verdicts for name in names]
    assert sorted(listed) == sorted(inv.names)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that must be the same afterwards: identities, values, gradients, flags, hooks."""
    return {
        "parameters": [
            (
                n,
                id(p),
                p.detach().clone(),
                p.requires_grad,
                None if p.grad is None else p.grad.clone(),
                p._version,
            )
            for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(n, id(b), b.clone()) for n, b in model.named_buffers()],
        "flags": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [
            (
                list(m._forward_hooks.items()),
                list(m._forward_pre_hooks.items()),
                list(m._backward_hooks.items()),
            )
            for m in model.modules()
        ],
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)
