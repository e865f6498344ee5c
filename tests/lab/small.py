"""A budget that is carried out in a second, on digits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from normwise.lab.claims.claim import Budget
from normwise.lab.data import load
from normwise.lab.settings import ReplaySettings, TrainSettings


@lru_cache
def fingerprint() -> str:
    return load("digits").fingerprint


def training(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"train_size": 100, "image_size": 4, "width": 2, "batch_size": 25, "epochs": 2}
    return TrainSettings(data="digits", fingerprint=fingerprint(), **(values | changes))


def replaying(**changes: Any) -> ReplaySettings:
    values: dict[str, Any] = {"train_size": 100, "image_size": 4, "width": 2, "batch_size": 25, "length": 40}
    return ReplaySettings(data="digits", fingerprint=fingerprint(), **(values | changes))


def budget(members: tuple[str, ...] = ("weight_norm",), seeds: tuple[int, ...] = (0, 1)) -> Budget:
    return Budget(
        name="quick",
        members=members,
        seeds=seeds,
        tuning_seeds=(1000,),
        training=training(validation_size=40),
        small=training(validation_size=40, train_size=50),
        replaying=replaying(length=10),
    )
