from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.lab.models.convnet import (
    INITIALISERS,
    MEMBERS,
    ConvNet,
    directions,
    initialise,
    scale_directions,
)

CASES = [
    (member, batch_norm)
    for member in MEMBERS
    for batch_norm in (True, False)
    if (member, batch_norm) != ("plain", False)
]


@pytest.mark.parametrize(("member", "batch_norm"), CASES)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_the_directions_changes_no_output(member: str, batch_norm: bool, scale: float) -> None:
    torch.manual_seed(0)
    model = ConvNet(member, batch_norm, width=4).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # a larger one would tell scales apart
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    scale_directions(model, 1.0)
    before = model(x)
    scale_directions(model, scale)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    for weight in directions(model).values():
        torch.testing.assert_close(nw.Unit(weight).norms(), torch.full((len(weight),), scale).double())


@pytest.mark.parametrize(("member", "batch_norm"), CASES)
def test_directions_are_one_weight_per_convolution_and_never_the_head(member: str, batch_norm: bool) -> None:
    model = ConvNet(member, batch_norm, width=4)
    found = directions(model)
    assert [tuple(weight.shape) for weight in found.values()] == [(4, 1, 3, 3), (8, 4, 3, 3), (16, 8, 3, 3)]
    mine = {id(weight) for weight in found.values()}
    assert not mine & {id(param) for param in model.head.parameters()}
    assert mine <= {id(param) for param in model.parameters()}


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(ValueError, match="member='spectral' is not known: choose from weight_norm, "):
        ConvNet("spectral")
    with pytest.raises(ValueError, match='member="plain" without batch norm is not normalised at all'):
        ConvNet("plain", batch_norm=False)


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_initialisers_scale_every_direction_and_nothing_else(initialiser: str) -> None:
    norms = {}
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = ConvNet("weight_norm", width=4)
        head = model.head.weight.clone()
        initialise(model, initialiser, scale)
        norms[scale] = torch.cat([nw.Unit(weight).norms() for weight in directions(model).values()])
        assert torch.equal(model.head.weight, head)
    torch.testing.assert_close(norms[100.0], 100 * norms[1.0], rtol=1e-5, atol=0.0)
    if initialiser == "units":
        torch.testing.assert_close(norms[1.0], torch.ones(28, dtype=norms[1.0].dtype))
    if initialiser == "layers":
        assert len(norms[1.0].log10().round(decimals=3).unique()) == 3
        assert (norms[1.0].log10().abs() <= 3).all()
    with pytest.raises(ValueError, match="initialiser='magic' is not known: choose from units, "):
        initialise(model, "magic", 1.0)
