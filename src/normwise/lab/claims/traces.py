"""What went on during training: norms, effective learning rates and rotations of the layers over time."""

from __future__ import annotations

from collections.abc import Mapping

from normwise.lab.claims.claim import Plot, Runs, Series
from normwise.lab.engine.run import Run

__all__ = ["traces"]

_QUANTITIES = {
    2: {  # under SGD, by unit
        "norm": ("Mean norm of the units", "norm"),
        "effective_lr": ("Effective learning rate, lr/‖w‖²", "effective learning rate"),
        "turn": ("Rotation of the units between two points", "angle (rad)"),
    },
    1: {  # under Adam, by tensor
        "norm": ("Mean RMS of the tensors", "RMS"),
        "effective_lr": ("Effective learning rate, lr/RMS", "effective learning rate"),
        "turn": ("Rotation of the tensors between two points", "angle (rad)"),
    },
}


def traces(runs: Runs, arms: Mapping[str, Run], what: str = "", degree: int = 2) -> list[Plot]:
    """Return a plot for each quantity, with a curve for each arm and layer.

    Args:
        runs: Where the runs are found.
        arms: Runs, with their seed, by label. Those that did not finish are left out.
        what: Goes into the titles, in brackets.
        degree: 2 for runs under SGD, 1 for those under Adam that log RMS values.
    """
    there = {arm: run for arm, run in arms.items() if runs[run]["status"] == "finished"}
    metrics = {arm: runs.metrics(run) for arm, run in there.items()}
    plots = []
    for key, (title, label) in _QUANTITIES[degree].items():
        series = [
            Series(
                f"{arm}, {layer}",
                [line["step"] for line in lines],
                [line["layers"][layer][key] or None for line in lines],
                dashed=k > 0,
                color=list(metrics).index(arm),
            )
            for arm, lines in metrics.items()
            for k, layer in enumerate(lines[0]["layers"])
        ]
        brackets = f" ({what})" if what else ""
        plots.append(Plot(f"{title}{brackets}", "step", label, series, log_y=True))
    return [plot for plot in plots if plot.series]
