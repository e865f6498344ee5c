"""Claim: norms and rotations settle where the theory says, and the rules balance layers differently."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import normwise as nw
from normwise.lab.claims.claim import Budget, Claim, Finding, Plot, Runs, Series, Table, Verdict
from normwise.lab.claims.statistics import mean_with_interval, paired_difference
from normwise.lab.claims.traces import traces
from normwise.lab.engine.run import Run
from normwise.lab.runs.equilibrium import EquilibriumRun

NORM = 0.4  # where the rules have the same pull, and where all units start: near the equilibrium
EPSILON = 0.2
# momentum: learning rate, and rate c(NORM) of a decoupled rule; both give the same norm at equilibrium
CALM, HEAVY = 0.0, 0.9
RATES = {CALM: (0.1, 0.05), HEAVY: (0.01, 0.5)}
LOW = {CALM: 0.9, HEAVY: 0.8}
HIGH = 1.1
L2, AWS, SHIFTED, SPHERE = "L2", "AWS", "ε-shifted L2", "sphere"
RULES = (L2, AWS, SHIFTED, SPHERE)
ORDER = (L2, AWS, SPHERE)

Arm = tuple[str, float, str]  # rule, momentum, mode
ALL: tuple[Arm, ...] = (
    *((rule, momentum, "flow") for momentum in (CALM, HEAVY) for rule in RULES),
    (L2, HEAVY, "coupled"),
    (AWS, HEAVY, "coupled"),
)
FEW: tuple[Arm, ...] = tuple((rule, CALM, "flow") for rule in ORDER)


class Equilibrium(Claim):
    """See the texts."""

    id = "equilibrium"
    order = 9
    title = "Where norms and rotations settle"
    source = (
        "The mechanism behind Li, Chen & Yang, AAAI 2020: decay modulates the effective learning rate "
        "η/‖W‖². "
        "Theory for L2: van Laarhoven, arXiv 1706.05350; Wan et al., arXiv 2006.08419; Kosson et al., arXiv "
        "2305.17212; for the other rules: docs/theory.md."
    )
    question = (
        "At a constant learning rate, do the norm of each unit and its rotation in a step settle where "
        "normwise.theory puts them, given the size of the gradients? And which rule lets all layers turn "
        "equally fast?"
    )
    arms = (
        f"L2, AWS, ε-shifted L2 (ε = {EPSILON:g}) and a sphere of radius {NORM:g} by their flows, SGD, "
        "without momentum (learning rate 0.1) and with 0.9 (0.01); with momentum also L2 and AWS coupled. "
        f"All rules pull alike at norm {NORM:g}: decoupled at the rate 0.05, with momentum 0.5, coupled "
        f"1 − 0.9 times that. Units start at norm {NORM:g}, 450 steps of batches of 25; the last 250 are "
        "measured. Of members but the first (full budget): L2, AWS, sphere, without momentum. Rates and "
        "norms "
        "are from pilots with other seeds; Adam is left out."
    )
    statistic = (
        "For each layer, the median over its units of measured/predicted norm, and of measured/predicted "
        "rotation per step (root mean square), where the prediction has the root mean square of "
        "‖gradient‖·‖w‖ of that unit; mean over seeds. The imbalance of a run: the rotation of its fastest "
        "layer over that of its slowest (medians over units)."
    )
    rule = (
        f"A setting (member, rule, momentum, mode) agrees where, in every layer, both ratios lie in "
        f"{LOW[CALM]:g} … {HIGH:g} without momentum and in {LOW[HEAVY]:g} … {HIGH:g} with it, as successive "
        "gradients correlate. The order holds where, without momentum, the mean imbalance grows from L2 to "
        "AWS to sphere. Reproduced: all settings agree, and the order holds for every member. Partly: half "
        "of "
        "the settings agree, or the order holds for some member. Not reproduced: otherwise."
    )

    def runs(self, budget: Budget) -> list[Run]:
        """All settings with all seeds."""
        return [
            replace(_run(budget, member, arm), seed=seed)
            for member, arm in _cells(budget)
            for seed in _seeds(budget)
        ]

    def judge(self, budget: Budget, runs: Runs) -> Finding:
        """Compare measured with predicted, and the layers with each other."""
        cells: list[dict[str, Any]] = []
        rows, notes = [], []
        imbalance: dict[tuple[str, Arm], list[float | None]] = {}
        for member, arm in _cells(budget):
            found: list[Any] = runs.values("layers", _run(budget, member, arm), _seeds(budget))
            there: list[Any] = [layers for layers in found if layers is not None]
            family, name = member.replace("_", " "), _name(arm)
            imbalance[member, arm] = [None if layers is None else _imbalance(layers) for layers in found]
            if not there:
                notes.append(f"{family}, {name}: no run finished.")
                cells.append({"member": member, "setting": name, "agrees": False})
                continue
            ratios = {
                key: {
                    layer: mean_with_interval([s[layer][f"{key}_ratio"] for s in there]) for layer in there[0]
                }
                for key in ("norm", "turn")
            }
            means = [estimate.mean for by_layer in ratios.values() for estimate in by_layer.values()]
            agrees = len(there) == len(found) and all(LOW[arm[1]] <= mean <= HIGH for mean in means)
            spread = mean_with_interval(imbalance[member, arm])
            cells.append(
                {"member": member, "setting": name, "agrees": agrees, "imbalance": spread.as_dict()}
                | {key: {k: v.as_dict() for k, v in by_layer.items()} for key, by_layer in ratios.items()}
            )
            for layer in there[0]:
                mean = {
                    key: mean_with_interval([s[layer][key] for s in there]).mean for key in there[0][layer]
                }
                rows.append(
                    [
                        family,
                        name,
                        layer,
                        f"{mean['gradient_scale']:.3f}",
                        f"{mean['norm']:.3f}",
                        f"{mean['predicted_norm']:.3f}",
                        f"{mean['norm_ratio']:.3f}",
                        f"{mean['turn']:.4f}",
                        f"{mean['predicted_turn']:.4f}",
                        f"{mean['turn_ratio']:.3f}",
                        f"{mean['drift']:.3f}",
                    ]
                )
        order = {member: self._order(member, imbalance) for member in budget.members}
        agreeing = sum(cell["agrees"] for cell in cells)
        verdict: Verdict = "not reproduced"
        if agreeing == len(cells) and all(one["holds"] for one in order.values()):
            verdict = "reproduced"
        elif 2 * agreeing >= len(cells) or any(one["holds"] for one in order.values()):
            verdict = "partly"
        columns = ["member", "setting", "layer", "γ", "norm", "predicted", "ratio"]
        columns += ["rotation (rad)", "predicted", "ratio", "drift"]
        tables = [
            Table("Measured and predicted: means over seeds of medians over units", columns, rows),
            Table(
                "Rotation of the fastest layer over that of the slowest",
                ["member", "setting", "mean", "low", "high"],
                [
                    [member.replace("_", " "), _name(arm)]
                    + [_rounded(v) for v in mean_with_interval(values)[:3]]
                    for (member, arm), values in imbalance.items()
                ],
            ),
        ]
        notes.append(
            "The norm on a sphere is its radius by construction; only its rotation is a test. Drift is the "
            "norm in the second half of the measured steps over that in the first: 1 where it has settled."
        )
        first = budget.members[0]
        traced = {
            arm[0]: replace(_run(budget, first, arm), seed=budget.seeds[0]) for arm in ALL if arm[1] == CALM
        }
        return Finding(
            verdict,
            _answer(cells, order, first),
            {"settings": cells, "agree": agreeing, "of": len(cells), "order": order},
            [_plot(budget, runs, key, momentum) for key in ("norm", "turn") for momentum in (CALM, HEAVY)],
            tables,
            notes,
            traces=traces(runs, traced, f"{first.replace('_', ' ')}, no momentum, seed {budget.seeds[0]}"),
        )

    def _order(self, member: str, imbalance: dict[tuple[str, Arm], list[float | None]]) -> dict[str, Any]:
        values = {rule: imbalance[member, (rule, CALM, "flow")] for rule in ORDER}
        means = [mean_with_interval(values[rule]).mean for rule in ORDER]
        return {
            "holds": means[0] < means[1] < means[2],
            "imbalance": dict(zip(ORDER, map(_rounded, means), strict=True)),
            "AWS_minus_L2": paired_difference(values[AWS], values[L2]).as_dict(),
            "sphere_minus_AWS": paired_difference(values[SPHERE], values[AWS]).as_dict(),
        }


def _seeds(budget: Budget) -> tuple[int, ...]:
    """Two in the quick budget: every step is measured, and seeds differ by less than the bounds."""
    return budget.seeds if budget.full else budget.seeds[:2]


def _cells(budget: Budget) -> list[tuple[str, Arm]]:
    first, *others = budget.members
    return [(first, arm) for arm in ALL] + [(member, arm) for member in others for arm in FEW]


def _run(budget: Budget, member: str, arm: Arm) -> EquilibriumRun:
    name, momentum, mode = arm
    lr, rate = RATES[momentum]
    l2 = nw.L2(rate)
    to: dict[str, type[nw.Rule] | nw.Rule] = {
        L2: nw.L2,
        AWS: nw.AdaptiveWeightShrink,
        SHIFTED: nw.EpsilonShiftedL2(1.0, epsilon=EPSILON),
    }
    rule = (
        nw.Sphere(NORM)
        if name == SPHERE
        else nw.theory.match(l2, to[name], norm=NORM, momentum=momentum, to_mode=mode)
    )
    base = budget.training
    return EquilibriumRun(
        data=base.data,
        fingerprint=base.fingerprint,
        train_size=base.train_size,
        image_size=base.image_size,
        width=base.width,
        member=member,
        batch_size=25,
        init_scale=NORM,
        lr=lr,
        momentum=momentum,
    ).with_rule(rule, mode)


def _name(arm: Arm) -> str:
    name, momentum, mode = arm
    return f"{name}{', coupled' if mode == 'coupled' else ''}, momentum {momentum:g}"


def _imbalance(layers: dict[str, dict[str, float]]) -> float:
    turns = [layer["turn"] for layer in layers.values()]
    return max(turns) / min(turns)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


def _plot(budget: Budget, runs: Runs, key: str, momentum: float) -> Plot:
    member = budget.members[0]
    series = []
    for arm in (arm for arm in ALL if arm[1] == momentum and arm[2] == "flow"):
        found: list[Any] = runs.values("layers", _run(budget, member, arm), _seeds(budget))
        there = [layers for layers in found if layers is not None]
        if not there:
            continue
        names = list(there[0])
        for which, label in ((key, "measured"), (f"predicted_{key}", "predicted")):
            values = [[layers[name][which] for layers in there] for name in names]
            at = {float(k): value for k, value in enumerate(values, start=1)}
            curve = Series.over(f"{arm[0]}, {label}", at, which != key, RULES.index(arm[0]))
            series.append(curve if which == key else replace(curve, low=None, high=None, by_seed=None))
    what = {"norm": "Norm", "turn": "Rotation per step"}[key]
    title = f"{what} by layer, momentum {momentum:g} ({member.replace('_', ' ')})"
    return Plot(title, "layer", {"norm": "norm", "turn": "angle (rad)"}[key], series)


def _answer(cells: list[dict[str, Any]], order: dict[str, Any], first: str) -> str:
    errors = {
        momentum: [
            abs(estimate["mean"] - 1)
            for cell in cells
            if cell["setting"].endswith(f"momentum {momentum:g}") and "norm" in cell
            for key in ("norm", "turn")
            for estimate in cell[key].values()
        ]
        for momentum in (CALM, HEAVY)
    }
    worst = {momentum: f"{100 * max(values, default=math.nan):.0f} %" for momentum, values in errors.items()}
    agreeing = sum(cell["agrees"] for cell in cells)
    turned = ", ".join(f"{value} under {rule}" for rule, value in order[first]["imbalance"].items())
    return (
        f"In {agreeing} of {len(cells)} settings norms and rotations settle where the theory puts them: "
        f"it is off by at most {worst[CALM]} without momentum and {worst[HEAVY]} with it, in any layer. "
        f"The fastest layer turns faster than the slowest by these factors: {turned}."
    )


CLAIM = Equilibrium()
