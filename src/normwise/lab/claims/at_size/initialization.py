"""Claim, on ResNet-20: L2 makes training sensitive to the initial norm, and AWS does not."""

from __future__ import annotations

from dataclasses import replace

from normwise.lab.claims.exhibits import Plot
from normwise.lab.claims.finished_runs import FinishedRuns
from normwise.lab.claims.initialization import Initialization
from normwise.lab.claims.networks import matched
from normwise.lab.runs.arms import AWS, L2, STARTED
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.train import TrainRun

__all__ = ["CLAIM"]

SCALES = (1e-3, 1.0, 1e3)


class InitializationAtSize(Initialization):
    """The class attributes are the pre-registration."""

    budgets = ("large",)
    arms = (
        "ResNet-20 with weight norm and batch norm at full image size for 10 epochs. L2 by its flow; AWS by "
        "its flow; reported and not judged: AWS started in equilibrium (normwise.attach). All act on the "
        "filters alone. Nothing is tuned: the coefficient of AWS is 3/Σlr, and L2 has the same pull at norm "
        "1. The filters start with 0.001, 1 and 1000 times the norms of the usual initialisation (He et al. "
        "2015), which are 1 to 1.4. SGD with momentum 0.9, a cosine from 0.1, batches of 128, without "
        "augmentation. What was cut, to take hours and not days: 4000 images instead of all, as many as the "
        "small networks have; three scales, weight norm only, no decay (which under-fitting has) and the "
        "other starts."
    )

    def _settings(self, member: str) -> dict[str, dict[float, NetworkRun]]:
        base = replace(self.budget.networks.sweep, member=member)
        return {
            arm: {scale: replace(matched(base, arm), init_scale=scale) for scale in SCALES}
            for arm in (L2, AWS, STARTED)
        }

    def _starts(self) -> dict[str, dict[str, TrainRun]]:
        return {}

    def _traces(self, runs: FinishedRuns) -> list[Plot]:
        return []


CLAIM = InitializationAtSize
