"""Networks whose plans are derived by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tests.invariance.networks import CASES
from torch import nn

from normwise.planning.plan import Plan, plan


def made(name: str) -> tuple[nn.Module, list[Any]]:
    """Return a network of the invariances' tests, and batches."""
    torch.manual_seed(0)
    return CASES[name].build(), CASES[name].batches()


@functools.cache
def shared(name: str) -> tuple[nn.Module, Plan]:
    """Return a network and its plan, found once; neither may be changed."""
    return planned(name)


def planned(name: str, **options: Any) -> tuple[nn.Module, Plan]:
    model, batches = made(name)
    return model, plan(model, batches, **options)
