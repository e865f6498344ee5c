"""What the claim on what to decay shows: its tables, plots and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normwise.lab.claims.claim import Plot, Series, Table
from normwise.lab.claims.statistics import Estimate, mean_with_interval

__all__ = [
    "answer",
    "control",
    "edges",
    "label",
    "loss_plot",
    "loss_table",
    "scale_plots",
    "scale_table",
]

L2, AWS = "L2", "AWS"
RULES = (L2, AWS)
NOTHING, MATRICES, INVARIANT = "nothing", "matrices", "invariant"
PARTS = ("attention", "stream")

Arm = tuple[str, str | None]  # what is decayed, and by which rule
ByScale = Mapping[float, Sequence[float | None]]  # the losses of all seeds, by initial scale
Losses = Mapping[tuple[Arm, float], Sequence[float | None]]  # the same by arm and learning rate

_PART_WORDS = {"attention": "queries and keys", "stream": "embeddings and writers"}
_OBJECT_WORDS = {MATRICES: "all matrices", INVARIANT: "what is invariant"}


def label(arm: Arm) -> str:
    """Return an arm in words."""
    what, rule = arm
    return "no decay" if rule is None else f"{rule} on {_OBJECT_WORDS[what]}"


def loss_table(losses: Losses, multiples: Mapping[tuple[Arm, float], float]) -> Table:
    """Return the test losses of the tuned arms by learning rate."""
    cells: dict[Arm, list[str]] = {}
    for (arm, lr), values in losses.items():
        at = "" if arm[1] is None else f" (×{multiples[arm, lr]:g})"
        cells.setdefault(arm, []).append(_fine(values) + at)
    columns = ["decayed", *(f"lr {lr:g}" for lr in dict.fromkeys(lr for _, lr in losses))]
    title = "Test loss (nats a character), with the chosen multiple of the coefficient of for_budget"
    return Table(title, columns, [[label(arm), *row] for arm, row in cells.items()])


def scale_table(by_scale: Mapping[str, Mapping[str, ByScale]]) -> Table:
    """Return the test losses by part, arm and initial scale."""
    rows = [
        [_PART_WORDS[part], name, *map(_fine, at.values())]
        for part, found in by_scale.items()
        for name, at in found.items()
    ]
    scales = next(iter(next(iter(by_scale.values())).values()))
    columns = ["scaled at the start", "decay on the invariant weights", *(f"× {s:g}" for s in scales)]
    return Table("Test loss (nats a character) by initial scale", columns, rows)


def loss_plot(losses: Losses) -> Plot:
    """Return the test losses over the learning rate."""
    curves: dict[Arm, dict[float, Sequence[float | None]]] = {}
    for (arm, lr), values in losses.items():
        curves.setdefault(arm, {})[lr] = values
    objects = (NOTHING, MATRICES, INVARIANT)
    series = [
        Series.over(label(arm), at, dashed=arm[1] == L2, color=objects.index(arm[0]))
        for arm, at in curves.items()
    ]
    title = "Test loss by learning rate: what is decayed, and by which rule"
    return Plot(title, "learning rate", "test loss (nats a character)", series, log_x=True)


def scale_plots(by_scale: Mapping[str, Mapping[str, ByScale]]) -> list[Plot]:
    """Return a plot over the initial scale for each part."""
    return [
        Plot(
            f"Test loss by initial scale of {_PART_WORDS[part]}",
            "initial scale",
            "test loss (nats a character)",
            [Series.over(name, at) for name, at in found.items()],
            log_x=True,
        )
        for part, found in by_scale.items()
    ]


def edges(multiples: Mapping[tuple[Arm, float], float], ends: tuple[float, float]) -> list[str]:
    """Say where the best multiple was the smallest or the largest that was tried."""
    there = [
        f"{label(arm)} at lr {lr:g} (×{multiple:g})"
        for (arm, lr), multiple in multiples.items()
        if arm[1] is not None and multiple in ends
    ]
    return [f"Chosen at an end of the grid of multiples: {', '.join(there)}."] if there else []


def control(frozen: Mapping[str, Estimate]) -> list[str]:
    """Say what it cost to freeze the parts."""
    parts = [
        f"{_PART_WORDS[part]} frozen as they began cost {_interval(estimate)} nats"
        + ("" if estimate.low > 0 else ", so that a large scale, under which they hardly turn, is no test")
        for part, estimate in frozen.items()
    ]
    return [f"Control: {'; '.join(parts)}."] if parts else []


def answer(gains: Mapping[str, Mapping[str, Estimate]], scale: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return what decay on the invariant weights gains, and what a large scale costs."""
    parts = []
    for rule in RULES:
        nothing, matrices = (gains[f"{rule}: {other} − invariant"]["mean"] for other in (NOTHING, MATRICES))
        against = f"{_signed(nothing)} against none and by {_signed(matrices)} against all matrices"
        parts.append(f"under {rule} by {against}")
    costs = " and ".join(
        f"{found['AWS: cost of the scale'].mean:+.3f} (no decay {found['no decay − AWS'].mean:+.3f} and L2 "
        f"{found['L2 − AWS'].mean:+.3f} behind it) for {_PART_WORDS[part]}"
        for part, found in scale.items()
    )
    gained = "; ".join(parts)
    return (
        f"Averaged over learning rates, decay on what is invariant lowers the test loss (nats) {gained}. "
        f"An initial scale of 10,000 costs AWS {costs}."
    )


def _fine(values: Sequence[float | None]) -> str:
    return _interval(mean_with_interval(values))


def _interval(estimate: Estimate) -> str:
    if not estimate.n:
        return "did not finish"
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
