"""Every way a model may be built, called or trained: the verdicts stay what they are."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.invariance.checks import assert_same_space
from tests.invariance.modules import SmallResNet
from tests.invariance.networks import CASES, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.invariance import Invariances


def invariances_of(name: str, net: nn.Module | None = None, **settings: Any) -> Invariances:
    torch.manual_seed(0)
    case = CASES[name]
    inv = nw.find_invariances(case.build() if net is None else net, case.batches(), **settings)
    assert inv.undetermined == {}
    assert inv.scale_invariant == case.scale_invariant
    assert_same_space(inv.joint, case.joint, inv.names, inv.parts)
    return inv


@dataclasses.dataclass
class Output:
    out: Tensor
    steps: int = 3


@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y, None), lambda y: {"y": [y]}, lambda y: Output(y), lambda y: (Output(y), y.argmax())],
)
@pytest.mark.one_in(2)
def test_outputs_of_any_structure(wrap: Callable[[Tensor], Any]) -> None:
    invariances_of("resnet", forward=lambda model, batch: wrap(model(batch)))


def test_batches_of_any_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return F.normalize(F.linear(x, self.w), dim=-1) * factor

    x, factor = torch.randn(5, 3), torch.rand(5, 1) + 1
    net = Two()
    ways: list[Any] = [
        [(x, factor)],
        [{"x": x, "factor": factor}],
        {"x": x, "factor": factor},
        iter([(x, factor)]),
    ]
    for batches in ways:
        assert nw.find_invariances(net, batches).scale_invariant == {"w": None}
    assert nw.find_invariances(net, [x], lambda m, b: m(b, factor)).scale_invariant == {"w": None}
    assert nw.find_invariances(net, [x], lambda b: net(b, factor)).scale_invariant == {"w": None}
    assert nw.find_invariances(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), x).no_effect == set()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.one_in(2)
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Checkpointed(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.stem(x)))
            x = checkpoint(
                self.two, checkpoint(self.one, x, use_reentrant=reentrant), use_reentrant=reentrant
            )
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    invariances_of("resnet", Checkpointed())


def test_functional_dropout_stochastic_depth_and_dropped_layers() -> None:
    class Random(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.bn(self.stem(x))), 0.5, self.training)
            for block in (self.one, self.two):
                y = F.relu(block.bn1(block.conv1(x)))
                y = block.bn2(block.conv2(y))
                keep = torch.empty(len(x), 1, 1, 1).bernoulli_(0.7) if self.training else 1.0
                x = F.relu(keep * y + block.short(x))
            if torch.rand(()) < 0.2:
                x = x + self.extra(x)
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(8, 8, bias=False)

    net = Random()
    inv = nw.find_invariances(net, images()())
    assert CASES["resnet"].scale_invariant == inv.scale_invariant


def test_sync_batch_norm_and_eval_mode_and_frozen_parameters() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(SmallResNet())
    for parameter in net.one.parameters():
        parameter.requires_grad_(False)
    inv = invariances_of("resnet", net.eval())
    assert inv.frozen == {name for name in inv.names if name.startswith("one.")}


def test_a_frozen_norm_in_a_model_in_training_is_affine() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4).eval())
    assert isinstance(net[1], nn.BatchNorm2d)
    net[1].running_mean = torch.randn(4)
    inv = nw.find_invariances(net, images()())
    assert inv.scale_invariant == {}
    assert inv.joint == []


def test_channels_last() -> None:
    net = SmallResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert invariances_of("resnet", net).stats.dtype == "float64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.one_in(2)
def test_other_precisions(dtype: torch.dtype) -> None:
    case = CASES["prenorm_rms_norm"]
    inv = invariances_of("prenorm_rms_norm", case.build().to(dtype))
    assert inv.stats.dtype == "float64"
    net = SmallResNet().to(dtype)
    found = nw.find_invariances(net, [x.to(dtype) for x in images()()])
    assert found.scale_invariant == CASES["resnet"].scale_invariant


@pytest.mark.parametrize(
    "name", ["resnet", "prenorm_layer_norm", "qk_norm_packed", "group_norm", "weight_norm"]
)
@pytest.mark.one_in(2)
def test_single_precision_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.invariance.find.DOUBLE_UP_TO", 0)
    assert invariances_of(name).stats.dtype == "float32"


def test_a_model_that_does_not_run_in_float64_is_probed_in_float32_and_says_so() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 6, bias=False), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("this operation has no kernel for scalar type Double")
            out: Tensor = self.norm(self.fc(x))
            return out

    inv = nw.find_invariances(Single(), [torch.randn(8, 4)])
    assert inv.stats.dtype == "float32"
    assert inv.scale_invariant == {"fc.weight": None}
    assert "computed in float32" in str(inv)
    assert "no kernel for scalar type Double" in str(inv)


def test_weight_norm_of_a_layer_with_one_input_leaves_signs() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(1, 4)), nn.ReLU(), nn.Linear(4, 2))
    inv = nw.find_invariances(net, [torch.randn(8, 1)])
    name = "0.parametrizations.weight.original1"
    assert inv.scale_invariant == {name: 0}
    assert "only the signs" in inv.evidence[name].reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    torch.manual_seed(0)
    net = SmallResNet().cuda()
    inv = nw.find_invariances(net, [x.cuda() for x in images()()])
    assert inv.scale_invariant == CASES["resnet"].scale_invariant
    assert_same_space(inv.joint, CASES["resnet"].joint, inv.names)


def test_under_no_grad_and_inference_mode_and_autocast() -> None:
    net, batches = SmallResNet(), images()()
    with torch.no_grad():
        assert len(nw.find_invariances(net, batches).joint) == 4
    with torch.inference_mode():
        assert len(nw.find_invariances(net, batches).joint) == 4

    def forward(model: nn.Module, batch: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    assert len(nw.find_invariances(net, batches, forward).joint) == 4


def test_what_cannot_be_judged_is_undetermined() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)
            self.detached = nn.Linear(4, 4)
            self.dead = nn.Parameter(torch.full((4,), -50.0) - torch.arange(4.0))
            self.empty = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.used(x)
            with torch.no_grad():
                extra = self.detached(x)
            out: Tensor = x + extra + F.relu(self.dead + x)
            return out

    net = Odd()
    inv = nw.find_invariances(net, [torch.randn(16, 3)])
    assert inv.no_effect == {"unused.weight", "unused.bias"}
    assert set(inv.undetermined) == {"detached.weight", "detached.bias", "empty", "dead"}
    assert "dead" in inv.undetermined["dead"]
    assert "no_grad" in inv.undetermined["detached.weight"]

    outside = nn.Linear(3, 4)
    inv = nw.find_invariances(
        outside, [torch.randn(16, 3)], lambda m, b, w=outside.weight: m(b) + F.linear(b, w)
    )
    assert "reference outside its module" in inv.undetermined["weight"]


def test_a_custom_gradient_that_lies_is_caught_by_rescaling() -> None:
    class Lies(torch.autograd.Function):
        """Squares, with a gradient orthogonal to its argument."""

        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            out: Tensor = w * w.norm(dim=1, keepdim=True)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (w,) = ctx.saved_tensors
            return grads[0] - w * (grads[0] * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)

    net = nn.Linear(5, 4)
    inv = nw.find_invariances(
        net, [torch.randn(9, 5)], lambda m, b: F.linear(b, Lies.apply(m.weight), m.bias)
    )
    assert "rescaling changes the outputs" in inv.undetermined["weight"]


def test_eps_is_told_from_no_invariance() -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8, eps=1e-2), nn.Linear(8, 3))
    inv = nw.find_invariances(net, [torch.randn(16, 6)])
    assert inv.scale_invariant == {"0.weight": None}
    assert inv.up_to_eps["0.weight"] > 1e-3
    assert inv.evidence["0.weight"].verdict == "scale-invariant up to eps"
    assert inv.evidence["0.weight"].residual < 1e-6
    exact = nw.find_invariances(
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8, eps=0.0)), torch.randn(9, 6)
    )
    assert exact.evidence["0.weight"].verdict == "scale-invariant"
    assert exact.up_to_eps == {}


def test_standardized_weights_are_shift_invariant_in_rows() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    nw.weight_standardization(net[0])
    inv = nw.find_invariances(net, images()())
    (name,) = inv.shift_invariant
    assert inv.scale_invariant == {name: 0}
    assert inv.evidence[name].shift_dim == 0


def test_blocks_of_a_group_norm_and_of_heads() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(4, 8))
    inv = nw.find_invariances(net, images()())
    assert inv.scale_invariant == {"0.weight": None}
    assert inv.evidence["0.weight"].blocks == [(0, 2), (2, 4), (4, 6), (6, 8)]
    packed = invariances_of("qk_norm_packed")
    assert packed.evidence["attn.0.qkv.weight"].blocks == [(0, 4), (4, 8), (8, 12), (12, 16)]


def test_rows_that_are_normalized_one_by_one_beside_others() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = torch.cat([y[:, :2], self.norm(y[:, 2:])], 1)
            out: Tensor = self.fc(F.gelu(y).mean((2, 3)))
            return out

    inv = nw.find_invariances(Half(), images()())
    dim, mask = inv.partial["conv.weight"]
    assert (dim, mask.tolist()) == (0, [False, False, True, True, True, True])
    assert inv.evidence["conv.weight"].blocks == []


def test_progress_is_silent_in_a_pipe_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from normwise.invariance.find import _ProgressBar

    def show() -> str:
        with _ProgressBar(True) as bar:
            bar.update("verdicts", 1, 2)
            if bar._bar is not None and not bar._bar.disable:
                bar._bar.start_t = bar._bar.last_print_t = bar._bar.start_t - 3.0  # as if three seconds ago
            bar.update("verdicts", 2, 2)
            bar.update("joint symmetries", 1, 2)
        return capsys.readouterr().err

    assert show() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "verdicts: 100%" in show()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert show() == ""
