"""Results of thirteen claims that were never put to the test, with everything that a report can show."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

from normwise.lab.claims.exhibits import HeatMap, Plot, Series, Table
from normwise.lab.report import html_report
from normwise.lab.report.paper_figures import Figure

NASTY = "<script>alert('$x$')</script></script><!-- & \"quotes\" \u2028"
SEEDS = (0, 1, 2)
VERDICTS = ("reproduced", "partly", "not reproduced")


@contextmanager
def without_figures() -> Iterator[None]:
    """Leave the figures for a paper empty: they are beside the page, and each takes half a second."""
    empty = mock.Mock(return_value=Figure("", b""))
    with mock.patch.multiple(html_report, plot_figure=empty, heat_figure=empty):
        yield


def many(
    claims: int = 13, plots: int = 40, maps: int = 5, tables: int = 30, traces: int = 3
) -> dict[str, Any]:
    """As large as the quick budget is planned: ``traces`` is for each claim, the others are totals."""
    rng = random.Random(0)
    made = [
        claim(
            rng,
            k,
            plots=len(range(k, plots, claims)),
            maps=len(range(k, maps, claims)),
            tables=len(range(k, tables, claims)),
            traces=traces,
        )
        for k in range(claims)
    ]
    return results({f"made-up-{k + 1}": one for k, one in enumerate(made)})


def results(claims: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "claims": claims, "finished": "2026-01-01T12:00:00+00:00", "seconds": 1.0}


def claim(
    rng: random.Random,
    k: int,
    plots: int = 1,
    maps: int = 1,
    tables: int = 1,
    traces: int = 1,
    text: str = "",
) -> dict[str, Any]:
    sentence = text or "Does decay of this kind leave the predictions of the network as they are, once the "
    sentence += "" if text else "effective learning rate is that of the other run at every step of the way?"
    identities = [f"{k:02d}{n:014d}" for n in range(20)]
    failed = dict.fromkeys(identities[:2], "diverged at step 31") if k % 3 == 2 else {}
    return {
        "title": text or f"Decay acts on norms only, and in one way or another ({k + 1})",
        "source": text or "Li, Chen & Yang, AAAI 2020, section 3",
        "question": sentence,
        "arms": sentence,
        "statistic": sentence,
        "rule": sentence,
        "order": k + 1,
        "verdict": VERDICTS[k % 3],
        "answer": sentence,
        "statistics": {
            "difference": {"mean": 0.12345678, "low": -0.1, "high": 0.3, "n": 3},
            "cells": [{"norm": 0.01, "holds": True}, {"norm": 1.0, "holds": None}],
        },
        "plots": [sweep(rng, text, log_y=n % 2 == 1) for n in range(plots)],
        "maps": [heat(rng, text) for _ in range(maps)],
        "tables": [table(rng, text) for _ in range(tables)],
        "traces": [trace(rng, text, which) for which in TRACES[:traces]],
        "notes": [
            text or "SGD with L2 at norm 1e-6 came to NaN at step 31 (seeds 0 and 2).",
            "A long word: AdaptiveWeightShrink(coefficient=0.18691588773600612,strength=0.18691588773600612)",
        ]
        if failed or text
        else [],
        "runs": {"count": 20, "not_finished": len(failed), "identities": identities, "failed": failed},
        "protocol": {
            "data": "digits",
            "budget": "quick",
            "seeds": list(SEEDS),
            "environment": dict.fromkeys(("normwise", "torch", "python", "machine"), text or "1.2.3"),
        },
    }


def sweep(rng: random.Random, text: str = "", log_y: bool = False, arms: int = 4) -> dict[str, Any]:
    """Few points over a log axis, with intervals, seeds and a gap."""
    x = [10.0**k for k in range(-3, 4)]
    series = []
    for k in range(arms):
        middle = [(97 - 3 * k) / (1 + 0.06 * abs(math.log10(v)) ** (1 + k / 3)) for v in x]
        seeds: list[list[float | None]] = [[m + rng.gauss(0, 1.2) for m in middle] for _ in SEEDS]
        if k == 2:
            seeds[0][3] = seeds[1][3] = seeds[2][3] = None
        at = [[s[i] for s in seeds] for i in range(len(x))]
        means = [None if None in values else sum(values) / len(values) for values in at]  # type: ignore[arg-type]
        series.append(
            Series(
                text or ("AWS", "L2", "decoupled", "none")[k % 4] + f" ({k})" * (k > 3),
                x,
                means,
                [None if m is None else m - 1.5 for m in means],
                [None if m is None else m + 1.5 for m in means],
                dashed=k == 3,
                by_seed=seeds,
            )
        )
    return asdict(
        Plot(text or "Test accuracy by initial norm", "initial norm", "accuracy (%)", series, True, log_y)
    )


TRACES = (("Norms", "norm"), ("Effective learning rate", "η/n²"), ("Rotation per step", "angle (rad)"))


def trace(rng: random.Random, text: str, which: tuple[str, str]) -> dict[str, Any]:
    """Forty points for each of six layers."""
    steps = list(range(0, 400, 10))
    layers = []
    for k in range(6):
        rate = rng.uniform(0.002, 0.02)
        values = [math.exp(-rate * s) * 2.0**k * (1 + rng.gauss(0, 0.03)) for s in steps]
        layers.append(Series(text or f"layers.{k}.weight", steps, values))
    return asdict(Plot(text or f"{which[0]} by layer (seed 0)", "step", which[1], layers, log_y=True))


def heat(rng: random.Random, text: str = "") -> dict[str, Any]:
    columns = ["0.001", "0.01", "0.1", "1", "10"]
    values: list[list[float | None]] = [[rng.uniform(20, 98) for _ in columns] for _ in range(6)]
    values[5][4] = None
    rows = [text or "1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]
    title = text or "Accuracy by learning rate and coefficient, L2"
    return asdict(HeatMap(title, "learning rate", "coefficient", columns, rows, values, "accuracy (%)"))


def table(rng: random.Random, text: str = "") -> dict[str, Any]:
    rows = [
        [text or f"rule {k}", round(rng.uniform(80, 99), 1), "0.3 [0.1, 0.5]", None if k == 3 else k]
        for k in range(6)
    ]
    return asdict(
        Table(text or "Accuracy on test data", ["rule", "accuracy (%)", "difference", "runs"], rows)
    )
