"""Every way of stepping an optimizer on one device: decayed exactly once a step, with that step's rate."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from tests.decay.common import each_mode, each_rule, gradients, weight
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw
from normwise.decay.rules import MODES, Rule

# -- the rate of that very step, of the parameter's own group ----------------------------------------------


@each_rule
@each_mode
def test_tensor_rates_equal_numbers(mode: str, rule: Rule) -> None:
    ends = []
    for kind in (float, lambda lr: torch.tensor(lr, dtype=torch.float64)):
        param = weight(3, 5)
        optimizer = SGD([param], lr=kind(0.5), momentum=0.9)
        nw.Decay(optimizer, rule, param, mode=mode, clock="lr^2/max_lr" if mode == "flow" else "lr")
        for lr, grad in zip((0.5, 0.25, 0.125), gradients(param, 3), strict=True):
            optimizer.param_groups[0]["lr"] = kind(lr)
            param.grad = grad
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_a_tensor_rate_filled_in_place_keeps_its_peak() -> None:
    param = weight(3, 5)
    lr = torch.tensor(0.5)
    optimizer = SGD([param], lr=lr)
    nw.Decay(optimizer, nw.L2(1.0), param, clock="lr^2/max_lr")
    for rate in (0.5, 0.25):
        lr.fill_(rate)
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close(param.detach(), before * math.exp(-(rate**2) / 0.5))


@each_mode
def test_the_rate_that_a_scheduler_has_set_for_this_step(mode: str) -> None:
    param = weight(3, 5)
    optimizer = SGD([param], lr=1.0)
    nw.Decay(optimizer, nw.L2(0.5), param, mode=mode)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    expected = param.detach().clone()
    for lr in (1.0, 0.1, 0.01):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        expected *= math.exp(-0.5 * lr) if mode == "flow" else 1 - 0.5 * lr
    torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize(
    ("mode", "clock"), [*((mode, "lr") for mode in MODES), *((m, "lr^2/max_lr") for m in MODES[:2])]
)
def test_groups_added_later_have_their_own_rate(mode: str, clock: str) -> None:
    first, later = weight(3, 5), weight(2, 2)
    optimizer = SGD([first], lr=1.0)
    nw.Decay(optimizer, nw.L2(0.5), first, mode=mode, clock=clock)
    first.grad = torch.zeros_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [later], "lr": 0.1})
    nw.Decay(optimizer, nw.L2(0.5), later, mode=mode, clock=clock)
    before = [p.detach().clone() for p in (first, later)]
    for param in (first, later):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old, lr in zip((first, later), before, (1.0, 0.1), strict=True):
        factor = math.exp(-0.5 * lr) if mode == "flow" else 1 - 0.5 * lr
        torch.testing.assert_close(param.detach(), old * factor)


# -- unusual steps -----------------------------------------------------------------------------------------


class Nested(SGD):
    """A subclass whose step calls its parent's, after tampering with the gradients."""

    tamper = "nothing"

    def step(self, closure: Any = None) -> Any:
        for param in (p for group in self.param_groups for p in group["params"]):
            if self.tamper == "in place":
                param.grad.mul_(0.5)
            elif self.tamper == "anew":
                param.grad = param.grad * 0.5
        return super().step(closure)


@pytest.mark.parametrize("tamper", ["nothing", "in place", "anew"])
@pytest.mark.parametrize("parent_hooked", [False, True])
@each_rule
@each_mode
def test_a_step_within_a_step_decays_once(mode: str, rule: Rule, parent_hooked: bool, tamper: str) -> None:
    if parent_hooked:
        SGD([weight(1, 1)], lr=1.0)  # from now on SGD.step itself calls hooks
    param, plain = weight(3, 5), weight(3, 5)
    nested, other = Nested([param], lr=0.1), SGD([plain], lr=0.1 if tamper == "nothing" else 0.05)
    nested.tamper = tamper
    nw.Decay(nested, rule, param, mode=mode, clock="step" if mode == "flow" else "lr")
    if tamper != "nothing" and mode == "explicit":
        rule = type(rule)(**{**vars(rule), "coefficient": vars(rule)["coefficient"] * 2})
    nw.Decay(other, rule, plain, mode=mode, clock="step" if mode == "flow" else "lr")
    for grad in gradients(param, 3):
        param.grad, plain.grad = grad.clone(), grad.clone()
        nested.step()
        other.step()
    torch.testing.assert_close(param, plain, rtol=1e-5, atol=1e-6)


