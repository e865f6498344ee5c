"""Every bad input to Decay is refused in one line that says what was given, what is allowed, what to do."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import normwise as nw

L2 = nw.L2(0.1)


def setup(shape: tuple[int, ...] = (3, 2)) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    param = torch.nn.Parameter(torch.ones(shape))
    return param, torch.optim.SGD([param], lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer, not str"),
        ({"rule": 0.1}, TypeError, "rule must be a Rule such as AdaptiveWeightShrink(0.01), not 0.1"),
        ({"rule": nw.L2}, TypeError, "rule must be a Rule"),
        ({"params": []}, ValueError, "params is empty: give at least one parameter"),
        ({"params": [3]}, TypeError, "params must be parameters or Units, not int"),
        ({"params": torch.ones(2, 2)}, ValueError, "not in the optimizer: add it to a param_group first"),
        ({"dim": 2}, ValueError, "dim=2 is out of range"),
        ({"dim": "rows"}, TypeError, "dim must be an int or None (the whole tensor), not 'rows'"),
        ({"mode": "decoupled"}, ValueError, "mode='decoupled' is not known: choose from 'flow'"),
        ({"clock": "epoch"}, ValueError, "clock='epoch' is not known: choose from 'lr'"),
        ({"measure": "max"}, ValueError, "measure='max' is not known: choose from 'norm', 'rms'"),
        (
            {"mode": "coupled", "clock": "step"},
            ValueError,
            "clock='step' has no meaning with mode=\"coupled\"",
        ),
        ({"rule": nw.Sphere(), "mode": "explicit"}, ValueError, "use mode='flow', or another rule"),
        ({"rule": nw.Sphere(), "mode": "coupled"}, ValueError, "mode='coupled' cannot apply Sphere"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    param, optimizer = setup()
    with pytest.raises(error, match=re.escape(message)) as caught:
        nw.Decay(**{"optimizer": optimizer, "rule": L2, "params": param, **arguments})
    assert "\n" not in str(caught.value)
    nw.Decay(optimizer, L2, param)  # the refused one has left nothing behind


def test_the_same_parameter_under_two_rules() -> None:
    param, optimizer = setup()
    nw.Decay(optimizer, L2, nw.Unit(param, mask=[True, False, False]))
    for again in (param, nw.Unit(param, dim=None), nw.Unit(param, mask=[True, True, False])):
        with pytest.raises(ValueError, match=r"is under L2\(coefficient=0.1\) already"):
            nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), again)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.1), nw.Unit(param, mask=[False, True, True]))
    other, another = setup()
    with pytest.raises(ValueError, match="would be decayed twice"):
        nw.Decay(another, L2, [other, other])


def test_a_named_parameter_is_named() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    nw.Decay(optimizer, L2, model.weight)
    with pytest.raises(ValueError, match=r"parameter 'weight' of shape \(3, 2\)"):
        nw.Decay(optimizer, L2, model.weight)


def test_weight_decay_of_the_optimizer_beside_a_rule_warns() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    bias = torch.nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": [param], "weight_decay": 0.01}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.warns(UserWarning, match=r"param_groups\[0\] of SGD has weight_decay=0.01"):
        nw.Decay(optimizer, L2, param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nw.Decay(optimizer, L2, bias)


@pytest.mark.parametrize("clock", ["lr", "lr^2/max_lr"])
def test_an_optimizer_that_chooses_its_rate_itself(clock: str) -> None:
    library = pytest.importorskip("transformers.optimization")
    param, _ = setup()
    optimizer = library.Adafactor([param])  # relative_step: lr is None
    message = r'param_groups\[0\] of Adafactor has lr=None: give the optimizer a rate, or use clock="step"'
    with pytest.raises(ValueError, match=message):
        nw.Decay(optimizer, L2, param, clock=clock)
    assert not optimizer._optimizer_step_post_hooks
    nw.Decay(optimizer, L2, param, clock="step")


def test_too_strong_an_explicit_decay_is_an_error_that_names_the_parameter() -> None:
    param, optimizer = setup()
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(20.0), param, mode="explicit")
    param.grad = torch.ones(3, 2)
    name = "param_groups[0]['params'][0] of shape (3, 2)"
    with pytest.raises(ValueError, match=re.escape(f'{name}: mode="explicit" would multiply it by 1 − 2.8')):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3, 2), 1 - 0.01 * 20 * 2**0.5 - 0.01))


def test_too_strong_an_l2_and_a_masked_unit() -> None:
    param, optimizer = setup()
    nw.Decay(optimizer, nw.L2(10.0), param, mode="explicit")
    param.grad = torch.zeros(3, 2)
    with pytest.raises(ValueError, match='flips or blows up the weight: use mode="flow"'):
        optimizer.step()
    param, optimizer = setup()
    param.data[0] = 1e9  # outside the mask, so not too strong
    nw.Decay(
        optimizer, nw.AdaptiveWeightShrink(0.1), nw.Unit(param, mask=[False, True, True]), mode="explicit"
    )
    param.grad = torch.zeros(3, 2)
    optimizer.step()
    assert param[0].tolist() == [1e9, 1e9]


def test_lbfgs_takes_the_flow_alone() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    for mode in ("explicit", "coupled"):
        with pytest.raises(ValueError, match="does not go with LBFGS"):
            nw.Decay(torch.optim.LBFGS([param]), L2, param, mode=mode)


def test_a_parameter_that_left_the_optimizer() -> None:
    param, optimizer = setup()
    nw.Decay(optimizer, L2, param)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="no longer in the optimizer"):
        optimizer.step()


class Descent(torch.optim.Optimizer):
    """An optimizer that knows no learning rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_a_group_without_a_learning_rate() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Descent([param], {})
    param.grad = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"needs a learning rate.*use clock=\"step\""):
        nw.Decay(optimizer, L2, param)
    nw.Decay(optimizer, L2, param, clock="step")
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3, 2), math.exp(-0.1)))


