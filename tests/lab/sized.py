"""The budget "large" with networks that are trained in a fraction of a second, on digits."""

from __future__ import annotations

from dataclasses import replace

from tests.lab.small import fingerprint, text

from normwise.lab.claims.budget import Budget
from normwise.lab.claims.networks import Networks


def sized_budget(seeds: str | int = 2) -> Budget:
    made = Budget.of("large", "digits", fingerprint(), seeds)
    tiny = {"width": 2, "batch_size": 32, "epochs": 2, "evaluate_every": 2, "validation_size": 16}
    sweep = replace(made.networks.sweep, train_size=32, **tiny)  # type: ignore[arg-type]
    others = {name: replace(sweep, member=run.member) for name, run in made.networks.others.items()}
    whole = replace(sweep, train_size=64, validation_size=0)
    return replace(made, sized=Networks(whole, sweep, others), text=text(lr=0.003))
