"""``match``: rules of equal strength, by algebra and by what they do to a norm."""

from __future__ import annotations

import pytest
import torch

import normwise as nw
from normwise.decay.rules import Rule
from normwise.theory import equilibrium_norm, match

RULES: list[Rule] = [
    nw.L2(0.03),
    nw.AdaptiveWeightShrink(0.05),
    nw.PowerShrink(0.02, power=2.5),
    nw.EpsilonShiftedL2(0.04, epsilon=0.2),
]
MODES = ("flow", "explicit", "coupled")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to_mode", MODES)
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("to", RULES, ids=repr)
def test_rates_agree_and_the_way_back_is_the_inverse(rule: Rule, to: Rule, mode: str, to_mode: str) -> None:
    norm, momentum = 1.7, 0.9
    matched = match(rule, to, norm, momentum, mode, to_mode)
    decoupled = rule.rate(norm) / (1 - momentum if mode == "coupled" else 1)
    theirs = matched.rate(norm) / (1 - momentum if to_mode == "coupled" else 1)
    torch.testing.assert_close(theirs, decoupled, rtol=1e-13, atol=0)
    assert matched.settings() == {**to.settings(), "coefficient": matched.settings()["coefficient"]}
    back = match(matched, rule, norm, momentum, to_mode, mode)
    torch.testing.assert_close(back.rate(norm), rule.rate(norm), rtol=1e-13, atol=0)


def test_a_class_where_a_coefficient_is_enough() -> None:
    assert match(nw.L2(0.5), nw.AdaptiveWeightShrink, norm=2.0) == nw.AdaptiveWeightShrink(0.25)
    assert match(nw.L2(0.5), nw.EpsilonShiftedL2) == nw.EpsilonShiftedL2(0.5 / (1 - 1e-3))
    assert match(nw.L2(0.5), nw.L2, norm=torch.tensor(3.0).item()) == nw.L2(0.5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_coupled_pull_through_the_buffer_is_the_decoupled_one(rule: Rule) -> None:
    """A unit without gradient: rule coupled through momentum against its match, in the limit of small lr."""
    momentum, lr, steps = 0.9, 1e-4, 4000
    decoupled = match(rule, rule, momentum=momentum, mode="coupled", to_mode="flow")
    norm = torch.tensor(1.0, dtype=torch.float64)
    buffer = torch.zeros_like(norm)
    for _ in range(steps):
        buffer = momentum * buffer + rule.rate(norm) * norm
        norm = norm - lr * buffer
    lost = 1 - norm
    torch.testing.assert_close(1 - decoupled.flow(1.0, lr * steps), lost, rtol=5e-3, atol=0)
    assert (1 - rule.flow(1.0, lr * steps)) < 0.2 * lost  # and unmatched, it is not


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("mode", ["flow", "explicit"])
def test_matched_at_its_equilibrium_a_rule_has_the_same_equilibrium(rule: Rule, mode: str) -> None:
    lr, scale, momentum = 0.05, 0.7, 0.9
    norm = equilibrium_norm(rule, lr, scale, momentum, mode)
    coupled = match(rule, nw.L2, norm.item(), momentum, mode, "coupled")
    theirs = equilibrium_norm(coupled, lr, scale, momentum, "coupled")
    torch.testing.assert_close(theirs, norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0.1, nw.L2), TypeError, "rule must be a decay rule such as .*not 0.1"),
        ((nw.L2(0.1), "L2"), TypeError, "to must be a decay rule or a class of rules.*not 'L2'"),
        ((nw.L2(0.1), Rule), TypeError, "to=Rule"),
        ((nw.L2(0.1), nw.PowerShrink), TypeError, r"power.*give an instance, PowerShrink\(1.0, ...\)"),
        ((nw.Sphere(1.0), nw.L2), ValueError, "rule=Sphere.* has no rate"),
        ((nw.L2(0.1), nw.Sphere), ValueError, "to=Sphere.* has no rate"),
        ((nw.L2(0.1), nw.Sphere(1.0)), ValueError, "to=Sphere.* has no rate"),
        ((nw.L2(lambda step: 0.1), nw.L2), ValueError, r"rule=L2 .* function of the step: .*\.at\(step\)"),
        ((nw.L2(0.1), nw.L2(lambda step: 0.1)), ValueError, "to=L2 .* function of the step"),
        ((nw.L2(0.1), nw.PublishedEpsilonShift(0.1)), ValueError, "not a function of the norm"),
        ((nw.L2(0.0), nw.L2), ValueError, r"rule=L2\(coefficient=0.0\) has the rate 0 at norm=1"),
        ((nw.EpsilonShiftedL2(0.1, 2.0), nw.L2), ValueError, "has the rate -0.1 at norm=1"),
        ((nw.L2(0.1), nw.EpsilonShiftedL2(0.1, 1.0)), ValueError, "to=EpsilonShiftedL2.* rate 0"),
        ((nw.L2(0.1), nw.L2, 0.0), ValueError, "norm=0 is not allowed"),
        ((nw.L2(0.1), nw.L2, torch.ones(2)), TypeError, "norm must be one number"),
        ((nw.L2(0.1), nw.L2, 1.0, -0.1), ValueError, "momentum=-0.1 is not allowed"),
        ((nw.L2(0.1), nw.L2, 1.0, 0.9, "before"), ValueError, "mode='before' is not a mode"),
        ((nw.L2(0.1), nw.L2, 1.0, 0.9, "flow", "L2"), ValueError, "to_mode='L2' is not a mode"),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        match(*arguments)  # type: ignore[arg-type]
