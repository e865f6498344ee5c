from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import normwise as nw
from normwise.lab.models.cifar_resnets import CifarResNet
from normwise.lab.models.cifar_resnexts import CifarResNeXt
from normwise.lab.models.convnet import MEMBERS
from normwise.lab.models.networks import NETWORKS, build_network, filters, scale_filters

# Parameters exactly and multiplications in millions as published (in brackets: to so many digits).
#   torchvision: "GFLOPS" and parameters in its table of pretrained classification models, version 0.20
#   akamaster/pytorch_resnet_cifar10: parameters of the CIFAR ResNets; He et al. 2016, table 6, rounds them
#   He et al. 2018 (arXiv 1808.06866), table 1: 4.06e7, 1.25e8 and 2.53e8 operations of the CIFAR ResNets
#   Xie et al. 2017 (arXiv 1611.05431), table 7: 34.4 million parameters of ResNeXt-29, 8×64d
#   Li et al. 2017 (arXiv 1608.08710), table 1: 3.13e8 operations of VGG-16 on CIFAR-10
PUBLISHED = [
    ("resnet20", 32, 10, "269722", "40.6"),
    ("resnet56", 32, 10, "853018", "125"),
    ("resnet110", 32, 10, "1727962", "253"),
    ("resnext29_8x64", 32, 10, "344e5", ""),
    ("vgg16_small", 32, 10, "", "313"),
    ("resnet18", 224, 1000, "11689512", "181e1"),
    ("resnet50", 224, 1000, "25557032", "409e1"),
    ("resnet101", 224, 1000, "44549160", "780e1"),
    ("resnext50_32x4", 224, 1000, "25028904", "423e1"),
    ("vgg16", 224, 1000, "138357544", "1547e1"),
]
NARROW: dict[str, dict[str, int]] = {
    "resnet20": {"width": 2},
    "resnext29_8x64": {"width": 4, "groups": 2},
    "vgg16_small": {"width": 2},
    "resnet18": {"width": 4},
    "resnext50_32x4": {"width": 4, "groups": 2},
}


def _agrees(value: float, published: str) -> bool:
    digits = len(published.split("e")[0].replace(".", ""))
    return float(f"{value:.{digits - 1}e}") == float(published)


@pytest.mark.parametrize(("name", "size", "classes", "parameters", "millions"), PUBLISHED)
@pytest.mark.one_in(2)
def test_sizes_are_the_published_ones(
    name: str, size: int, classes: int, parameters: str, millions: str
) -> None:
    with torch.device("meta"):
        network = build_network(name, classes=classes, batch_norm=not name.startswith("vgg"))
        with FlopCounterMode(display=False) as counter:
            logits = network(torch.zeros(1, 3, size, size))
    assert logits.shape == (1, classes)
    if parameters:
        assert _agrees(sum(p.numel() for p in network.parameters()), parameters)
    if millions:
        assert _agrees(counter.get_total_flops() / 2e6, millions)


def test_every_network_is_among_them() -> None:
    assert [name for name, *_ in PUBLISHED] == list(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.one_in(2)
def test_every_convolution_has_the_member_and_no_other_layer(name: str, member: str) -> None:
    with torch.device("meta"):
        network = build_network(name, classes=10, member=member, batch_norm=True)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [len(w) for w in filters(network).values()] == [m.out_channels for m in convolutions]
    for module in network.modules():
        normalised = hasattr(module, "parametrizations")
        assert normalised == (isinstance(module, nn.Conv2d) and member != "plain")
    gains = sum(p.numel() for n, p in network.named_parameters() if n.endswith("original0"))
    assert gains == (sum(m.out_channels for m in convolutions) if member == "weight_norm" else 0)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert norms == len(convolutions)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize(
    ("member", "batch_norm"),
    [(m, bn) for m in MEMBERS for bn in (True, False) if (m, bn) != ("plain", False)],
)
@pytest.mark.one_in(2)
def test_scaling_the_filters_changes_no_output(name: str, member: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = NARROW[name]
    network = build_network(name, classes=3, channels=1, member=member, batch_norm=batch_norm, **arguments)
    network = network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # a larger one would tell scales apart
    x = torch.randn(4, 1, 48, 48)
    before = network(x.double())
    scale_filters(network, 1e3)
    torch.testing.assert_close(network(x.double()), before, rtol=1e-7, atol=1e-9)
    for weight in filters(network).values():  # each filter by itself too
        with torch.no_grad():
            weight.mul_(torch.rand(len(weight), 1, 1, 1, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(network(x.double()), before, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("member", MEMBERS)
def test_without_batch_norm_depth_does_not_blow_up_the_stream(member: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    sizes = {}
    for name in ("resnet20", "resnet110"):
        network = build_network(name, classes=10, channels=1, member=member, batch_norm=False, width=8)
        assert isinstance(network, CifarResNet)
        with torch.no_grad():
            sizes[name] = float(network.blocks(network.stem(x)).square().mean())
    assert 0.1 < sizes["resnet110"] / sizes["resnet20"] < 10


def test_a_seed_draws_one_network() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        network = build_network("resnet20", classes=2, channels=1, member="weight_norm", width=2)
        weights.append(torch.cat([w.flatten() for w in network.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_filters_are_what_a_plan_decays() -> None:
    torch.manual_seed(0)
    network = build_network("resnet20", classes=3, channels=1, member="centered_weight_norm", width=2)
    found = nw.find_invariances(network, [torch.randn(8, 1, 8, 8)])
    mine = {name for name, p in network.named_parameters() if any(p is w for w in filters(network).values())}
    assert mine <= {name for name, dim in found.scale_invariant.items() if dim == 0}
    assert {name for name in found.scale_invariant if name.endswith("original")} == mine


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(ValueError, match="network='lenet' is not known: choose from resnet20, "):
        build_network("lenet", classes=10)
    with pytest.raises(ValueError, match="member='spectral' is not known: choose from weight_norm, "):
        build_network("resnet20", classes=10, member="spectral")
    with pytest.raises(ValueError, match=r"depth=21 is not possible: give 6n \+ 2"):
        CifarResNet(21, classes=10)
    with pytest.raises(ValueError, match=r"depth=30 is not possible: give 9n \+ 2"):
        CifarResNeXt(30, classes=10)