@each_mode
def test_a_step_that_raised_is_not_decayed_again(mode: str) -> None:
    class Failing(SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError("once")
            return super().step(closure)

    param, plain = weight(3, 5), weight(3, 5)
    optimizer, other = Failing([param], lr=0.1), SGD([plain], lr=0.1)
    nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.3), param, mode=mode)
    nw.Decay(other, nw.AdaptiveWeightShrink(0.3), plain, mode=mode)
    for step, grad in enumerate(gradients(param, 3)):
        param.grad, plain.grad = grad.clone(), grad.clone()
        optimizer.fails = step == 1
        if optimizer.fails:
            with pytest.raises(MemoryError):
                optimizer.step()
            optimizer.fails = False  # the same step is tried again
        optimizer.step()
        other.step()
        assert torch.equal(param, plain)
        assert torch.equal(param.grad, grad)


def test_a_rule_removed_after_a_step_that_raised_gives_the_gradient_back() -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise MemoryError("once")

    param = weight(3, 5)
    optimizer = Failing([param], lr=0.1)
    decay = nw.Decay(optimizer, nw.L2(0.3), param, mode="coupled")
    kept = param.grad = torch.ones(3, 5)
    with pytest.raises(MemoryError):
        optimizer.step()
    decay.remove()
    assert param.grad is kept


@each_rule
@each_mode
def test_an_optimizer_per_parameter_stepped_inside_backward(mode: str, rule: Rule) -> None:
    def run(inside: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizers = {p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}
        for param, optimizer in optimizers.items():
            if param.ndim > 1:
                nw.Decay(optimizer, rule, param, mode=mode)
            if inside:
                param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            if not inside:
                for optimizer in optimizers.values():
                    optimizer.step()
        return [p.detach() for p in model.parameters()]

    for mine, other in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, other)


@each_rule
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_closures(mode: str, keyword: bool, rule: Rule) -> None:
    """As AdamW does: the closure sees the weights before they are shrunk, the gradient step after."""
    param, plain = weight(3, 5), weight(3, 5)
    optimizer, other = SGD([param], lr=0.1), SGD([plain], lr=0.1)
    nw.Decay(optimizer, rule, param, mode=mode)
    nw.Decay(other, rule, plain, mode=mode)

    def loss_of(weights: nn.Parameter) -> Tensor:
        weights.grad = None
        loss = (weights - 1).pow(4).sum()
        loss.backward()
        return loss

    for _ in range(3):
        expected = loss_of(plain)
        other.step()
        given: dict[str, Any] = {"closure": lambda: loss_of(param)}
        value: Any = optimizer.step(**given) if keyword else optimizer.step(given["closure"])
        assert torch.equal(value, expected)
        assert torch.equal(param, plain)


def test_coupled_with_closures_equals_torch_to_the_bit() -> None:
    """Also where gradients are accumulated in place, and where the closure is evaluated twice in a step."""

    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            return super().step(closure)

    for kind in (SGD, Twice):
        param, plain = weight(3, 5), weight(3, 5)
        optimizer = kind([param], lr=0.1, momentum=0.9)
        other = kind([plain], lr=0.1, momentum=0.9, weight_decay=0.3)
        nw.Decay(optimizer, nw.L2(0.3), param, mode="coupled")
        for to_none in (True, False, False, True):
            for stepped, weights in ((optimizer, param), (other, plain)):

                def closure(
                    stepped: Optimizer = stepped, weights: nn.Parameter = weights, to_none: bool = to_none
                ) -> float:
                    stepped.zero_grad(set_to_none=to_none)
                    loss = (weights - 1).pow(4).sum()
                    loss.backward()
                    return loss.item()

                stepped.step(closure)
            assert torch.equal(param, plain)
            assert param.grad is not None
            assert plain.grad is not None
            assert torch.equal(param.grad, plain.grad)


