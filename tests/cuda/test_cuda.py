"""What runs on a CUDA device equals the same in float64 on the CPU. Skipped where there is no such device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

import normwise as nw
from normwise.norms import slice_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1e-18, 1e-6, 1.0, 1e6, 1e18)
FAMILY: dict[str, Callable[[Tensor], Tensor]] = {
    "weight_norm": nw.functional.weight_norm,
    "centered_weight_norm": nw.functional.centered_weight_norm,
    "weight_standardization": nw.functional.weight_standardization,
}
RULES: dict[str, nw.Rule] = {
    "L2": nw.L2(0.02),
    "AdaptiveWeightShrink": nw.AdaptiveWeightShrink(0.02),
    "PowerShrink": nw.PowerShrink(1e-4, 1.7),  # more would flip the longest unit in mode "explicit"
    "EpsilonShiftedL2": nw.EpsilonShiftedL2(0.02, epsilon=0.5),
    "Sphere": nw.Sphere(1.5),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW foreach": lambda p: AdamW(p, lr=0.1, weight_decay=0, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.1, weight_decay=0, fused=True),
    "Adam capturable": lambda p: Adam(p, lr=torch.tensor(0.1, device="cuda"), capturable=True),
}
SHAPES = ((64, 27), (5, 4), (128, 64, 3, 3), (3, 5000))


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_at_every_scale(dtype: torch.dtype, dim: int | None) -> None:
    for value, scale in itertools.product(tensors(), SCALES):
        weight = (value * scale).to(dtype)
        if not bool(weight.isfinite().all()):
            continue
        found, expected = slice_norms(weight.cuda(), dim), slice_norms(weight.double(), dim)
        torch.testing.assert_close(found.double().cpu(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("member", FAMILY)
def test_family_and_its_gradient(member: str, scale: float) -> None:
    for value in tensors():
        cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        results = []
        for weight in ((value * scale).cuda(), (value * scale).double()):
            weight.requires_grad_()
            out = FAMILY[member](weight)
            out.backward(cotangent.to(out))
            assert weight.grad is not None
            results.append((out.detach().double().cpu(), weight.grad.double().cpu()))
        for found, expected in zip(*results, strict=True):
            size = expected.abs().amax().item()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # of torch's own compiler
@pytest.mark.parametrize("member", FAMILY)
def test_family_compiled(member: str) -> None:
    layers = [nn.Linear(64, 32).cuda(), nn.Conv2d(8, 16, 3).cuda()]
    inputs = [torch.randn(4, 64, device="cuda"), torch.randn(2, 8, 9, 9, device="cuda")]
    for layer, x in zip(layers, inputs, strict=True):
        getattr(nw, member)(layer)
        expected = layer(x)
        torch._dynamo.reset()
        found = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # convolutions may use TF32


def trained(device: str, dtype: torch.dtype, name: str, rule: nw.Rule, **settings: Any) -> list[Tensor]:
    params = [nn.Parameter(t.to(device, dtype)) for t in tensors()]
    optimizer = OPTIMIZERS[name](params)
    nw.Decay(optimizer, rule, params[:3], **settings)
    for step in range(6):
        for param, gradient in zip(params, tensors(seed=step + 1), strict=True):
            param.grad = gradient.to(device, dtype)
        optimizer.step()
    return [param.detach().double().cpu() for param in params]


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS)[:4])
def test_matrix(optimizer: str, rule: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode not in RULES[rule].modes:
        pytest.skip("the rule has no such mode")
    for dim, every in ((0, 1), (1, 1), (None, 1), *([(0, 2)] if mode == "flow" else [])):
        settings: dict[str, Any] = {"mode": mode, "dim": dim, "every": every}
        found = trained("cuda", torch.float32, optimizer, RULES[rule], **settings)
        expected = trained("cpu", torch.float64, optimizer, RULES[rule], **settings)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_captured_graph_replays_the_step(rule: str) -> None:
    def run(capture: bool) -> list[Tensor]:
        params = [nn.Parameter(t.cuda()) for t in tensors()]
        for param, gradient in zip(params, tensors(seed=1), strict=True):
            param.grad = gradient.cuda()
        optimizer = OPTIMIZERS["Adam capturable"](params)
        nw.Decay(optimizer, RULES[rule], params)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        if not capture:
            for _ in range(4):
                optimizer.step()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(4):
                graph.replay()
        return [param.detach().clone() for param in params]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", list(OPTIMIZERS)[:4])
def test_a_step_never_waits_for_the_device(rule: str, name: str) -> None:
    params = [nn.Parameter(t.cuda()) for t in tensors()]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = OPTIMIZERS[name](params)
    nw.Decay(optimizer, RULES[rule], params)
    optimizer.step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears")
def test_launches_per_parameter() -> None:
    def launched(number: int) -> int:
        params = [nn.Parameter(torch.randn(64, 70 + k % 3, device="cuda")) for k in range(number)]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer = SGD(params, lr=0.1, fused=True)
        nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), params)
        optimizer.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events())

    few, many = launched(10), launched(60)
    assert many - few <= 3 * 50


@pytest.mark.parametrize("name", ["SGD foreach", "SGD fused", "AdamW fused"])
def test_a_skipped_step_of_a_scaler_decays_nothing(name: str) -> None:
    params = [nn.Parameter(t.cuda()) for t in tensors()]
    optimizer = OPTIMIZERS[name](params)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), params)
    scaler = torch.amp.GradScaler("cuda")
    for overflow in (False, True, False):
        before = [param.detach().clone() for param in params]
        optimizer.zero_grad()
        loss = torch.stack([(param * param).sum() for param in params]).sum()
        scaler.scale(loss).backward()
        if overflow:
            assert params[0].grad is not None
            params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(param, old) for param, old in zip(params, before, strict=True)]
        assert all(same) if overflow else not any(same)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_decay_below_the_precision_is_kept(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(4, 64, dtype=dtype, device="cuda"))
    optimizer = SGD([weight], lr=1.0)
    nw.Decay(optimizer, nw.L2(1e-4), weight, compensated=True)
    weight.grad = torch.zeros_like(weight)
    for _ in range(1000):
        optimizer.step()
    torch.testing.assert_close(weight.float().mean().item(), 0.9048, rtol=1e-2, atol=0)


def test_a_resumed_run_ends_at_the_same_bits() -> None:
    def step(optimizer: Optimizer, params: list[nn.Parameter], seed: int) -> None:
        for param, gradient in zip(params, tensors(seed=seed), strict=True):
            param.grad = gradient.cuda()
        optimizer.step()

    for name, every in itertools.product(list(OPTIMIZERS)[:4], (1, 3)):
        params = [nn.Parameter(t.cuda()) for t in tensors()]
        optimizer = OPTIMIZERS[name](params)
        decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), params, every=every)
        for seed in range(4):
            step(optimizer, params, seed)
        states = copy.deepcopy((decay.state_dict(), optimizer.state_dict()))
        others = [nn.Parameter(param.detach().clone()) for param in params]
        resumed = OPTIMIZERS[name](others)
        second = nw.Decay(resumed, nw.AdaptiveWeightShrink(0.1), others, every=every)
        resumed.load_state_dict(states[1])
        second.load_state_dict(states[0])
        for seed in range(4, 9):
            step(optimizer, params, seed)
            step(resumed, others, seed)
        assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


def test_discovery_says_the_same_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.GroupNorm(4, 16),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    batches = [torch.randn(16, 3, 8, 8)]
    expected = nw.find_invariances(net, batches, progress=False)
    found = nw.find_invariances(net.cuda(), [batch.cuda() for batch in batches], progress=False)
    assert found.scale_invariant == expected.scale_invariant
    assert found.joint == expected.joint
    plan = nw.plan(net, invariances=found)
    optimizer = AdamW(plan.param_groups(), lr=1e-3)
    plan.attach(optimizer, total_steps=10)
    net(batches[0].cuda()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS)[:4])
def test_a_start_in_equilibrium_places_as_on_the_cpu(name: str) -> None:
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(27, 64, bias=False), nn.BatchNorm1d(64, eps=1e-12), nn.Linear(64, 3))
        net.to(device, dtype)
        optimizer = OPTIMIZERS[name](net.parameters())
        nw.attach(optimizer, net.get_parameter("0.weight"), total_steps=100)
        for step in range(3):
            x = torch.randn(32, 27, generator=torch.Generator().manual_seed(step)).to(device, dtype)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        results.append(net.get_parameter("0.weight").detach().double().cpu().norm(dim=1))
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=0)
