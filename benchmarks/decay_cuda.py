"""What must hold of decay rules on CUDA, checked where one is; ``python -m benchmarks.decay`` runs it.

Every flow is compared with float64 on the CPU, along every dim and from 1e-30 to 1e30, by table and one
parameter after the other; nothing may wait for the GPU; launches are counted; a step captured in a CUDA graph
must give the bits of eager steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import normwise as nw
from normwise.decay import batched

STRENGTH = 1e-2
RULES = (
    nw.L2(STRENGTH),
    nw.AdaptiveWeightShrink(STRENGTH),
    nw.PowerShrink(STRENGTH, 1.5),
    nw.EpsilonShiftedL2(STRENGTH),
    nw.Sphere(),
)


def check_cuda() -> dict[str, Any]:
    """Raise where something is wrong; print and return errors, launches and times."""
    checks: dict[str, Any] = {}
    for rule in RULES:
        for together in (True, False):
            with by_table(together):
                found = check_rule(rule)
            way = "by table" if together else "one by one"
            checks[f"{type(rule).__name__}, {way}"] = found
            print(f"{rule} on CUDA, {way}: {found}, no waiting")
    check_graph()
    checks["graph"] = "equal to eager"
    print("Adam(capturable=True) and each rule, captured in a CUDA graph: the bits of eager steps")
    return checks


@contextmanager
def by_table(together: bool) -> Iterator[None]:
    """Use the kernels for tables, or leave every parameter to launches of its own."""
    if together:
        assert batched.kernels_for("cuda") is not None, "Triton is not installed: there are no kernels"
        original = batched.Tables.__init__
        with mock.patch.object(batched.Tables, "__init__", lambda self, fused: original(self, True)):
            yield
    else:
        yield


def check_rule(rule: nw.Rule) -> dict[str, Any]:
    """Compare one rule with float64; count launches for 2 and 50 weights; time 50."""
    worst = 0.0
    for dim in (0, 1, None):
        for exponent in (-30, -3, 0, 3, 30):
            start = [
                torch.randn(64, 96 + 40 * k, dtype=torch.float64).float() * 10.0**exponent for k in range(20)
            ]
            on_gpu = stepped(rule, [s.cuda() for s in start], dim)[0]
            exact = stepped(rule, [s.double() for s in start], dim)[0]
            for mine, right in zip(on_gpu, exact, strict=True):
                error = nw.Unit(mine.cpu().double() - right, dim).norms() / nw.Unit(right, dim).norms()
                worst = max(worst, float(error.max()) / torch.finfo(torch.float32).eps)
    assert worst < 8, f"{rule} on CUDA is off by {worst} units in the last place"
    launches = [stepped(rule, [torch.randn(64, 96).cuda() for _ in range(n)], 0)[1] for n in (2, 50)]
    return {
        "largest error in ULP": round(worst, 2),
        "launches for 2 and 50 weights": launches,
        "microseconds for 50 weights": stepped(rule, [torch.randn(64, 96).cuda() for _ in range(50)], 0)[2],
    }


def stepped(rule: nw.Rule, start: list[Tensor], dim: int | None) -> tuple[list[Tensor], int, float]:
    """Return the weights after the rule has acted twice; the launches and the time of the second flow."""
    params = [nn.Parameter(value) for value in start]
    optimizer = SGD(params, lr=0.0)
    decay = nw.Decay(optimizer, rule, params, dim, clock="step")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    if not params[0].is_cuda:
        optimizer.step()
        return [param.detach() for param in params], 0, 0.0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # raises where anything waits for the GPU
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    with torch.profiler.profile() as profile:
        decay._in_step = True
        begin.record()
        decay._after_step()
        end.record()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    return [param.detach() for param in params], launches, round(1e3 * begin.elapsed_time(end), 1)


def check_graph() -> None:
    """Capture steps of Adam with a rate that is a tensor, change the rate, and compare with eager steps."""
    for rule in RULES:
        for clock in ("lr", "lr^2/max_lr"):
            results = [trained(rule, clock, captured) for captured in (False, True)]
            for eager, replayed in zip(*results, strict=True):
                assert torch.equal(eager, replayed), (
                    f"{rule} with clock {clock}: a CUDA graph differs from eager"
                )


def trained(rule: nw.Rule, clock: str, captured: bool) -> list[Tensor]:
    """Return the weights after three steps of warm-up and four more with a rate that falls."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 30 + k).cuda()) for k in range(5)]
    for param in params:
        param.grad = torch.randn_like(param)
    rate = torch.tensor(0.1, device="cuda")
    optimizer = Adam(params, lr=rate, capturable=True)
    nw.Decay(optimizer, rule, params, clock=clock)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            optimizer.step()
    for _ in range(4):
        rate.mul_(0.5)
        if captured:
            graph.replay()
        else:
            optimizer.step()
    torch.cuda.synchronize()
    return [param.detach() for param in params]
