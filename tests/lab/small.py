"""A budget that is carried out in a second, on digits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from normwise.lab.claims.budget import Budget
from normwise.lab.data.datasets import load
from normwise.lab.data.text import FINGERPRINTS, NUMBERS
from normwise.lab.runs.replay import ReplayRun
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun


@lru_cache
def fingerprint() -> str:
    return load("digits").fingerprint


def training(**changes: Any) -> TrainRun:
    values: dict[str, Any] = {"train_size": 100, "image_size": 4, "width": 2, "batch_size": 25, "epochs": 2}
    return TrainRun(data="digits", fingerprint=fingerprint(), **(values | changes))


def replaying(**changes: Any) -> ReplayRun:
    values: dict[str, Any] = {"train_size": 100, "image_size": 4, "width": 2, "batch_size": 25, "length": 40}
    return ReplayRun(data="digits", fingerprint=fingerprint(), **(values | changes))


def text(**changes: Any) -> TextRun:
    values: dict[str, Any] = {
        "width": 8,
        "depth": 1,
        "context": 8,
        "batch_size": 2,
        "length": 24,
        "warmup": 4,
    }
    values |= {"data": NUMBERS, "fingerprint": FINGERPRINTS[NUMBERS], "lr": 0.01, "measured": 4}
    return TextRun(**(values | changes))


def budget(members: tuple[str, ...] = ("weight_norm",), seeds: tuple[int, ...] = (0, 1)) -> Budget:
    return Budget(
        name="quick",
        members=members,
        seeds=seeds,
        tuning_seeds=(1000,),
        training=training(validation_size=40),
        small=training(validation_size=40, train_size=50),
        replaying=replaying(length=10),
        text=text(),
    )
