"""Claim: norms and rotations settle where the theory says, and the rules balance layers differently."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import normwise as nw
from normwise.lab.claims.claim import Claim, Exhibits, Measured
from normwise.lab.claims.conditions import Condition, Verdict, above, all_of, any_of, below, verdict_of
from normwise.lab.claims.exhibits import Plot, Series, Table, family
from normwise.lab.claims.finished_runs import FinishedRuns, Values, over_seeds
from normwise.lab.claims.layer_curves import layer_curves
from normwise.lab.claims.statistics import (
    Estimate,
    interval,
    mean_with_interval,
    paired_difference,
    pooled_deviation,
)
from normwise.lab.engine.run import Run
from normwise.lab.runs.equilibrium import EquilibriumRun

NORM = 0.4  # where the rules have the same pull, and where all units start: near the equilibrium
EPSILON = 0.2
# momentum: learning rate, and rate c(NORM) of a decoupled rule; both give the same norm at equilibrium
CALM, HEAVY = 0.0, 0.9
RATES = {CALM: (0.1, 0.05), HEAVY: (0.01, 0.5)}
LOW = {CALM: 0.9, HEAVY: 0.8}
HIGH = 1.1
KEYS = ("norm", "turn")  # the ratios
L2, AWS, SHIFTED, SPHERE = "L2", "AWS", "ε-shifted L2", "sphere"
RULES = (L2, AWS, SHIFTED, SPHERE)
ORDER = (L2, AWS, SPHERE)


class Arm(NamedTuple):
    """What a run differs in, besides the member of the family."""

    rule: str
    momentum: float
    mode: str = "flow"

    def __str__(self) -> str:
        coupled = ", coupled" if self.mode == "coupled" else ""
        return f"{self.rule}{coupled}, momentum {self.momentum:g}"


ALL = (
    *(Arm(rule, momentum) for momentum in (CALM, HEAVY) for rule in RULES),
    Arm(L2, HEAVY, "coupled"),
    Arm(AWS, HEAVY, "coupled"),
)
QUICK = tuple(arm for arm in ALL if arm.rule != SHIFTED and arm != Arm(AWS, HEAVY, "coupled"))
FEW = tuple(Arm(rule, CALM) for rule in ORDER)

Layers = dict[str, dict[str, float]]  # what a run measured, by layer
Cell = tuple[str, Arm]  # member of the family, arm


class Equilibrium(Claim):
    """The class attributes are the pre-registration."""

    id = "equilibrium"
    order = 9
    title = "Where norms and rotations settle"
    source = (
        "The mechanism behind Li, Chen & Yang, AAAI 2020: decay modulates the effective learning rate "
        "η/‖W‖². Theory for L2: van Laarhoven, arXiv 1706.05350; Wan et al., arXiv 2006.08419; Kosson et "
        "al., arXiv 2305.17212; for the other rules: docs/theory.md."
    )
    question = (
        "At a constant learning rate, do the norm of each unit and its rotation in a step settle where "
        "normwise.theory puts them, given the size of the gradients? And which rule lets all layers turn "
        "equally fast?"
    )
    arms = (
        f"L2, AWS, ε-shifted L2 (ε = {EPSILON:g}) and a sphere of radius {NORM:g} by their flows, SGD, "
        "without momentum (learning rate 0.1) and with 0.9 (0.01); with momentum also L2 and AWS coupled. "
        f"All rules pull alike at norm {NORM:g}: decoupled at the rate 0.05, with momentum 0.5, coupled 1 − "
        f"0.9 times that (quick: without the ε-shift and coupled AWS). Units start at norm {NORM:g}, 450 "
        "steps of batches of 25; the last 250 are measured. Of members but the first (full budget): L2, "
        "AWS, sphere, without momentum. Rates and norms are from pilots with other seeds; Adam is left out."
    )
    statistic = (
        "For each layer, the median over its units of measured/predicted norm, and of measured/predicted "
        "rotation per step (root mean square), where the prediction has the root mean square of "
        "‖gradient‖·‖w‖ of that unit; mean over 3 seeds (full budget 5), with a 95 % interval by Student's "
        "t, for which the settings of a momentum and layer share their standard deviation between seeds. "
        "The imbalance of a run: the rotation of its fastest layer over that of its slowest (medians over "
        "units); differences between rules are paired by seed."
    )
    rule = (
        "A setting (member, rule, momentum, mode) agrees where, in every layer, both ratios lie with their "
        f"intervals in {LOW[CALM]:g} … {HIGH:g} without momentum and in {LOW[HEAVY]:g} … {HIGH:g} with it, "
        "as successive gradients correlate, and does not where one lies outside or a run did not finish. The "
        "order holds where, without momentum, the imbalance grows from L2 to AWS to sphere, both differences "
        "with intervals above 0. Reproduced: all settings agree, and the order holds for every member. "
        "Partly: half of the settings agree, or the order holds for some member. Not reproduced: otherwise. "
        "Undecided: where an interval contains its threshold and that matters."
    )

    def runs(self) -> list[Run]:
        """All settings with all seeds."""
        return over_seeds((self._settings(*cell) for cell in self._cells), self._seeds)

    def measure(self, runs: FinishedRuns) -> Measured:
        """Compare measured with predicted values, and the layers with each other."""
        settings: list[dict[str, Any]] = []
        layers: dict[Cell, list[Layers]] = {}  # of the runs that finished
        imbalance: dict[Cell, Values] = {}
        for cell in self._cells:
            values: list[Layers | None] = runs.values("layers", self._settings(*cell), self._seeds)
            layers[cell] = [value for value in values if value is not None]
            imbalance[cell] = [None if value is None else _imbalance(value) for value in values]
        deviations = _deviations(layers)
        for (member, arm), finished in layers.items():
            entry: dict[str, Any] = {"member": member, "setting": str(arm), "agrees": False}
            if finished:
                ratios = {
                    key: {
                        layer: _with_common_deviation(
                            [run[layer][f"{key}_ratio"] for run in finished],
                            deviations[arm.momentum, key, layer],
                        )
                        for layer in finished[0]
                    }
                    for key in KEYS
                }
                inside = [
                    condition
                    for by_layer in ratios.values()
                    for ratio in by_layer.values()
                    for condition in (above(ratio, LOW[arm.momentum]), below(ratio, HIGH))
                ]
                entry["agrees"] = all_of([len(finished) == len(self._seeds), *inside])
                entry |= {"imbalance": mean_with_interval(imbalance[member, arm])} | ratios
            settings.append(entry)
        order = {member: _order(member, imbalance) for member in self.budget.members}
        counts = Counter(entry["agrees"] for entry in settings)
        statistics = {
            "settings": settings,
            "agree": counts[True],
            "undecided": counts[None],
            "of": len(settings),
            "order": order,
        }
        return Measured(statistics, {"layers": layers, "imbalance": imbalance})

    def judge(self, measured: Measured) -> Verdict:
        """All settings agree and all members keep the order; or half of the settings, or one member."""
        agree = [entry["agrees"] for entry in measured.statistics["settings"]]
        ordered = [order["holds"] for order in measured.statistics["order"].values()]
        certain, possible = agree.count(True), len(agree) - agree.count(False)
        half: Condition = True if 2 * certain >= len(agree) else None if 2 * possible >= len(agree) else False
        return verdict_of(all_of([*agree, *ordered]), any_of([half, *ordered]))

    def thresholds(self, measured: Measured) -> dict[str, tuple[float, ...]]:
        """Return what the statistics are judged against."""
        found: dict[str, tuple[float, ...]] = {
            f"settings / {k} / {key} / {layer}": (LOW[arm.momentum], HIGH)
            for k, ((_, arm), entry) in enumerate(
                zip(self._cells, measured.statistics["settings"], strict=True)
            )
            for key in KEYS
            for layer in entry.get(key, ())
        }
        for member in self.budget.members:
            found |= {f"order / {member} / {step}": (0.0,) for step in ("AWS_minus_L2", "sphere_minus_AWS")}
        return found

    def headline(self, measured: Measured) -> str:
        """Return what was found, in a line."""
        counts = measured.statistics
        return f"as predicted in {counts['agree']} of {counts['of']} settings, open in {counts['undecided']}"

    def show(self, runs: FinishedRuns, measured: Measured) -> Exhibits:
        """Show measured and predicted values by layer, and the imbalance of the rules."""
        layers, imbalance = measured.details["layers"], measured.details["imbalance"]
        columns = ["member", "setting", "layer", "γ", "norm", "predicted", "ratio"]
        columns += ["rotation (rad)", "predicted", "ratio", "drift"]
        tables = [
            Table(
                "Measured and predicted: means over seeds of medians over units",
                columns,
                [
                    row
                    for (cell, finished), entry in zip(
                        layers.items(), measured.statistics["settings"], strict=True
                    )
                    for row in _layer_rows(cell, finished, entry)
                ],
            ),
            Table(
                "Rotation of the fastest layer over that of the slowest",
                ["member", "setting", "mean", "low", "high"],
                [
                    [family(member), str(arm), *map(_rounded, mean_with_interval(values)[:3])]
                    for (member, arm), values in imbalance.items()
                ],
            ),
        ]
        notes = [
            f"{family(member)}, {arm}: no run finished."
            for (member, arm), finished in layers.items()
            if not finished
        ]
        notes.append(
            "The norm on a sphere is its radius by construction; only its rotation is a test. Drift is the "
            "norm in the second half of the measured steps over that in the first: 1 where it has settled."
        )
        seed = self.budget.seeds[0]
        traced = {
            arm.rule: replace(self._settings(self.first, arm), seed=seed)
            for member, arm in self._cells
            if member == self.first and arm.momentum == CALM
        }
        by_arm = {
            arm: finished
            for (member, arm), finished in layers.items()
            if member == self.first and arm.mode == "flow"
        }
        return Exhibits(
            self._answer(measured.statistics),
            [_plot(self.first, by_arm, key, momentum) for key in _PLOTTED for momentum in (CALM, HEAVY)],
            tables,
            notes,
            traces=layer_curves(runs, traced, f"{family(self.first)}, no momentum, seed {seed}"),
        )

    def _answer(self, statistics: dict[str, Any]) -> str:
        worst = {}
        for momentum in (CALM, HEAVY):
            errors = [
                abs(estimate.mean - 1)
                for entry in statistics["settings"]
                if entry["setting"].endswith(f"momentum {momentum:g}")
                for key in ("norm", "turn")
                for estimate in entry.get(key, {}).values()
            ]
            worst[momentum] = f"{100 * max(errors, default=math.nan):.0f} %"
        factors = statistics["order"][self.first]["imbalance"].items()
        undecided = f" (in {statistics['undecided']} undecided)" if statistics["undecided"] else ""
        return (
            f"In {statistics['agree']} of {statistics['of']} settings{undecided} norms and rotations settle "
            f"where the theory puts them: it is off by at most {worst[CALM]} without momentum and "
            f"{worst[HEAVY]} with it, in any layer. The fastest layer turns faster than the slowest by "
            f"these factors: {', '.join(f'{factor:.2f} under {rule}' for rule, factor in factors)}."
        )

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.budget.seeds

    @property
    def _cells(self) -> list[Cell]:
        arms = ALL if self.budget.full else QUICK
        return [(m, arm) for m in self.budget.members for arm in (arms if m == self.first else FEW)]

    def _settings(self, member: str, arm: Arm) -> EquilibriumRun:
        lr, rate = RATES[arm.momentum]
        to: dict[str, type[nw.Rule] | nw.Rule] = {
            L2: nw.L2,
            AWS: nw.AdaptiveWeightShrink,
            SHIFTED: nw.EpsilonShiftedL2(1.0, epsilon=EPSILON),
        }
        rule = (
            nw.Sphere(NORM)
            if arm.rule == SPHERE
            else nw.theory.match(
                nw.L2(rate), to[arm.rule], norm=NORM, momentum=arm.momentum, to_mode=arm.mode
            )
        )
        changes = {"member": member, "batch_size": 25, "init_scale": NORM, "lr": lr, "momentum": arm.momentum}
        return self.budget.images(EquilibriumRun, **changes).with_rule(rule, arm.mode)


_PLOTTED = {"norm": ("Norm", "norm"), "turn": ("Rotation per step", "angle (rad)")}


def _order(member: str, imbalance: dict[Cell, Values]) -> dict[str, Any]:
    """Compare the imbalance of the rules without momentum."""
    values = {arm.rule: imbalance[member, arm] for arm in FEW}
    steps = {
        "AWS_minus_L2": paired_difference(values[AWS], values[L2]),
        "sphere_minus_AWS": paired_difference(values[SPHERE], values[AWS]),
    }
    return {
        "holds": all_of(map(above, steps.values())),
        "imbalance": {rule: mean_with_interval(of_rule) for rule, of_rule in values.items()},
        **steps,
    }


def _deviations(layers: dict[Cell, list[Layers]]) -> dict[tuple[float, str, str], tuple[float, int]]:
    """Return the standard deviation between seeds by momentum, ratio and layer, and its degrees of freedom.

    The norm on a sphere, which does not vary, is left out.
    """
    samples: dict[tuple[float, str, str], list[list[float]]] = {}
    for (_, arm), finished in layers.items():
        for key in KEYS:
            for layer in finished[0] if finished and not (arm.rule == SPHERE and key == "norm") else ():
                ratios = [run[layer][f"{key}_ratio"] for run in finished]
                samples.setdefault((arm.momentum, key, layer), []).append(ratios)
    return {place: pooled_deviation(of_place) for place, of_place in samples.items()}


def _with_common_deviation(values: list[float], common: tuple[float, int]) -> Estimate:
    deviation, freedom = common
    n = len(values)
    if not np.ptp(values) or not freedom:  # the norm on a sphere
        return mean_with_interval(values)
    return interval(float(np.mean(values)), deviation / math.sqrt(n), freedom, n)


def _imbalance(layers: Layers) -> float:
    turns = [layer["turn"] for layer in layers.values()]
    return max(turns) / min(turns)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


def _layer_rows(cell: Cell, finished: list[Layers], entry: dict[str, Any]) -> list[list[str]]:
    digits = {"gradient_scale": 3, "norm": 3, "predicted_norm": 3, "norm_ratio": 3}
    digits |= {"turn": 4, "predicted_turn": 4, "turn_ratio": 3, "drift": 3}
    member, arm = cell
    rows = []
    for layer in finished[0] if finished else ():
        means = {key: mean_with_interval([run[layer][key] for run in finished]).mean for key in digits}
        texts = {key: f"{means[key]:.{n}f}" for key, n in digits.items()}
        texts |= {f"{key}_ratio": f"{entry[key][layer]:.3f}" for key in KEYS}
        rows.append([family(member), str(arm), layer, *texts.values()])
    return rows


def _plot(member: str, by_arm: dict[Arm, list[Layers]], key: str, momentum: float) -> Plot:
    """Compare measured with predicted values: a row for each rule and layer."""
    shown = {arm: finished for arm, finished in by_arm.items() if arm.momentum == momentum and finished}
    rows = [(arm, finished, layer) for arm, finished in shown.items() for layer in finished[0]]
    series = []
    for name, label in ((key, "measured, with 95 % interval"), (f"predicted_{key}", "predicted")):
        values: dict[float, Values] = {
            float(k): [run[layer][name] for run in finished] for k, (_, finished, layer) in enumerate(rows)
        }
        series.append(Series.over_seeds(label, values))
    quantity, y_label = _PLOTTED[key]
    title = f"{quantity} by layer, momentum {momentum:g} ({family(member)})"
    names = [f"{arm.rule}, layer {1 + list(finished[0]).index(layer)}" for arm, finished, layer in rows]
    return Plot(title, "", y_label, series, categories=names)


CLAIM = Equilibrium
