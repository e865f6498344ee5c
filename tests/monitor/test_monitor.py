"""Rows of a Monitor against a float64 reference, under everything that can happen to an optimizer's step."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tests.monitor.common import BATCHES, Kept, loss_of, network, plan_of, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.1, momentum=0.9),
    "SGD fused": functools.partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamW": functools.partial(AdamW, lr=0.01),
    "AdamW fused": functools.partial(AdamW, lr=0.01, fused=True),
}
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "flow": {"rule": nw.AdaptiveWeightShrink(0.5)},
    "explicit": {"rule": nw.L2(0.5), "mode": "explicit"},
    "coupled": {"rule": nw.L2(0.5), "mode": "coupled"},
    "every": {"rule": nw.L2(0.5), "every": 4},
}
each_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_rule = pytest.mark.parametrize("settings", RULES.values(), ids=RULES)


def _with_decay(optimizer: Optimizer, plan: nw.Plan, settings: dict[str, Any]) -> nw.Decay | None:
    return nw.Decay(optimizer, params=plan.units, **settings) if settings else None


def _reference(before: Tensor, after: Tensor, gradient: Tensor, lr: float, degree: int) -> dict[str, float]:
    """The numbers of a layer of rows, computed element by element in float64."""
    before, after, gradient = before.double(), after.double(), gradient.double()
    old, new = before.norm(dim=1), after.norm(dim=1)
    chord = (after / new[:, None] - before / old[:, None]).norm(dim=1)
    turn = 2 * torch.asin(chord / 2)
    update = after - before
    across = update - (update * before).sum(1, keepdim=True) / old[:, None] ** 2 * before
    scale = gradient.norm(dim=1) * old if degree == 2 else across.norm(dim=1) / lr
    along = (update * before).sum(1) / (old * update.norm(dim=1))
    return {
        "norm": float(new.mean()),
        "norm_min": float(new.min()),
        "norm_max": float(new.max()),
        "rotation": float(turn.mean()),
        "effective_lr": float((lr / new**degree).mean()),
        "gradient_scale": float(scale.sqrt().mean() ** 2),
        "update_along": float(along.abs().mean()),
    }


@each_optimizer
@each_rule
@pytest.mark.parametrize("first", ["monitor", "decay"])
@pytest.mark.one_in(2)
def test_rows_equal_a_reference_whoever_was_attached_first(
    build: Callable[..., Optimizer], settings: dict[str, Any], first: str
) -> None:
    model = network()
    plan = plan_of(model)
    optimizer = build(plan.param_groups(weight_decay=0.01))
    if first == "decay":
        _with_decay(optimizer, plan, settings)
    tracker = Kept()
    monitor = nw.Monitor(optimizer, plan=plan, every=1, trackers=tracker)
    if first == "monitor":
        _with_decay(optimizer, plan, settings)
    degree = 2 if isinstance(optimizer, SGD) else 1
    weight, seen = model[0].weight, []
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        assert weight.grad is not None
        before, gradient = weight.detach().clone(), weight.grad.clone()
        optimizer.step()
        seen.append(_reference(before, weight.detach(), gradient, optimizer.param_groups[0]["lr"], degree))
    assert tracker.steps == list(range(1, 13))
    assert monitor.layers == ("0", "3", "5")
    for row, (_, values) in zip(seen, tracker.rows, strict=True):
        for name in ("norm", "norm_min", "norm_max", "rotation", "effective_lr", "update_along"):
            assert values[f"normwise/{name}/0"] == pytest.approx(row[name], rel=2e-5, abs=1e-9)
    assert tracker.rows[0][1]["normwise/gradient_scale/0"] == pytest.approx(
        seen[0]["gradient_scale"], rel=1e-5
    )


@each_optimizer
@each_rule
@pytest.mark.one_in(2)
def test_a_monitor_changes_no_bit_of_training(
    build: Callable[..., Optimizer], settings: dict[str, Any]
) -> None:
    results = []
    for monitored in (False, True):
        model = network()
        plan = plan_of(model)
        optimizer = build(plan.param_groups(weight_decay=0.01))
        _with_decay(optimizer, plan, settings)
        if monitored:
            nw.Monitor(optimizer, plan=plan, every=2, trackers=Kept())
        train(model, optimizer)
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_rule
def test_rows_do_not_depend_on_the_order_of_hooks(settings: dict[str, Any]) -> None:
    rows = []
    for first in ("decay", "monitor"):
        model = network()
        plan = plan_of(model)
        optimizer = SGD(plan.param_groups(), lr=0.1, momentum=0.9)
        tracker = Kept()
        if first == "decay":
            _with_decay(optimizer, plan, settings)
        nw.Monitor(optimizer, plan=plan, every=4, trackers=tracker)
        if first == "monitor":
            _with_decay(optimizer, plan, settings)
        train(model, optimizer)
        rows.append(tracker.rows)
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [1, 4, 8, 12]


@pytest.mark.parametrize("build", [OPTIMIZERS["SGD"], OPTIMIZERS["AdamW"]], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("first", ["monitor", "decay"])
@pytest.mark.one_in(2)
def test_a_start_in_equilibrium_is_seen_and_not_disturbed(
    build: Callable[..., Optimizer], first: str
) -> None:
    """plan.attach places units in the first steps: norms jump, and the rotations are those of the steps."""
    results, turns, batches = [], [], BATCHES * 4
    for monitored in (False, True):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(100)
        plan = plan_of(model)
        optimizer = build(plan.param_groups())
        tracker = Kept()
        if monitored and first == "monitor":
            nw.Monitor(optimizer, plan=plan, every=1, trackers=tracker)
        plan.attach(optimizer, total_steps=len(batches))
        if monitored and first == "decay":
            nw.Monitor(optimizer, plan=plan, every=1, trackers=tracker)
        for batch in batches:
            before = nn.functional.normalize(model[0].weight.detach().double(), dim=1)
            train(model, optimizer, [batch])
            after = nn.functional.normalize(model[0].weight.detach().double(), dim=1)
            if not monitored:
                turns.append(float(2 * torch.asin((after - before).norm(dim=1) / 2).mean()))
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    shown = [values["normwise/rotation/0"] for _, values in tracker.rows]
    assert shown == pytest.approx(turns, rel=1e-4)
    last = tracker.rows[-1][1]
    assert last["normwise/norm/0"] == pytest.approx(last["normwise/equilibrium_norm/0"], rel=0.5)


def test_observed_steps_contain_the_decay_of_several_steps_at_once() -> None:
    """With ``Decay(every=4)`` and a multiple of 4, every row but the first follows an application."""
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Monitor(optimizer, plan=plan, every=4, trackers=(tracker := Kept()))
    nw.Decay(optimizer, nw.L2(0.5), plan.units, every=4)
    weight, norms = model[0].weight, []
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        norms.append(float(weight.detach().double().norm(dim=1).mean()))
    shown = [values["normwise/norm/0"] for _, values in tracker.rows]
    assert shown == pytest.approx([norms[0], norms[3], norms[7], norms[11]], rel=1e-12)


def test_clipped_and_accumulated_gradients_are_those_that_the_optimizer_sees() -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    monitor = nw.Monitor(optimizer, plan=plan, every=1)
    for batch in BATCHES[:3]:
        loss_of(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    weight = model[0].weight
    assert weight.grad is not None
    expected = weight.grad.double().norm(dim=1)
    optimizer.step()
    assert monitor.last is not None
    torch.testing.assert_close(monitor.last.rows[0].movement.gradient, expected, rtol=1e-6, atol=0)


@each_optimizer
def test_grad_scaler(build: Callable[..., Optimizer]) -> None:
    """Gradients are unscaled, and a skipped step is not observed but the next one is."""
    rows = []
    for scaled in (False, True):
        model = network()
        plan = plan_of(model)
        optimizer = build(plan.param_groups())
        tracker = Kept()
        nw.Monitor(optimizer, plan=plan, every=3, trackers=tracker)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled, growth_interval=10**6)
        for k, batch in enumerate(BATCHES[:7]):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if k == 5 and not scaled:
                continue
            if k == 5:
                assert model[0].weight.grad is not None
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        rows.append([values for _, values in tracker.rows])
    # fused: step 6 was called and skipped, so step 7 is observed; else it was never called
    assert len(rows[1]) == 3
    assert len(rows[0]) == 3 or "fused" not in str(build)
    for name, value in rows[0][1].items():
        assert rows[1][1][name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


def test_with_a_closure() -> None:
    rows = []
    for with_closure in (False, True):
        model = network()
        plan = plan_of(model)
        optimizer = SGD(plan.param_groups(), lr=0.1, momentum=0.9)
        nw.Decay(optimizer, nw.L2(0.5), plan.units, mode="explicit")
        monitor = nw.Monitor(optimizer, plan=plan, every=2, trackers=(tracker := Kept()))
        for batch in BATCHES:

            def closure(
                model: Any = model, optimizer: Optimizer = optimizer, batch: Tensor = batch
            ) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                monitor.record(loss=closure())
                optimizer.step()
        rows.append(tracker.rows)
    assert rows[0] == rows[1]
    assert "normwise/loss" in rows[0][0][1]


def test_a_group_that_is_added_later() -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD([model[0].weight], lr=0.1)
    with pytest.warns(UserWarning, match="not in the optimizer"):
        nw.Monitor(optimizer, plan=plan, every=1, trackers=(tracker := Kept()))
    train(model, optimizer, BATCHES[:2])
    optimizer.add_param_group({"params": [model[3].weight], "lr": 0.01})
    train(model, optimizer, BATCHES[:2])
    names = [{name for name in values if "effective_lr" in name} for _, values in tracker.rows]
    assert names[1] == {"normwise/effective_lr/0"}
    assert names[2] == {"normwise/effective_lr/0", "normwise/effective_lr/3"}
    values = tracker.rows[-1][1]
    ratio = values["normwise/effective_lr/3"] * values["normwise/norm/3"] ** 2
    assert ratio == pytest.approx(0.01, rel=0.2)


def test_an_optimizer_for_each_parameter() -> None:
    """Each steps during the backward pass; rows are complete when all have stepped."""
    rows = []
    for alone in (False, True):
        model = network()
        plan = plan_of(model)
        params = list(model.parameters())
        optimizers = [SGD([p], lr=0.1) for p in params] if alone else [SGD(params, lr=0.1)]
        nw.Monitor(optimizers, plan=plan, every=2, trackers=(tracker := Kept()))
        if alone:
            for p, one in zip(params, optimizers, strict=True):

                def step(param: Tensor, one: Optimizer = one) -> None:
                    one.step()
                    one.zero_grad()

                p.register_post_accumulate_grad_hook(step)
            for batch in BATCHES:
                loss_of(model, batch).backward()
        else:
            train(model, optimizers[0])
        rows.append(tracker.rows)
    assert rows[0] == rows[1]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["monitor", "decay"])
@pytest.mark.one_in(2)
def test_under_compile_nothing_is_compiled_again(first: str) -> None:
    rows = []
    for compiled in (False, True):
        model = network()
        plan = plan_of(model)
        optimizer = SGD(plan.param_groups(), lr=torch.tensor(0.1), momentum=0.9)
        if first == "decay":
            nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.5), plan.units)
        nw.Monitor(optimizer, plan=plan, every=2, trackers=(tracker := Kept()))
        if first == "monitor":
            nw.Decay(optimizer, nw.AdaptiveWeightShrink(0.5), plan.units)
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        frames = []
        for batch in BATCHES:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            step()
            frames.append(counter.frame_count)
        assert frames[-1] == frames[3]
        rows.append(tracker.rows)
    for (step_, plain), (other_step, other) in zip(*rows, strict=True):
        assert step_ == other_step
        assert other == pytest.approx(plain, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("carried", ["by the optimizer", "by hand", "by hand, before the optimizer"])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_interrupted(carried: str) -> None:
    def start() -> tuple[Any, Optimizer, nw.Monitor, Kept]:
        model = network()
        plan = plan_of(model)
        optimizer = SGD(plan.param_groups(), lr=0.1, momentum=0.9)
        tracker = Kept()
        return model, optimizer, nw.Monitor(optimizer, plan=plan, every=2, trackers=tracker), tracker

    model, optimizer, monitor, tracker = start()
    train(model, optimizer, BATCHES[:7])
    saved = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "opt": optimizer.state_dict(), "mon": monitor.state_dict()}, saved
    )
    train(model, optimizer, BATCHES[7:])
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other, resumed, again, rows = start()
    other.load_state_dict(loaded["model"])
    if carried != "by the optimizer":
        del loaded["opt"]["normwise"]  # as torch.distributed.checkpoint does
    if carried == "by hand, before the optimizer":
        again.load_state_dict(loaded["mon"])
    resumed.load_state_dict(loaded["opt"])
    if carried == "by hand":
        again.load_state_dict(loaded["mon"])
    train(other, resumed, BATCHES[7:])
    assert rows.rows == tracker.rows[-3:]
    assert again.steps == 12


def test_the_state_rides_in_that_of_the_first_optimizer_beside_those_of_the_decays() -> None:
    def start() -> tuple[list[Optimizer], nw.Decay, nw.Monitor]:
        model = network()
        halves = list(model.parameters())[:2], list(model.parameters())[2:]
        optimizers: list[Optimizer] = [SGD(params, lr=0.1) for params in halves]
        decay = nw.Decay(optimizers[0], nw.Sphere(), [model[0].weight])
        monitor = nw.Monitor(optimizers, units=[model[0].weight, model[3].weight], every=2)
        train(model, optimizers[0], BATCHES[:3])
        optimizers[1].step()
        return optimizers, decay, monitor

    optimizers, _, monitor = start()
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert set(states[0]["normwise"]) == {"format", "decay", "monitor"}
    assert "normwise" not in states[1]
    expected = repr(monitor.state_dict())
    resumed, _, again = start()
    for optimizer in resumed:
        optimizer.zero_grad()
        optimizer.step()
    assert repr(again.state_dict()) != expected
    for optimizer, state in zip(resumed, states, strict=True):
        optimizer.load_state_dict(state)
    assert repr(again.state_dict()) == expected
    again.remove()
    assert set(resumed[0].state_dict()["normwise"]) == {"format", "decay"}


def test_a_monitor_that_the_saved_run_had_not_begins_without_a_word() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    state = optimizer.state_dict()
    assert "normwise" not in state
    monitor = nw.Monitor(optimizer, units=[model[0].weight], every=1)
    optimizer.load_state_dict(state)  # warnings are errors
    train(model, optimizer, BATCHES[:1])
    assert monitor.steps == 1
    SGD(model.parameters(), lr=0.1).load_state_dict(optimizer.state_dict())  # and one that is left out


def test_a_state_of_another_monitor_does_not_keep_the_optimizer_from_loading() -> None:
    model = network()
    saving = SGD(model.parameters(), lr=0.1, momentum=0.9)
    nw.Decay(saving, nw.Sphere(), [model[0].weight])
    nw.Monitor(saving, units=[model[0].weight])
    train(model, saving, BATCHES[:2])
    state = saving.state_dict()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    decay = nw.Decay(optimizer, nw.Sphere(), [model[0].weight])
    monitor = nw.Monitor(optimizer, units=[model[3].weight])
    before = repr(monitor.state_dict())
    with pytest.warns(
        UserWarning, match=r"Monitor\(1 layer.*\) goes on from its own state: .*of other layers"
    ):
        optimizer.load_state_dict(state)
    assert repr(monitor.state_dict()) == before
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert decay.state_dict()["steps"] == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("memory"), "damaged .no 'memory'"),
        (lambda state: state["memory"].update(other={}), "'other' is damaged"),
        (lambda state: state["memory"]["0"].update(square=3.0), "'0' is damaged"),
        (lambda state: state["findings"].pop("past"), "findings .* damaged"),
        (lambda state: state["findings"].update(found=7), "findings .* damaged"),
        (lambda state: state.update(steps=[1, 2]), "of 2 optimizers"),
    ],
)
def test_a_damaged_state_is_an_error_that_changes_nothing(
    damage: Callable[[dict[str, Any]], Any], words: str
) -> None:
    model = network()
    optimizer = SGD(list(model.named_parameters()), lr=0.1)
    monitor = nw.Monitor(optimizer, units=[model[0].weight], every=1)
    train(model, optimizer, BATCHES[:2])
    assert monitor.layers == ("0",)
    state, before = monitor.state_dict(), repr(monitor.state_dict())
    damage(state)
    with pytest.raises(ValueError, match=words):
        monitor.load_state_dict(state)
    with pytest.raises(ValueError, match=words):
        monitor.check_state_dict(state)
    assert repr(monitor.state_dict()) == before


def test_units_of_the_decays_are_watched_by_default() -> None:
    model = network()
    optimizer = SGD(list(model.named_parameters()), lr=0.1)
    nw.Decay(optimizer, nw.L2(0.1), model[0].weight)
    monitor = nw.Monitor(optimizer, every=1)
    train(model, optimizer, BATCHES[:1])
    assert monitor.layers == ("0",)
    assert monitor.last is not None
    assert "equilibrium_norm" in monitor.last.rows[0].values


def test_a_model_without_a_plan() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    monitor = nw.Monitor(optimizer, model=model, every=1)
    train(model, optimizer, BATCHES[:1])
    assert monitor.layers == ("0", "3", "5")
    assert monitor.last is not None
    assert {row.layer.kind for row in monitor.last.rows} == {"weight"}


def test_balance_of_a_pair_is_the_conserved_difference() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    plan = nw.plan(model, [torch.randn(32, 4)], progress=False)
    assert plan.verdicts == {"0.weight": "balance", "2.weight": "balance"}
    optimizer = SGD(plan.param_groups(weight_decay=0.01), lr=0.01)
    nw.Monitor(optimizer, plan=plan, every=1, trackers=(tracker := Kept()))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 4)).square().mean().backward()
        optimizer.step()
        expected = float((model[0].weight.square().sum() - model[2].weight.square().sum()).detach())
        values = tracker.rows[-1][1]
        (name,) = (name for name in values if name.startswith("normwise/balance/"))
        assert abs(values[name]) == pytest.approx(abs(expected), rel=1e-5)
        assert values["normwise/pull/0"] == pytest.approx(1e-4)


def test_units_one_by_one_on_request() -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    monitor = nw.Monitor(optimizer, plan=plan, every=1, per_unit="0", trackers=(tracker := Kept()))
    train(model, optimizer, BATCHES[:1])
    values = tracker.rows[0][1]
    assert [values[f"normwise/norm/0/{k}"] for k in range(8)] == pytest.approx(
        model[0].weight.double().norm(dim=1).tolist(), rel=1e-12
    )
    assert monitor.last is not None
    assert "normwise/norm/3/0" not in values


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_norms(scale: float) -> None:
    weight = nn.Parameter(torch.randn(3, 5) * scale)
    optimizer = SGD([weight], lr=1.0)
    monitor = nw.Monitor(optimizer, units=[weight], every=1)
    before = weight.detach().double()
    weight.grad = torch.randn(3, 5) * 1e-3 * scale
    optimizer.step()
    assert monitor.last is not None
    chord = before / before.norm(dim=1, keepdim=True) - weight.double() / weight.double().norm(
        dim=1, keepdim=True
    )
    turn = 2 * torch.asin(chord.norm(dim=1) / 2)
    torch.testing.assert_close(monitor.last.rows[0].movement.rotation, turn, rtol=1e-6, atol=0)


def test_remove_closes_trackers_and_stops() -> None:
    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    monitor = nw.Monitor(optimizer, plan=plan, every=1, trackers=(tracker := Kept()))
    train(model, optimizer, BATCHES[:2])
    monitor.remove()
    monitor.remove()
    train(model, optimizer, BATCHES[:2])
    assert tracker.closed
    assert tracker.steps == [1, 2]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_full_disk_does_not_end_the_training() -> None:
    class Full(Kept):
        def log(self, step: int, values: Any) -> None:
            raise OSError(28, "No space left on device")

    model = network()
    plan = plan_of(model)
    optimizer = SGD(plan.param_groups(), lr=0.1)
    nw.Monitor(optimizer, plan=plan, every=1, trackers=[Full(), kept := Kept()])
    with pytest.warns(UserWarning, match="No space left on device.*gets no more rows: make room"):
        train(model, optimizer, BATCHES[:1])
    train(model, optimizer, BATCHES[:2])
    assert kept.steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0 is not allowed: give a number of steps, 1 or more"),
        ({"every": 2.5}, "every must be a number of steps, not 2.5"),
        ({"total_steps": -1}, "total_steps=-1 is not allowed"),
        ({"trackers": ["tensorboard"]}, "trackers must be objects such as nw.trackers.JSONL"),
        ({"trackers": [Kept]}, "trackers must be objects"),
        ({"units": []}, "units is empty: give at least one Unit"),
        ({"plan": None}, "nothing says what to watch: give plan="),
        ({"plan": "a plan"}, "plan must be a normwise.Plan"),
        ({"per_unit": "nothing*"}, "matches no layer"),
        ({"units": [torch.ones(3, 2)]}, "the optimizer holds none of the 1 watched weights"),
        ({"units": ["weight"]}, "units must be Units or parameters, not str"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    given = arguments if "units" in arguments or "plan" in arguments else {"model": model, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        nw.Monitor(optimizer, **given)
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_without_the_weights_of_the_plan() -> None:
    model, other = network(), network()
    optimizer = SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of the 3 watched weights, such as '0'.*apply_to"):
        nw.Monitor(optimizer, plan=plan_of(model))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        nw.Monitor(model, plan=plan_of(model))


def test_a_state_of_other_layers_changes_nothing() -> None:
    model = network()
    monitor = nw.Monitor(SGD(model.parameters(), lr=0.1), units=[model[0].weight])
    other = nw.Monitor(SGD(model.parameters(), lr=0.1), units=[model[3].weight, model[0].weight])
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="of other layers"):
        monitor.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="no state of a Monitor"):
        monitor.load_state_dict({"format": 7})
    assert monitor.state_dict() == before
