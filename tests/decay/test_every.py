"""``every``: the time of several steps is applied at once, all of it, and the steps between cost nothing."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests.decay import common
from tests.decay.common import Idle
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise.decay.rules import Rule

FLOWS: list[Rule] = [
    nw.L2(0.5),
    nw.AdaptiveWeightShrink(0.3),
    nw.PowerShrink(0.2, 1.7),
    nw.EpsilonShiftedL2(0.5, 0.3),
]
each_flow = pytest.mark.parametrize("rule", FLOWS, ids=lambda rule: type(rule).__name__)


weight = functools.partial(common.weight, dtype=torch.float64)


def take_steps(optimizer: Optimizer, param: nn.Parameter, gradients: Iterable[Tensor | None]) -> None:
    for gradient in gradients:
        param.grad = None if gradient is None else gradient.clone()
        optimizer.step()


# -- what is applied -----------------------------------------------------------------------------------------


@each_flow
@pytest.mark.parametrize("clock", ["lr", "lr^2/max_lr", "step"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_without_gradient_steps_every_changes_nothing(tensor_lr: bool, clock: str, rule: Rule) -> None:
    """Flows compose: the time of four steps at once is four steps."""
    ends = []
    for every in (1, 4):
        param = weight(3, 5)
        lr: Any = torch.tensor(0.0, dtype=torch.float64) if tensor_lr else 0.0
        optimizer = SGD([param], lr=lr)
        nw.Decay(optimizer, rule, param, clock=clock, every=every)
        for rate in (0.3, 0.1, 0.4, 0.2, 0.3, 0.3, 0.1, 0.2):
            if tensor_lr:
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            take_steps(optimizer, param, [torch.zeros(3, 5, dtype=torch.float64)])
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-13, atol=0)


def test_l2_applies_the_exact_factor_whatever_the_gradients() -> None:
    param, plain = weight(3, 5), weight(3, 5)
    optimizer, bare = SGD([param], lr=0.1), SGD([plain], lr=0.1)
    nw.Decay(optimizer, nw.L2(0.5), param, every=4)
    gradients = [torch.randn(3, 5, dtype=torch.float64) for _ in range(4)]
    take_steps(optimizer, param, gradients)
    take_steps(bare, plain, gradients)
    torch.testing.assert_close(param.detach(), plain.detach() * math.exp(-0.5 * 0.4), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("rule", "power"), [(nw.L2(0.5), 0), (nw.AdaptiveWeightShrink(0.5), 1)], ids=repr)
@pytest.mark.parametrize("every", [2, 8])
def test_the_difference_to_single_steps_is_of_second_order(every: int, rule: Rule, power: int) -> None:
    """A fraction of (1 + p)·D·G·(k − 1)/2k of the norm, as the docstring says."""
    for lr in (1e-2, 1e-3):
        norms = []
        for k in (1, every):
            param = nn.Parameter(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
            optimizer = SGD([param], lr=lr)
            nw.Decay(optimizer, rule, param, every=k)
            outwards = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
            take_steps(optimizer, param, [outwards] * every)
            norms.append(param.detach().norm().item())
        decay, growth = rule.rate(2.0).item() * every * lr, every * lr / 2
        expected = (1 + power) * decay * growth * (every - 1) / (2 * every)
        assert 1 - norms[1] / norms[0] == pytest.approx(expected, rel=5 * every * lr)


@each_flow
def test_a_parameter_decays_for_the_steps_in_which_it_had_a_gradient(rule: Rule) -> None:
    """Also where it has none in the step that applies the rule."""
    param, other = weight(3, 5), weight(2, 2)
    before, of_other = param.detach().clone(), other.detach().clone()
    optimizer = SGD([param, other], lr=0.1)
    nw.Decay(optimizer, rule, [param, other], every=4)
    other.grad = torch.zeros_like(other)
    zero = torch.zeros_like(param)
    take_steps(optimizer, param, [zero, zero, None, None])
    for weights, start, time in ((param, before, 0.2), (other, of_other, 0.4)):
        norms = start.norm(dim=1, keepdim=True)
        torch.testing.assert_close(weights.detach(), start * rule.flow(norms, time) / norms)


def test_the_sphere_is_projected_onto_every_so_many_steps() -> None:
    param = weight(3, 5)
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.Sphere(2.0), param, every=2)
    for step in range(4):
        take_steps(optimizer, param, [torch.ones_like(param)])
        on_sphere = torch.allclose(param.detach().norm(dim=1), torch.full((3,), 2.0, dtype=torch.float64))
        assert on_sphere == (step % 2 == 1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skipped", [1, 2, 3])
def test_a_step_that_a_scaler_skips_adds_no_time_and_changes_nothing(skipped: int, fused: bool) -> None:
    param = nn.Parameter(weight(3, 5).detach().float())
    start = param.detach().clone()
    optimizer = SGD([param], lr=0.1, fused=fused)
    decay = nw.Decay(optimizer, nw.L2(0.5), param, every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for step in range(1, 7):
        before = param.detach().clone()
        param.grad = torch.full_like(param, math.inf if step == skipped else 0.0)
        scaler.step(optimizer)
        scaler.update()
        if step == skipped:
            assert torch.equal(param, before)
    decay.flush()
    torch.testing.assert_close(param.detach(), start * math.exp(-0.5 * 0.5))


def test_flush_applies_what_has_passed_once() -> None:
    param = weight(3, 5)
    optimizer = SGD([param], lr=0.1)
    decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), param, every=4)
    start = param.detach().clone()
    take_steps(optimizer, param, [torch.zeros_like(param)] * 3)
    assert torch.equal(param, start)
    for _ in range(2):
        decay.flush()
        norms = start.norm(dim=1, keepdim=True)
        torch.testing.assert_close(param.detach(), start / (1 + 0.3 * 0.3 * norms))
    take_steps(optimizer, param, [torch.zeros_like(param)])  # the fourth step applies its own time
    torch.testing.assert_close(param.detach(), start / (1 + 0.3 * 0.4 * norms))


@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_flush_with_every_step_applied_does_nothing(mode: str) -> None:
    param = weight(3, 5)
    optimizer = SGD([param], lr=0.1)
    decay = nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), param, mode=mode)
    take_steps(optimizer, param, [torch.ones_like(param)])
    before = param.detach().clone()
    decay.flush()
    assert torch.equal(param, before)


def test_a_copy_between_applications_goes_on_alike() -> None:
    param = weight(3, 5)
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), param, every=3)
    take_steps(optimizer, param, [torch.ones_like(param)] * 4)
    copied = copy.deepcopy(optimizer)
    copied_param = copied.param_groups[0]["params"][0]
    take_steps(optimizer, param, [torch.ones_like(param)] * 2)
    take_steps(copied, copied_param, [torch.ones_like(param)] * 2)
    assert torch.equal(copied_param, param)


# -- what it costs -------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations on tensors, but not those of torch's profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.overloadpacket.__name__.startswith(("detach", "_record_function"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("lr", "allowed"), [(0.1, 0), (torch.tensor(0.1), 1)], ids=["number", "tensor"])
def test_a_step_that_does_not_apply_the_rule_computes_nothing(lr: float | Tensor, allowed: int) -> None:
    """With a learning rate that is a tensor, it computes one sum for all parameters."""
    params = [weight(4, 5) for _ in range(20)]
    optimizer = Idle(params, lr)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), params, every=8)
    for param in params:
        param.grad = torch.zeros_like(param)
    counts = []
    for _ in range(16):
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    assert max(counts[:7] + counts[8:15]) <= allowed
    assert min(counts[7], counts[15]) > 20


def test_l2_computes_as_much_for_many_parameters_as_for_few() -> None:
    counts = []
    for number in (2, 20):
        params = [weight(4, 5) for _ in range(number)]
        optimizer = Idle(params, 0.1)
        nw.Decay(optimizer, nw.L2(0.3), params)
        for param in params:
            param.grad = torch.zeros_like(param)
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    assert counts[0] == counts[1]


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 is not allowed: give a number of steps, 1 or more"),
        ({"every": 2.0}, "every=2.0 is not allowed"),
        ({"every": True}, "every=True is not allowed"),
        ({"every": 2, "mode": "explicit"}, "every=2 does not go with mode='explicit'.*use mode=\"flow\""),
        ({"every": 2, "mode": "coupled"}, "every=2 does not go with mode='coupled'"),
        ({"every": 2, "rule": nw.RotatingSphere()}, "every=2 does not go with RotatingSphere.*use every=1"),
        (
            {"every": 2, "rule": nw.L2(lambda step: 0.1)},
            "every=2 does not go with a coefficient that is a function of the step.*schedule the",
        ),
    ],
)
def test_bad_every(options: dict[str, Any], message: str) -> None:
    param = weight(2, 2)
    with pytest.raises(ValueError, match=message) as caught:
        nw.Decay(**{"optimizer": SGD([param], lr=1.0), "rule": nw.L2(0.1), "params": param, **options})
    assert "\n" not in str(caught.value)


def test_a_cuda_graph_cannot_count_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    param = weight(2, 2)
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.L2(0.1), param, every=2)
    param.grad = torch.zeros_like(param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="every=2 counts steps, which a CUDA graph cannot do: use every=1"):
        optimizer.step()