class ClearsGradients(SGD):
    """As the optimizers of heavyball do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("mode", ["flow", "explicit", "coupled"])
def test_an_optimizer_that_clears_gradients_in_its_step(mode: str, with_closure: bool) -> None:
    params = [weight(3, 5), weight(3, 5)]
    without = weight(2, 2)
    for param, kind in zip(params, (SGD, ClearsGradients), strict=True):
        optimizer = kind([param, without], lr=0.1)
        nw.Decay(optimizer, nw.L2(0.5), [param, without], mode=mode)
        for _ in range(3):

            def closure(param: nn.Parameter = param) -> float:
                param.grad = torch.ones_like(param)
                return 0.0

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    assert torch.equal(*params)
    assert torch.equal(without, weight(2, 2))  # it has no gradient


def test_a_closure_that_leaves_no_gradient() -> None:
    """As in an epoch that only updates the statistics of batch norms, after one that left gradients."""
    param = weight(3, 5)
    optimizer = SGD([param], lr=0.1)
    nw.Decay(optimizer, nw.L2(0.5), param)
    param.grad = torch.ones_like(param)
    optimizer.step(lambda: optimizer.zero_grad() or 0.0)
    assert torch.equal(param, weight(3, 5))


def test_adamw_with_a_closure_to_the_bit() -> None:
    param, plain = weight(3, 5), weight(3, 5)
    optimizer, adamw = AdamW([param], lr=0.1, weight_decay=0), AdamW([plain], lr=0.1, weight_decay=0.3)
    nw.Decay(optimizer, nw.L2(0.3), param, mode="explicit")
    for _ in range(5):
        for stepped, weights in ((optimizer, param), (adamw, plain)):

            def closure(weights: nn.Parameter = weights) -> float:
                weights.grad = None
                loss = (weights - 1).pow(4).sum()
                loss.backward()
                return loss.item()

            stepped.step(closure)
    assert torch.equal(param, plain)


def test_a_closure_that_raised_costs_no_decay() -> None:
    param, plain = weight(3, 5), weight(3, 5)
    optimizer, other = SGD([param], lr=0.1), SGD([plain], lr=0.1)
    nw.Decay(optimizer, nw.L2(0.5), param, mode="explicit")
    nw.Decay(other, nw.L2(0.5), plain, mode="explicit")
    param.grad, plain.grad = torch.ones(3, 5), torch.ones(3, 5)

    def fails() -> float:
        raise MemoryError("once")

    with pytest.raises(MemoryError):
        optimizer.step(fails)
    optimizer.step(lambda: 0.0)
    other.step()
    assert torch.equal(param, plain)


def test_several_rules_beside_one_optimizer() -> None:
    first, second, third = weight(3, 5), weight(3, 4), weight(2, 2)
    optimizer = SGD([first, second, third], lr=1.0)
    nw.Decay(optimizer, nw.L2(0.5), first)
    nw.Decay(optimizer, nw.L2(0.25), second, mode="coupled")
    before = [p.detach().clone() for p in (first, second, third)]
    for param in (first, second, third):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old, factor in zip((first, second, third), before, (math.exp(-0.5), 0.75, 1.0), strict=True):
        torch.testing.assert_close(param.detach(), old * factor)


def test_no_warning_in_an_ordinary_loop_with_a_scheduler() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param = weight(3, 5)
        optimizer = SGD([param], lr=1.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        nw.Decay(optimizer, nw.L2(0.5), param)
        before = param.detach().clone()
        for _ in range(3):
            param.grad = torch.zeros_like(param)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(param.detach(), before * math.exp(-0.5 * (1 + 0.75 + 0.25)))