def test_sphere_without_radius_through_a_zero_unit() -> None:
    param, optimizer = setup()
    param.data[1] = 0
    with pytest.raises(
        ValueError, match=r"units whose norm is zero or not finite, through which no Sphere goes"
    ):
        nw.Decay(optimizer, nw.Sphere(), param)
    nw.Decay(optimizer, nw.Sphere(), nw.Unit(param, mask=[True, False, True]))


def test_sparse_gradients_with_coupled() -> None:
    param, optimizer = setup()
    nw.Decay(optimizer, L2, param, mode="coupled")
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"sparse gradient.*use mode=\"flow\""):
        optimizer.step()


Spoil = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: s.update(rule=nw.L2(0.2).settings()),
            r"made with rule=L2\(coefficient=0.2\), .* has rule=L2\(coefficient=0.1\)",
        ),
        (lambda s: s.update(rule=nw.PowerShrink(0.1, 2).settings()), "made with rule=PowerShrink"),
        (lambda s: s.update(mode="explicit"), "mode='explicit'.*mode='flow'"),
        (lambda s: s.update(clock="step"), "clock='step'.*clock='lr'"),
        (lambda s: s.update(every=8), "every=8.*every=1"),
        (lambda s: s.update(measure="rms"), "measure='rms'.*measure='norm'"),
        (lambda s: s.update(units=[]), "has 0 units, and this Decay has 1"),
        (lambda s: s["units"][0].update(dim=None), "unit 0 of the state_dict has dim=None"),
        (
            lambda s: s["units"][0].update(shapes=[[2, 2]]),
            r"shapes=\[\[2, 2\]\], and of this Decay shapes=\[\[3, 2\]\]",
        ),
        (lambda s: s["units"][0].update(mask=[True, False, True]), r"mask=\[True, False, True\]"),
        (lambda s: s.pop("steps"), "not one of a Decay: it needs the keys"),
        (lambda s: s.update(format=99), "format=99"),
        (lambda s: s.update(max_lr=[0.1, 0.2]), "peak rates of 2 param_groups, and the optimizer has 1"),
    ],
)
def test_a_state_dict_that_does_not_fit(spoil: Spoil, message: str) -> None:
    param, optimizer = setup()
    decay = nw.Decay(optimizer, L2, param)
    state = decay.state_dict()
    state["steps"] = 7
    spoil(state)
    with pytest.raises(ValueError, match=message) as caught:
        decay.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert decay.steps == 0


