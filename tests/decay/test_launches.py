"""On CUDA: few launches for all parameters, and nothing that waits. Run on tensors that seem to be there.

Fake tensors take the very branches that tensors on CUDA take. They have no values, so reading one raises; and
a mode counts the operations, each a launch at least, and refuses copies that wait. The kernels that need
Triton are replaced by a stand-in that counts their launches. Nothing here has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tests.decay.by_table import use_kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise.decay import table
from normwise.decay.clock import CLOCKS
from normwise.decay.rules import Rule
from normwise.decay.table import Table

RULES: list[Rule] = [
    nw.L2(0.1),
    nw.AdaptiveWeightShrink(0.1),
    nw.PowerShrink(0.1, 1.7),
    nw.EpsilonShiftedL2(0.1, 0.5),
    nw.Sphere(1.5),
    nw.Sphere(),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


SETTINGS: list[dict[str, Any]] = [
    *({"clock": clock, "tensor_lr": is_tensor} for clock in CLOCKS for is_tensor in (False, True)),
    {"measure": "rms"},
    {"measure": "rms", "tensor_lr": True},
    {"masked": True},
    {"found_inf": True},
    {"found_inf": True, "tensor_lr": True, "measure": "rms"},
]


class CountingKernels:
    """What the kernels launch, without the kernels."""

    def __init__(self) -> None:
        self.launches = 0

    def squares(self, table: Table) -> Tensor:
        self.launches += len(table.launches)
        return torch.empty(table.segments, dtype=torch.float64, device=table.tensors.device)

    def multiply(self, table: Table, factors: Tensor) -> None:
        self.launches += len(table.launches)
        assert factors.shape == (table.count,)
        assert factors.device == table.tensors.device


class Watch(TorchDispatchMode):
    """Counts the operations that launch something, and refuses copies that wait for the device."""

    VIEWS = (
        "detach",
        "view",
        "split",
        "expand",
        "slice",
        "alias",
        "select",
        "unsqueeze",
        "t",
        "unbind",
        "empty",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = torch.device(kwargs.get("device") or args[0].device)
            assert source.device.type == target.type, f"{func} waits for the device"
        result = func(*args, **kwargs)
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        lists = [value for one in args if isinstance(one, (list, tuple)) for value in one]
        tensors += [value for value in lists if isinstance(value, Tensor)]
        places = {tensor.device.type for tensor in tensors}
        if "cuda" in places and not name.startswith(self.VIEWS):
            # torch._foreach_mul_ by a number takes up to 110 tensors a launch, and otherwise one
            self.names.append(name)
        return result


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every tensor a fake one."""
    read = FakeTensor.item  # raises

    def item(tensor: FakeTensor) -> Any:
        return 0.5 if tensor.device.type == "cpu" else read(tensor)

    def sent(values: Tensor, device: torch.device) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, device=device)

    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor))
    monkeypatch.setattr(FakeTensor, "item", item)
    monkeypatch.setattr(table, "_sent", sent)  # pinned memory, which is not there without CUDA
    with FakeTensorMode():
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> CountingKernels:
    counting = CountingKernels()
    use_kernels(monkeypatch, lambda device: counting if device == "cuda" else None)
    return counting


class Launches(NamedTuple):
    """How many launches one flow takes."""

    ours: int
    torchs: int


def flow(rule: Rule, number: int, kernels: Any, **given: Any) -> Launches:
    """Attach a rule to so many parameters and count what its second step launches."""
    given = dict(given)
    prepare, found_inf = given.pop("prepare", list), given.pop("found_inf", False)
    is_tensor, masked = given.pop("tensor_lr", False), given.pop("masked", False)
    params = [nn.Parameter(torch.empty(4 + k % 3, 70 + k, device="cuda")) for k in range(number)]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = SGD(params, lr=0.1)
    if is_tensor:
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
    if isinstance(rule, nw.Sphere) and rule.radius is None:  # looks at the norms when it is attached
        rule = nw.Sphere(1.0)
    decay = nw.Decay(optimizer, rule, prepare(params), **given)
    for unit in decay.units if masked else ():  # not before, as a mask is read when it is given
        unit.mask = torch.empty(unit.count, dtype=torch.bool, device="cuda")
    if found_inf:
        vars(optimizer)["found_inf"] = torch.empty((), device="cuda")
    decay._in_step = decay._has_seen_gradients = True
    decay._after_step()  # makes the table
    decay._in_step, kernels.launches = True, 0
    with Watch() as watch:
        decay._after_step()
    return Launches(kernels.launches, len(watch.names))


def joint(params: list[nn.Parameter]) -> list[nw.Unit]:
    return [nw.Unit(params[k : k + 2], dim=None) for k in range(0, len(params), 2)]


@each_rule
@pytest.mark.parametrize("prepare", [list, joint])
@pytest.mark.usefixtures("cuda")
def test_a_handful_of_launches_for_any_number_of_parameters_and_no_waiting(
    prepare: Callable[[Any], Any], rule: Rule, kernels: CountingKernels
) -> None:
    few, many = (flow(rule, number, kernels, prepare=prepare) for number in (2, 50))
    assert few == many
    assert many.ours <= 2 * 4
    assert many.torchs <= 40


@pytest.mark.parametrize("rule", [RULES[0], RULES[1]], ids=repr)
@pytest.mark.parametrize("given", SETTINGS, ids=repr)
@pytest.mark.usefixtures("cuda")
def test_so_it_is_in_every_setting(given: dict[str, Any], rule: Rule, kernels: CountingKernels) -> None:
    few, many = (flow(rule, number, kernels, **given) for number in (2, 12))
    assert few == many
    assert sum(many) <= 48


@each_rule
@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.usefixtures("cuda")
def test_without_triton_nothing_waits_either_but_launches_grow(is_tensor: bool, rule: Rule) -> None:
    counting = CountingKernels()
    few, many = (flow(rule, number, counting, tensor_lr=is_tensor) for number in (2, 50))
    assert many.ours == 0
    if isinstance(rule, nw.L2) and not is_tensor:
        assert few == many
    else:
        assert many.torchs >= few.torchs + 48


@pytest.mark.usefixtures("cuda")
def test_waiting_is_noticed(kernels: CountingKernels) -> None:
    """The tests above can fail: reading a value raises, and so does copying one there."""
    there = torch.empty(3, device="cuda")
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        bool(there.any())
    with Watch(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ops.aten._to_copy.default(torch.empty(3), device=there.device)


# -- CUDA graphs: optimizers with capturable=True -----------------------------------------------------------


@each_rule
@pytest.mark.usefixtures("cuda")
def test_a_step_of_a_capturable_optimizer_waits_nowhere(rule: Rule, kernels: CountingKernels) -> None:
    if isinstance(rule, nw.Sphere) and rule.radius is None:
        return  # looks at the norms when it is attached, before a capture
    params = [nn.Parameter(torch.empty(4, 70 + k, device="cuda")) for k in range(3)]
    optimizer = Adam(params, lr=0.1, capturable=True, foreach=False)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
    nw.Decay(optimizer, rule, params, clock="lr^2/max_lr")
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    with Watch():
        optimizer.step()
    assert kernels.launches > 0


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
