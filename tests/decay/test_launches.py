"""On CUDA a flow launches two or three kernels per parameter and waits for nothing.

The tests run on fake CUDA tensors, which take the branches that real ones take. A fake tensor has no values,
so reading one raises an error. A dispatch mode counts operations and refuses copies that wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.decay.common import Idle
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise.decay.clock import CLOCKS
from normwise.decay.rules import Rule

NEED_NORMS: list[Rule] = [
    nw.AdaptiveWeightShrink(0.1),
    nw.PowerShrink(0.1, 1.7),
    nw.EpsilonShiftedL2(0.1, 0.5),
    nw.Sphere(1.5),
]
each_rule = pytest.mark.parametrize("rule", [nw.L2(0.1), *NEED_NORMS], ids=repr)
NO_LAUNCH = ["alias", "detach", "device", "empty", "expand", "lift_fresh", "promote_types", "select", "slice"]
NO_LAUNCH += ["split", "split_with_sizes", "t", "unbind", "unsqueeze", "view"]


class Launches(TorchDispatchMode):
    """Counts the operations on CUDA tensors, and refuses copies that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = torch.device(kwargs.get("device") or args[0].device)
            assert source.device.type == target.type, f"{func} waits for the device"
        result = func(*args, **kwargs)
        lists = [value for value in args if isinstance(value, (list, tuple))]
        values = [*args, result, *(member for some in lists for member in some)]
        if name not in NO_LAUNCH and any(isinstance(v, Tensor) and v.device.type == "cuda" for v in values):
            # by a number, torch._foreach_mul_ takes many tensors in one launch; by tensors, one
            self.count += len(args[0]) if name == "_foreach_mul_" and len(lists) == 2 else 1
        return result


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every tensor a fake one. Numbers on the CPU can be read, as in a real run."""
    read = FakeTensor.item  # raises

    def item(tensor: FakeTensor) -> Any:
        return 0.5 if tensor.device.type == "cpu" else read(tensor)

    monkeypatch.setattr(FakeTensor, "item", item)
    with FakeTensorMode():
        yield


def parameters(number: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(4 + k % 3, 70 + k, device="cuda")) for k in range(number)]
    for param in params:
        param.grad = torch.empty_like(param)
    return params


def launches(
    rule: Rule,
    number: int,
    *,
    tensor_lr: bool = False,
    found_inf: bool = False,
    masked: bool = False,
    joint: bool = False,
    **settings: Any,
) -> int:
    """How many launches a step with so many parameters takes."""
    params = parameters(number)
    optimizer = Idle(params, torch.empty((), device="cuda") if tensor_lr else 0.1)
    if found_inf:  # what a GradScaler leaves with a fused optimizer
        vars(optimizer)["found_inf"] = torch.empty((), device="cuda")
    pairs = [nw.Unit(params[k : k + 2], dim=None) for k in range(0, number, 2)]
    decay = nw.Decay(optimizer, rule, pairs if joint else params, **settings)
    for unit in decay.units if masked else ():  # not before, as a mask is read when it is given
        unit.mask = torch.empty(unit.count, dtype=torch.bool, device="cuda")
    optimizer.step()
    with Launches() as counter:
        optimizer.step()
    counted: int = counter.count
    return counted


@pytest.mark.parametrize("rule", NEED_NORMS, ids=repr)
@pytest.mark.usefixtures("cuda")
def test_a_norm_and_a_product_per_parameter(rule: Rule) -> None:
    few, many = launches(rule, 2), launches(rule, 52)
    assert many - few == 2 * 50
    assert few <= 2 * 2 + 55


@pytest.mark.usefixtures("cuda")
def test_l2_takes_all_parameters_in_one_launch() -> None:
    assert launches(nw.L2(0.1), 2) == launches(nw.L2(0.1), 52) == 1


@each_rule
@pytest.mark.parametrize(
    "settings",
    [
        *({"clock": clock, "tensor_lr": is_tensor} for clock in CLOCKS for is_tensor in (False, True)),
        {"measure": "rms", "tensor_lr": True},
        {"masked": True},
        {"joint": True},
        {"every": 2},
        {"every": 2, "tensor_lr": True, "clock": "lr^2/max_lr"},
        {"found_inf": True},
        {"found_inf": True, "tensor_lr": True, "measure": "rms"},
    ],
    ids=repr,
)
@pytest.mark.usefixtures("cuda")
@pytest.mark.one_in(2)
def test_no_setting_waits_for_the_device(settings: dict[str, Any], rule: Rule) -> None:
    assert launches(rule, 4, **settings) > 0


@pytest.mark.parametrize("wait", [lambda t: bool(t.any()), lambda t: t.sum().item()])
@pytest.mark.usefixtures("cuda")
def test_reading_a_value_is_noticed(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(DataDependentOutputException):
        wait(torch.empty(3, device="cuda"))


@pytest.mark.usefixtures("cuda")
def test_a_copy_that_waits_is_noticed() -> None:
    with Launches(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ops.aten._to_copy.default(torch.empty(3), device=torch.device("cuda"))


# -- CUDA graphs: optimizers with capturable=True -----------------------------------------------------------


@each_rule
@pytest.mark.usefixtures("cuda")
def test_a_step_of_a_capturable_optimizer_waits_nowhere(rule: Rule) -> None:
    params = parameters(3)
    optimizer = Adam(params, lr=0.1, capturable=True, foreach=False)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
    nw.Decay(optimizer, rule, params, clock="lr^2/max_lr")
    optimizer.step()
    with Launches() as counter:
        optimizer.step()
    assert counter.count > 0


def test_the_peak_rate_stays_where_a_graph_reads_it() -> None:
    param, rate = nn.Parameter(torch.ones(2, 3)), torch.tensor(0.5)
    optimizer = SGD([param], lr=rate)
    decay = nw.Decay(optimizer, nw.L2(0.1), param, clock="lr^2/max_lr")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    (peak,) = decay._clock.max_lr
    assert isinstance(peak, Tensor)
    place = peak.data_ptr()
    for value in (0.1, 0.7, 0.2):
        rate.fill_(value)
        optimizer.step()
    (peak,) = decay._clock.max_lr
    assert isinstance(peak, Tensor)
    assert peak.data_ptr() == place
    assert peak.item() == pytest.approx(0.7)


def test_loading_does_not_lend_the_peak_rate_to_the_state() -> None:
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = SGD([param], lr=torch.tensor(0.5))
    decay = nw.Decay(optimizer, nw.L2(0.1), param, clock="lr^2/max_lr")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    saved = decay.state_dict()
    decay.load_state_dict(saved)
    optimizer.param_groups[0]["lr"].fill_(2.0)
    optimizer.step()
    assert saved["max_lr"][0].item() == 0.5


def test_a_graph_cannot_ask_for_a_scheduled_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.L2(lambda step: 0.1), param)
    param.grad = torch.zeros_like(param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot call"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2, 3))
