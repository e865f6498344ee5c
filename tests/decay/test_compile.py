"""torch.compile(optimizer.step) compiles once and gives what eager gives, up to the error of torch itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import normwise as nw
from normwise.decay.rules import Rule

CASES = [
    pytest.param(nw.L2(0.1), {"mode": "flow", "clock": "lr"}, id="L2 flow"),
    pytest.param(nw.AdaptiveWeightShrink(0.1), {"mode": "flow", "clock": "lr^2/max_lr"}, id="AWS flow"),
    pytest.param(nw.AdaptiveWeightShrink(lambda step: 0.1 / (1 + step)), {}, id="scheduled"),
    pytest.param(nw.PowerShrink(0.1, 1.5), {"mode": "explicit", "clock": "lr"}, id="power explicit"),
    pytest.param(nw.EpsilonShiftedL2(0.1, 0.3), {"mode": "coupled", "clock": "lr"}, id="epsilon coupled"),
    pytest.param(nw.Sphere(), {"mode": "flow", "clock": "step"}, id="sphere"),
    pytest.param(nw.AdaptiveWeightShrink(0.1), {"mode": "flow", "every": 2}, id="AWS every second step"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


def run(
    kind: Callable[..., Optimizer],
    rule: Rule | None,
    decay: dict[str, Any],
    compiler: Any = None,
    **settings: Any,
) -> tuple[list[Tensor], list[int]]:
    """Six steps with a falling rate; the weights, and how many frames were compiled after each step."""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 5), (4, 8))]
    lr = torch.tensor(0.1)
    optimizer = kind(params, lr=lr, **settings)
    if rule is not None:
        nw.Decay(optimizer, rule, params, **decay)
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler or "eager")
    step = torch.compile(optimizer.step, backend=counter) if compiler else optimizer.step
    frames = []
    for k in range(6):
        lr.fill_(0.1 / (k + 1))
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        step()
        frames.append(int(counter.frame_count))
    return [param.detach() for param in params], frames


@pytest.mark.parametrize(("rule", "decay"), CASES)
@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.one_in(2)
def test_compiled_equals_eager_and_is_compiled_once(
    kind: Callable[..., Optimizer], rule: Rule, decay: dict[str, Any]
) -> None:
    settings = {"momentum": 0.9} if kind is SGD else {}
    eager, _ = run(kind, rule, decay, **settings)
    compiled, frames = run(kind, rule, decay, "eager", **settings)
    bare_eager, _ = run(kind, None, decay, **settings)
    bare_compiled, bare_frames = run(kind, None, decay, "eager", **settings)
    of_torch = difference(bare_compiled, bare_eager)  # torch's own: 0 for SGD, not for Adam
    assert difference(compiled, eager) <= 2 * of_torch
    assert frames[-1] == frames[2] > 0, f"recompiled: {frames}"
    assert frames[2] - frames[1] <= max(0, bare_frames[2] - bare_frames[1])


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.thorough
def test_compiled_to_machine_code() -> None:
    eager, _ = run(SGD, nw.AdaptiveWeightShrink(0.1), {}, momentum=0.9)
    compiled, frames = run(SGD, nw.AdaptiveWeightShrink(0.1), {}, "inductor", momentum=0.9)
    assert frames[-1] == frames[2] > 0
    for mine, other in zip(compiled, eager, strict=True):  # 8 ULP a step
        torch.testing.assert_close(mine, other, rtol=0, atol=48 * 2**-23 * float(other.norm(dim=1).max()))
