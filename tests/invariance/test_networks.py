"""Verdicts and symmetries of torch-built networks against what was derived by hand."""

from __future__ import annotations

import pytest
import torch
from tests.invariance.checks import assert_every_parameter_has_one_verdict, assert_same_space
from tests.invariance.networks import CASES

import normwise as nw

pytestmark = pytest.mark.usefixtures("either_storage")


@pytest.mark.parametrize("name", CASES)
def test_verdicts_and_symmetries_are_those_derived_by_hand(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inv = nw.find_invariances(case.build(), case.batches())
    assert inv.undetermined == {}
    assert inv.scale_invariant == case.scale_invariant
    assert inv.no_effect == case.no_effect
    assert {k: (dim, mask.tolist()) for k, (dim, mask) in inv.partial.items()} == case.partial
    assert_same_space(inv.joint, case.joint, inv.names, inv.parts)
    assert_every_parameter_has_one_verdict(inv)
    assert inv.stats.passes <= 20
    assert inv.stats.rows <= inv.stats.rank + 16
