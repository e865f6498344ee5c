"""Norms, effective learning rates and rotations of the layers during training."""

from __future__ import annotations

from collections.abc import Mapping

from normwise.lab.claims.exhibits import Plot, Series
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.engine.run import Run

__all__ = ["layer_curves"]

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


def layer_curves(runs: FinishedRuns, arms: Mapping[str, Run], subject: str, degree: int = 2) -> list[Plot]:
    """Return a plot for each quantity, with a curve for each arm and layer.

    Args:
        runs: Contain the arms.
        arms: Run, including the seed, by label. Runs that did not finish are left out.
        subject: What the arms have in common; stands in brackets in the titles.
        degree: 2 for runs under SGD, 1 for runs under Adam that log RMS values.
    """
    metrics = {arm: runs.metrics(run) for arm, run in arms.items() if runs.status(run) == "finished"}
    plots = []
    for key, (title, y_label) in _QUANTITIES[degree].items():
        series = [
            Series(
                f"{arm}, {layer}",
                [line["step"] for line in lines],
                [line["layers"][layer][key] or None for line in lines],
                dashed=k,  # three layers at most
                color=color,
            )
            for color, (arm, lines) in enumerate(metrics.items())
            for k, layer in enumerate(lines[0]["layers"])
        ]
        plots.append(Plot(f"{title} ({subject})", "step", y_label, series, log_y=True))
    return [plot for plot in plots if plot.series]