ODD_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], type[Exception], str]] = {
    "sparse": (lambda: torch.ones(2, 2).to_sparse(), ValueError, "has layout sparse_coo, and a unit needs"),
    "mkldnn": (lambda: torch.ones(2, 2).to_mkldnn(), ValueError, "has layout mkldnn, and a unit needs"),
    "float8": (lambda: torch.ones(2, 2).to(torch.float8_e4m3fn), TypeError, "has type torch.float8_e4m3fn"),
    "complex": (lambda: torch.ones(2, 2, dtype=torch.complex64), TypeError, "has type torch.complex64"),
    "negated": (lambda: torch._neg_view(torch.ones(2, 2)), ValueError, "is a lazily negated view: give"),
    "expanded": (lambda: torch.ones(2, 1).expand(2, 2), ValueError, "elements overlap in memory"),
    "strided": (lambda: torch.ones(4).as_strided((2, 2), (1, 1)), ValueError, "elements overlap in memory"),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_that_has_no_norms_is_refused_by_name(kind: str) -> None:
    make, error, message = ODD_TENSORS[kind]
    param = torch.nn.Parameter(make())
    optimizer = torch.optim.SGD([("odd", param)], lr=0.1)
    with pytest.raises(error, match=f"parameter 'odd' of shape .*{message}") as caught:
        nw.Decay(optimizer, L2, param)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_and_lazy_parameters_are_refused_by_name() -> None:
    nested = torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    lazy = torch.nn.LazyLinear(3).weight
    for param, message in (
        (nested, "parameter 'odd' has layout nested, and a unit needs a dense"),
        (lazy, "parameter 'odd' is a lazy parameter without values: run the model once to initialise it"),
    ):
        optimizer = torch.optim.SGD([("odd", param)], lr=0.1)
        with pytest.raises(ValueError, match=message):
            nw.Decay(optimizer, L2, param)
        with pytest.raises(ValueError, match=r"a tensor (has|is)"):
            nw.Unit(param)


def _views(kind: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    whole = torch.nn.Parameter(torch.ones(4, 6))
    views = {
        "same": whole.data,
        "transposed": whole.data.T,
        "rows": whole.data[2:],
        "columns": whole.data[:, 3:],
        "other type": whole.data.view(torch.bfloat16),
    }
    return whole, torch.nn.Parameter(views[kind])


@pytest.mark.parametrize("kind", ["same", "transposed", "rows", "columns", "other type"])
@pytest.mark.parametrize("how", ["one", "joint", "two"])
def test_parameters_that_share_memory(kind: str, how: str) -> None:
    first, second = _views(kind)
    optimizer = torch.optim.SGD([("first", first), ("second", second)], lr=0.1)
    params: Any = [first, second]
    if how == "joint":
        params = nw.Unit(params, dim=None)
    if how == "two":
        nw.Decay(optimizer, L2, first)
        params = second
    with pytest.raises(ValueError, match=r"'second' of shape .* shares memory with parameter 'first'.*twice"):
        nw.Decay(optimizer, L2, params)
    second.data = second.data.clone()
    nw.Decay(optimizer, L2, params)


def test_disjoint_views_of_one_storage_are_no_fault() -> None:
    flat = torch.ones(4, 6)
    parts = [flat[:2, :2], flat[2:, :2], flat[:, 2:4], flat[:, 4:], torch.ones(0, 3)]
    params = [torch.nn.Parameter(part) for part in parts]
    optimizer = torch.optim.SGD(params, lr=0.1)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(1.0), params[:2])
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(1.0), params[2:])
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(flat, torch.full((4, 6), 1 / (1 + 0.1 * 2**0.5)))
