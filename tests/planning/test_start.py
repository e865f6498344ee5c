"""Starting in equilibrium: norms as the formula says, and the training of a rescaled model."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw
from normwise.decay.start import JointGroup, Start
from normwise.planning.stepping import Stepping, stepping_of

DOUBLE = torch.float64
STEPS, STRENGTH = 40, 3.0
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "SGD with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "SGD fused": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0),
}


def network(scale: float = 1.0, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    """Two layers whose rows are scale-invariant exactly: their norms have no eps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8, bias=False),
        nn.BatchNorm1d(8, eps=1e-40),
        nn.Tanh(),
        nn.Linear(8, 6, bias=False),
        nn.BatchNorm1d(6, eps=1e-40),
    ).to(dtype)
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.weight.mul_(scale)  # type: ignore[operator]
    return net


def weights_of(net: nn.Sequential) -> list[nn.Parameter]:
    return [net.get_parameter("0.weight"), net.get_parameter("3.weight")]


def batches(number: int, dtype: torch.dtype = DOUBLE) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield tuple(torch.randn(16, n, generator=generator, dtype=dtype) for n in (5, 6))  # type: ignore[misc]


def train(
    net: nn.Sequential, optimizer: Optimizer, number: int, skip: int = 0, clip: float = math.inf
) -> list[float]:
    losses = []
    for step, (x, y) in enumerate(batches(skip + number, net.get_parameter("0.weight").dtype)):
        if step < skip:
            continue
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def attached(net: nn.Sequential, name: str, **options: Any) -> tuple[Optimizer, nw.Decay]:
    optimizer = OPTIMIZERS[name](net.parameters())
    return optimizer, nw.attach(optimizer, weights_of(net), total_steps=STEPS, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_step_is_that_of_the_rescaled_model(name: str, scale: float) -> None:
    net = network(scale)
    optimizer, decay = attached(net, name)
    (x, _), *_ = batches(1)
    before = [w.detach().clone() for w in weights_of(net)]
    factors: list[Tensor] = []
    optimizer.register_step_pre_hook(  # after the hook of the Decay
        lambda *_: factors.extend(
            w.detach().norm(dim=1) / old.norm(dim=1) for w, old in zip(weights_of(net), before, strict=True)
        )
    )
    train(net, optimizer, 1)

    other = network(scale)
    with torch.no_grad():
        for weight, factor in zip(weights_of(other), factors, strict=True):
            weight.mul_(factor[:, None])
    torch.testing.assert_close(other(x), network(scale)(x))  # the same function
    second = OPTIMIZERS[name](other.parameters())
    nw.Decay(second, decay.rule, weights_of(other), measure="relative")
    train(other, second, 1)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    log_scale=st.floats(-6, 6),
    lr=st.floats(1e-3, 1.0),
    momentum=st.sampled_from([0.0, 0.9]),
    strength=st.floats(0.5, 10),
)
def test_norms_under_sgd_are_those_of_the_formula(
    log_scale: float, lr: float, momentum: float, strength: float
) -> None:
    net = network(10**log_scale)
    optimizer = SGD(net.parameters(), lr=lr, momentum=momentum)
    nw.attach(optimizer, weights_of(net), total_steps=STEPS, strength=strength)
    found: list[Tensor] = []
    gammas: list[Tensor] = []
    (x, y), *_ = batches(1)
    (net(x) - y).square().mean().backward()
    for w in weights_of(net):
        assert w.grad is not None
        gammas.append((w.detach().norm(dim=1) * w.grad.norm(dim=1)).square().mean().sqrt())
    optimizer.register_step_pre_hook(lambda *_: found.extend(w.detach().norm(dim=1) for w in weights_of(net)))
    optimizer.step()
    for norms, gamma in zip(found, gammas, strict=True):
        wanted = (lr * gamma**2 * STEPS * lr / (2 * strength * (1 - momentum) ** 2)) ** 0.25
        torch.testing.assert_close(norms, wanted.expand_as(norms), rtol=0.02, atol=0)  # D is measured


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_values_under_adam_are_those_of_the_formula(lr: float) -> None:
    net = network(1e3)
    optimizer = AdamW(net.parameters(), lr=lr, weight_decay=0)
    nw.attach(optimizer, weights_of(net), total_steps=STEPS)
    found: list[float] = []
    optimizer.register_step_pre_hook(
        lambda *_: found.extend(float(w.detach().square().mean().sqrt()) for w in weights_of(net))
    )
    train(net, optimizer, 1)
    assert found == pytest.approx([math.sqrt(lr * STEPS * lr / (2 * STRENGTH))] * 2, rel=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.one_in(2)
def test_training_does_not_depend_on_the_initial_scale(name: str) -> None:
    results = []
    for scale in (1e-6, 1.0, 1e6):
        net = network(scale)
        optimizer, _ = attached(net, name)
        train(net, optimizer, STEPS)
        results.append([p.detach().clone() for p in net.parameters()])
    for other in (results[0], results[2]):
        for one, two in zip(results[1], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)  # Adam has an eps of its own


@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_clipped_gradients_lead_to_the_same_norms_from_every_scale(clip: float) -> None:
    """From a tiny norm the first gradient is huge and clipped, so γ is measured more than once."""
    measured = []
    for scale in (1e-5, 1.0, 1e5):
        net = network(scale)
        optimizer, decay = attached(net, "SGD with momentum")
        train(net, optimizer, 16, clip=clip)
        assert decay.start is not None
        measured.append([sum(readings[-4:]) / 4 for readings in decay.start.readings])
    for other in (measured[0], measured[2]):
        assert other == pytest.approx(measured[1], abs=2 * math.log(1.2))  # of γ, whose root is the norm


@pytest.mark.parametrize("at", [1, 3, 36])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.one_in(2)
def test_a_resumed_run_is_not_placed_twice(name: str, at: int) -> None:
    net = network(1e-2)
    optimizer, decay = attached(net, name)
    train(net, optimizer, at)
    saved = io.BytesIO()
    torch.save([x.state_dict() for x in (net, optimizer, decay)], saved)
    train(net, optimizer, 48 - at, skip=at)

    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    other = network(7.0)
    other.load_state_dict(states[0])  # before attaching, which changes nothing yet
    second, resumed = attached(other, name)
    second.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    train(other, second, 48 - at, skip=at)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("at", [0, 3])
def test_a_copy_goes_on_as_the_original(at: int) -> None:
    net = network(1e-2)
    optimizer, _ = attached(net, "SGD with momentum")
    train(net, optimizer, at)
    other, second = copy.deepcopy((net, optimizer))
    train(net, optimizer, 10, skip=at)
    train(other, second, 10, skip=at)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_closure_gives_the_same_as_a_plain_step() -> None:
    nets = [network(1e-2), network(1e-2)]
    optimizers = [attached(net, "SGD with momentum")[0] for net in nets]
    train(nets[0], optimizers[0], 5)
    for x, y in batches(5):

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizers[1].zero_grad()
            loss = (nets[1](x) - y).square().mean()
            loss.backward()
            return loss.item()  # type: ignore[no-any-return]

        optimizers[1].step(closure)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_does_not_change_where_training_starts(fused: bool) -> None:
    results = []
    for scaled in (False, True):
        net = network(1e-2, torch.float32)
        # momentum would begin from memory that torch does not initialise in a step that it skips
        optimizer = SGD(net.parameters(), lr=0.05, momentum=0.0 if fused else 0.9, fused=fused)
        nw.attach(optimizer, weights_of(net), total_steps=STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for number, (x, y) in enumerate(batches(6, torch.float32)):
            optimizer.zero_grad()
            scaler.scale((net(x) - y).square().mean()).backward()
            if scaled and number == 0:  # a step that overflows is skipped, and nothing is placed in it
                weights_of(net)[0].grad.fill_(torch.inf)  # type: ignore[union-attr]
                before = [p.detach().clone() for p in net.parameters()]
                scaler.step(optimizer)
                assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
                scaler.update()
            elif number:
                scaler.step(optimizer)
                scaler.update()
        results.append([w.detach() for w in weights_of(net)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_unit_without_a_gradient_waits_and_dead_ones_stay() -> None:
    net = network(1e3)
    first, second = weights_of(net)
    with torch.no_grad():
        first[2] = 0.0
    optimizer, decay = attached(net, "SGD")
    assert decay.start is not None
    (x, y), *_ = batches(1)
    (net(x) - y).square().mean().backward()
    second.grad = None
    before = second.detach().clone()
    assert first.grad is not None
    seen, gradient = [], first.grad[2].clone()
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend([first.detach()[2].clone(), first.grad[2].clone()])  # type: ignore[index]
    )
    optimizer.step()
    assert torch.equal(second, before)
    assert decay.start.waiting
    assert torch.equal(seen[0], torch.zeros(5, dtype=DOUBLE))
    assert torch.equal(seen[1], gradient)
    norms = first.detach()[[0, 1, 3, 4, 5, 6, 7]].norm(dim=1)
    assert float(norms.max() / norms.min()) < 1.5
    train(net, optimizer, 32, skip=1)
    assert not decay.start.waiting


def test_masked_units_are_placed_and_the_others_stay() -> None:
    net = network(1e3)
    first, _ = weights_of(net)
    mask = torch.tensor([True] * 4 + [False] * 4)
    optimizer = SGD(net.parameters(), lr=0.0)
    optimizer.param_groups[0]["initial_lr"] = 0.05
    nw.attach(optimizer, nw.Unit(first, 0, mask), total_time=2.0)
    before = first.detach().clone()
    train(net, optimizer, 1)
    assert torch.equal(first[4:], before[4:])
    assert float(first[:4].detach().norm()) < 100


class Joint(nn.Module):
    """``out`` reads a normalised sum of two branches: both and the bias have one free scale together."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.norm = nn.LayerNorm(8, eps=1e-30)
        self.out = nn.Linear(8, 3)
        self.double()
        with torch.no_grad():
            for p in (self.left.weight, self.left.bias, self.right.weight):
                p.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.left(x) + self.right(x.tanh())))  # type: ignore[no-any-return]


@pytest.mark.parametrize("adam", [False, True])
def test_a_joint_group_moves_by_one_factor_with_its_biases(adam: bool) -> None:
    x = torch.randn(16, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    results = []
    for scale in (1e-3, 1.0, 1e3):
        model = Joint(scale)
        plan = nw.plan(model, [x], progress=False)
        groups = [s for s in plan.symmetries if all(e > 0 for e in s.values())]
        assert {"left.weight", "left.bias", "right.weight"} in [set(group) for group in groups]
        optimizer: Optimizer = (
            AdamW(plan.param_groups(), lr=0.01) if adam else SGD(plan.param_groups(), lr=0.05, momentum=0.9)
        )
        plan.attach(optimizer, total_steps=STEPS)
        before, outputs = [p.detach().clone() for p in model.parameters()], model(x)
        seen: list[Any] = []
        handle = optimizer.register_step_pre_hook(
            lambda *_: seen.extend([[p.detach().clone() for p in model.parameters()], model(x).detach()])  # noqa: B023
        )
        for step in range(10):
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
            if not step:
                handle.remove()
                torch.testing.assert_close(seen[1], outputs)
                factor = seen[0][0].norm() / before[0].norm()
                for p, q in zip(seen[0][:3], before[:3], strict=True):
                    torch.testing.assert_close(p, factor * q)
                assert all(torch.equal(p, q) for p, q in zip(seen[0][3:], before[3:], strict=True))
        results.append([p.detach().clone() for p in model.parameters()])
    for other in (results[0], results[2]):
        for one, two in zip(results[1], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_eps_of_the_norm_layers_bounds_the_start() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8, eps=1e-3), nn.Linear(8, 3)).double()
    x = torch.randn(32, 5, dtype=DOUBLE)
    plan = nw.plan(net, [x], progress=False)
    (shrunk,) = [t for t in plan.treatments if t.verdict == "shrink"]
    assert shrunk.smallest_rms > 0.01
    optimizer = SGD(plan.param_groups(), lr=1e-9)
    decay = plan.attach(optimizer, total_steps=10)
    before = net(x)
    net(x).square().sum().backward()
    optimizer.step()
    assert decay.start is not None
    assert decay.start.bounded == {0}
    torch.testing.assert_close(net(x), before, rtol=0.05, atol=0.05)
    assert plan.load is not None


def test_several_optimizers_and_what_they_leave_out(caplog: pytest.LogCaptureFixture) -> None:
    net = network(1e2)
    x = torch.randn(32, 5, dtype=DOUBLE)
    plan = nw.plan(net, [x], progress=False)
    first = SGD([net.get_parameter("0.weight")], lr=0.1)
    rest = [p for n, p in net.named_parameters() if n != "0.weight"]
    second = AdamW(rest, lr=0.01, weight_decay=0)
    decays = plan.attach([first, second], total_steps=10)
    assert [len(decay.units) for decay in decays] == [1, 1]
    net(x).square().sum().backward()
    first.step()
    second.step()
    assert all(float(w.detach().norm(dim=1).max()) < 10 for w in weights_of(net))
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [net.get_parameter("0.weight")], "lr": 0.0}]
    still = SGD(groups, lr=0.1)
    with caplog.at_level(logging.INFO, "normwise"):
        decay = plan.attach(still, total_steps=10)
    assert len(decay.units) == 1
    assert "left out, as the learning rate is 0: 0.weight" in caplog.text


def test_an_optimizer_that_has_stepped_is_refused_with_the_remedy() -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match=r'attach before the first step .* or give start="as is"'):
        nw.attach(optimizer, weights_of(net), total_time=1.0)
    with pytest.raises(ValueError, match="start='hot' is not known"):
        nw.attach(optimizer, weights_of(net), total_time=1.0, start="hot")
    with pytest.raises(ValueError, match=r"rule=.*give the class AdaptiveWeightShrink or L2"):
        nw.attach(optimizer, weights_of(net), total_time=1.0, rule=nw.Sphere, start="as is")


@pytest.mark.parametrize("state", [None, [], [[0.0]], [["x"], [0.0]], [[math.nan], [0.0]]])
def test_a_damaged_state_of_a_start_is_refused(state: Any) -> None:
    net = network()
    _, decay = attached(net, "SGD")
    saved = decay.state_dict()
    with pytest.raises(ValueError, match="start"):
        decay.load_state_dict(saved | {"start": state})
    assert decay.state_dict()["start"] == [[], []]


# -- how optimizers step -------------------------------------------------------------------------------------


def stepping(make: Callable[[Any], Optimizer]) -> Stepping | str:
    return stepping_of(make([nn.Parameter(torch.zeros(2, 2))]))


@pytest.mark.parametrize(
    ("make", "grows", "per_element"),
    [
        (lambda p: SGD(p, lr=0.1), True, 1.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), True, 100.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), True, 100.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.9), True, 1.0),
        (lambda p: AdamW(p), False, 1.0),
        (lambda p: torch.optim.Adam(p, betas=(0.5, 0.99)), False, 1.0),
        (lambda p: torch.optim.RMSprop(p), False, 1.0),
    ],
)
def test_the_diffusivity_is_that_of_theory(make: Any, grows: bool, per_element: float) -> None:
    found = stepping(make)
    assert isinstance(found, Stepping)
    assert found.grows_with_gradient is grows
    assert found.per_element == pytest.approx(per_element, rel=0.12)
    assert found.buffers is not None
    assert {e for name, e in found.buffers.items() if "sq" not in name} <= {-1.0}
    assert {e for name, e in found.buffers.items() if "sq" in name} <= {-2.0}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.Adafactor, "grow with the norm of the weights"),
        (torch.optim.Adagrad, "changes its own step size"),
        (torch.optim.RAdam, "changes its own step size"),
    ],
)
def test_optimizers_without_a_balance_are_refused_with_the_reason(make: Any, reason: str) -> None:
    assert reason in str(stepping(make))
    net = network()
    with pytest.raises(ValueError, match=f"{reason}.*nw.Decay with a coefficient"):
        nw.attach(make(net.parameters(), lr=0.01), weights_of(net), total_steps=10)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
def test_a_group_in_two_optimizers_moves_together() -> None:
    x = torch.randn(16, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    results = []
    for scale in (1e-3, 1.0, 1e3):
        model = Joint(scale)
        plan = nw.plan(model, [x], progress=False)
        left = [model.left.weight]
        rest = [p for p in model.parameters() if p is not model.left.weight]
        optimizers: list[Optimizer] = [
            torch.optim.Muon(left, lr=0.01, weight_decay=0),
            AdamW(rest, lr=0.01, weight_decay=0),
        ]
        decays = plan.attach(optimizers, total_steps=STEPS)
        assert len(decays) == 2
        before, outputs = [p.detach().clone() for p in model.parameters()], model(x).detach()
        seen: list[list[Tensor]] = []
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(
                lambda *_: seen.append([p.detach().clone() for p in model.parameters()])  # noqa: B023
            )
        for _ in range(5):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        factors = [seen[0][0].norm() / before[0].norm(), seen[1][2].norm() / before[2].norm()]
        torch.testing.assert_close(factors[0], factors[1])
        torch.testing.assert_close(seen[1][1], factors[0] * before[1])  # the bias
        moved = Joint(scale)
        moved.load_state_dict(dict(zip(dict(moved.named_parameters()), before, strict=True)))
        with torch.no_grad():
            for p in (moved.left.weight, moved.left.bias, moved.right.weight):
                p.mul_(factors[0])
        torch.testing.assert_close(moved(x), outputs)
        results.append([p.detach().clone() for p in model.parameters()])
    for other in (results[0], results[2]):
        for one, two in zip(results[1], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)  # Muon orthogonalises in bfloat16


def test_an_optimizer_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for steps inside the backward pass; optimizers that are alike are measured once."""
    net = network(1e3)
    plan = nw.plan(net, [torch.randn(32, 5, dtype=DOUBLE)], progress=False)
    optimizers = [AdamW([p], lr=0.01, weight_decay=0) for p in net.parameters()]
    measured: list[Optimizer] = []

    def noted(optimizer: Optimizer, group: int) -> Stepping | str:
        measured.append(optimizer)
        return stepping_of(optimizer, group)

    monkeypatch.setattr("normwise.planning.attach.stepping_of", noted)
    decays = plan.attach(optimizers, total_steps=10)
    assert (len(decays), len(measured)) == (2, 1)
    for p, optimizer in zip(net.parameters(), optimizers, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    (x, y), *_ = batches(1)
    (net(x) - y).square().mean().backward()
    assert all(float(w.detach().norm(dim=1).max()) < 1 for w in weights_of(net))


def test_a_group_beside_an_optimizer_whose_steps_grow_stays_and_it_is_said() -> None:
    model = Joint(1e3)
    plan = nw.plan(model, [torch.randn(16, 6, dtype=DOUBLE)], progress=False)
    rest = [p for p in model.parameters() if p is not model.left.weight]
    said: list[str] = []
    optimizers: list[Optimizer] = [SGD([model.left.weight], lr=0.1), AdamW(rest, lr=0.01, weight_decay=0)]
    decays = plan.attach(optimizers, total_steps=10, announce=said.append)
    assert said[-1].startswith("started as they are: left.weight, right.weight, whose group has weights in")
    assert all(said[-1] in decay.explain() for decay in decays)
    assert not any(decay.start.waiting for decay in decays if decay.start is not None)


def across(weight: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """Return a random gradient of a scale-invariant weight, with this γ in each unit."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    norms = weight.norm(dim=1, keepdim=True)
    noise -= (noise * weight).sum(1, keepdim=True) / norms**2 * weight
    gradient: Tensor = gamma * noise / noise.norm(dim=1, keepdim=True) / norms
    return gradient


@pytest.mark.parametrize("later", [0.4, 0.02])
def test_momentum_is_rescaled_with_a_later_placement(later: float) -> None:
    """A model that is rescaled between two steps, with its momentum, goes on as if it had not been."""
    results = []
    for scale in (1.0, 1 / 8):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 9, generator=generator, dtype=DOUBLE))
        optimizer = SGD([weight], lr=0.1, momentum=0.9)
        nw.attach(optimizer, [weight], 20.0)
        weight.grad = across(weight.detach(), 0.1, generator)
        optimizer.step()
        with torch.no_grad():
            weight.mul_(scale)
            optimizer.state[weight]["momentum_buffer"].div_(scale)
        weight.grad = across(weight.detach(), later, generator)
        optimizer.step()
        results.append(weight.detach().clone())
    if later > 0.1:  # the unit grows
        torch.testing.assert_close(*results)
    else:  # to shrink it enlarges no momentum: in units of the weight its step becomes smaller, not larger
        assert float(results[0].norm() / results[1].norm()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_every_few_steps_starts_alike_and_ends_close(name: str) -> None:
    """Flows compose, so only what the steps in between add differs: of second order in the rate."""
    ends = []
    for every in (1, 4):
        net = network(1e-3)
        optimizer, decay = attached(net, name, every=every, strength=0.3)
        assert decay.every == every
        train(net, optimizer, STEPS)
        decay.flush()
        ends.append(torch.cat([w.detach().norm(dim=1) for w in weights_of(net)]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0.04, atol=0.0)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_running_statistics_fit_the_placed_weights(name: str) -> None:
    """Evaluation mode works soon after the placement; without the model they would not fit."""
    errors = []
    for given_model in (True, False):
        net = network(1e3)
        optimizer, _ = attached(net, name, model=net if given_model else None)
        train(net, optimizer, 100)  # 0.9¹⁰⁰ of the first statistics are left: 3e-5 of 1, or of 1e6
        norm = net[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_var is not None
        (x, _), *_ = batches(1)
        with torch.no_grad():
            errors.append(float((norm.running_var / net[0](x).var(0)).log().abs().max()))
    assert errors[0] < 2.0  # batches of 16
    assert errors[1] > 5.0


def test_running_statistics_in_evaluation_mode_stay() -> None:
    net = network(1e3)
    plan = nw.plan(net, [x for x, _ in batches(1)], progress=False)
    optimizer = SGD(plan.param_groups(), lr=0.05)
    plan.attach(optimizer, total_steps=STEPS)
    frozen = net[1]
    assert isinstance(frozen, nn.BatchNorm1d)
    assert frozen.running_var is not None
    train(net, optimizer, 1)
    torch.testing.assert_close(frozen.running_var, torch.ones_like(frozen.running_var))  # as new
    frozen.eval()
    before = frozen.running_var.clone()
    train(net, optimizer, 1)
    assert torch.equal(frozen.running_var, before)


def test_units_that_move_together_are_placed_when_one_of_them_has_another_norm() -> None:
    """Otherwise the factor that a group shares would lie between "place this one" and "leave that one"."""
    groups = [JointGroup({0: 1.0, 1: 1.0}), JointGroup({1: 1.0, 2: -1.0})]
    start = Start([1.0] * 4, [True] * 4, groups, steps=32)
    assert start._members_by_unit() == {which: {0, 1, 2} for which in range(3)}
    start.readings = [[0.0], [0.0], [0.0], [0.0]]
    assert start._are_placed({0, 1, 2})  # the first time
    start.readings = [[0.0, 0.15], [0.0, 0.3], [0.0, 0.0], [0.0, 0.15]]  # log γ: n₀ by half of it
    assert start._are_placed({0, 1, 2})
    assert not start._are_placed({3})
    start.readings = [[0.0, 0.15, 0.3], [0.0, 0.3, 0.4], [0.0, 0.0, 0.0], [0.0, 0.15, 0.3]]
    assert not start._are_placed({0, 1, 2})  # as all three were placed in the second step
    assert start._are_placed({3})  # which was not


def test_where_the_gradient_scale_stays_a_unit_is_placed_once() -> None:
    results = []
    for steps in (1, 32):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 9, generator=generator, dtype=DOUBLE))
        optimizer = SGD([weight], lr=0.1, momentum=0.9)
        decay = nw.attach(optimizer, [weight], 20.0)
        assert decay.start is not None
        decay.start.steps = steps
        for step in range(8):
            weight.grad = across(weight.detach(), 0.1 if step % 2 else 0.11, generator)
            optimizer.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


def test_a_group_waits_until_each_of_its_units_is_measured() -> None:
    start = Start([1.0] * 4, [True] * 4, [JointGroup({0: 1.0, 1: 1.0}), JointGroup({1: 1.0, 2: 1.0})])
    start.readings = [[0.5], [0.5], [], [0.5]]
    assert start._wait_together([0, 1, 3]) == [3]  # 2 was not measured, so 1 waits, and 0 with it
    assert start.readings == [[], [], [], [0.5]]


@pytest.mark.parametrize("falling", [1.0, 0.8])
def test_a_placement_does_not_raise_the_momentum(falling: float) -> None:
    """Placing a unit again undoes its growth: to divide the buffer by the same factor would raise it."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 9, generator=generator, dtype=DOUBLE))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    decay = nw.attach(optimizer, [weight], 20.0)
    assert decay.start is not None
    steps, norms, steps_taken = decay.start.steps, [], []
    for step in range(steps):
        before = weight.detach().clone()
        weight.grad = across(before, 0.1 * falling**step, generator)
        optimizer.step()
        norms.append(weight.detach().norm(dim=1))
        steps_taken.append(0.1 * optimizer.state[weight]["momentum_buffer"].norm(dim=1) / norms[-1])
        if step == 0:  # as after a turn towards what the gradients pointed to
            unit = weight.detach() / norms[0][:, None]
            optimizer.state[weight]["momentum_buffer"] = -3.0 * unit * norms[0][:, None]
    assert float(norms[-1].max() / norms[0].min()) < 5
    assert float(steps_taken[-1].max()) < 0.3  # in units of the weight
