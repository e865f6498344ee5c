"""Networks of the transformers library: the counts are those derived by hand, and rescaling confirms them."""

from __future__ import annotations

import pytest
import torch
from tests.invariance.checks import assert_every_parameter_has_one_verdict

import normwise as nw

pytest.importorskip("transformers")
from tests.invariance.transformers_networks import NETWORKS

# of each kind of network one; the others are like them, or slow
QUICK = (
    "gpt2",
    "llama",
    "mixtral",
    "bert",
    "t5",
    "vit",
    "qwen3",
    "olmo2",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.thorough) for name in NETWORKS],
)
@pytest.mark.filterwarnings("ignore")
def test_counts_are_those_derived_by_hand(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    inv = nw.find_invariances(network.build(), network.batches(), network.forward)
    assert inv.undetermined == {}
    counts = (len(inv.scale_invariant), len(inv.joint), len(inv.no_effect))
    assert counts == (network.scale_invariant, network.joint, network.no_effect)
    members = len(inv.not_invariant) + len(inv.partial)
    one_batch = max(8, members // 4)  # the last one may come when the rank is full
    assert inv.stats.rows <= inv.stats.rank + 16 + one_batch
    assert_every_parameter_has_one_verdict(inv)
