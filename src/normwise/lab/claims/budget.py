"""How much computation the claims may use."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from normwise.lab.claims.networks import LARGE_TEXT, SIZED, Networks, networks_of, sized_experiments
from normwise.lab.data.datasets import DATASETS
from normwise.lab.data.text import BIBLE, FINGERPRINTS, NUMBERS
from normwise.lab.runs.base import ImageRun
from normwise.lab.runs.replay import ReplayRun
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

__all__ = ["BUDGETS", "SIZED", "Budget", "seeds_from"]

R = TypeVar("R", bound=ImageRun)

BUDGETS = ("quick", "full")
FIRST_TUNING_SEED = 1000
TUNING_SEEDS = 3
MOST_SEEDS = 500


@dataclass(frozen=True)
class Budget:
    """The networks, data and seeds that all claims share.

    Attributes:
        name: "quick", "full", "large" or "paper".
        members: Members of the weight-normalisation family that are trained.
        seeds: Seeds of the runs; every arm uses the same ones, so that differences are paired.
        tuning_seeds: Seeds of the runs that choose hyper-parameters, disjoint from ``seeds``.
        training: Settings of a training run; claims set the arm and the seed.
        small: ``training`` on half of the images, for sweeps over many cells.
        replaying: Settings of a replay.
        text: Settings of a run of the language model.
        sized: In "large" and "paper" the networks, instead of ``training``, ``small`` and ``replaying``.
    """

    name: str
    members: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    training: TrainRun
    small: TrainRun
    replaying: ReplayRun
    text: TextRun
    sized: Networks | None = None

    @property
    def networks(self) -> Networks:
        """:attr:`sized`, of a budget that has it."""
        assert self.sized is not None, self.name
        return self.sized

    @property
    def many_seeds(self) -> tuple[int, ...]:
        """Enough seeds to show that two arms are equivalent: 6, in the full budget 20."""
        return self.at_least(20 if self.full else 6)

    @property
    def full(self) -> bool:
        """Whether this is the full budget."""
        return self.name == "full"

    @property
    def experiments(self) -> str:
        """What is trained, in a sentence."""
        if self.sized is not None:
            return sized_experiments(self.name, self.sized, self.text)
        run, text = self.training, self.text
        channels = f"{run.width}, {2 * run.width} and {4 * run.width}"
        blocks = "one block" if text.depth == 1 else f"{text.depth} blocks"
        written = "the King James Bible" if text.data == BIBLE else "numbers in words"
        return (
            f"Trained are networks of three convolutions ({channels} channels) for {run.epochs} epochs on "
            f"{run.train_size} images of {run.data} (sweeps: {self.small.train_size}) at {run.image_size} × "
            f"{run.image_size} pixels, and a GPT of {blocks} for {text.length} steps on {written}."
        )

    def at_least(self, seeds: int) -> tuple[int, ...]:
        """Return ``seeds`` of the budget, extended to at least this many."""
        first = self.seeds[0]
        return tuple(range(first, first + max(seeds, len(self.seeds))))

    def images(self, run_class: type[R], **changes: Any) -> R:
        """Return a run of another class on the images and with the network of :attr:`training`."""
        shared = ("data", "fingerprint", "train_size", "image_size", "width")
        return run_class(**{name: getattr(self.training, name) for name in shared} | changes)

    def seeds_for(self, member: str) -> tuple[int, ...]:
        """Return all seeds for the first member and three for the others, for claims with long sweeps."""
        return self.seeds if member == self.members[0] else self.seeds[:3]

    def with_precision(self, precision: str) -> Budget:
        """Return the budget with image networks that are trained in "float32" or "bf16".

        Raises:
            ValueError: The precision is not known, or the budget has small networks only.
        """
        if self.sized is None and precision == "float32":
            return self
        if self.sized is None:
            raise ValueError(
                f"--precision {precision} is not for --budget {self.name}: give float32, or --budget "
                f"{' or '.join(SIZED)}"
            )
        return replace(self, sized=self.sized.with_precision(precision))

    @classmethod
    def of(cls, name: str, data: str, fingerprint: str, seeds: str | int | None = None) -> Budget:
        """Return the budget of this name for a data set.

        Args:
            name: "quick", "full", "large" or "paper".
            data: Name of the data set.
            fingerprint: SHA-256 of the data.
            seeds: Number of seeds, or the first and the last as in "500-504"; None: 5 (full) or 3, from 0.
                The tuning seeds are those from 1000 above the first: three, in "large" and "paper" one.

        Raises:
            ValueError: The name is not known or is not for these data, or ``seeds`` is not possible
                (:func:`seeds_from`).
        """
        if name not in (*BUDGETS, *SIZED):
            raise ValueError(f"--budget {name} is not known: choose from {', '.join((*BUDGETS, *SIZED))}")
        chosen = seeds_from((5 if name == "full" else 3) if seeds is None else seeds)
        if name in SIZED:
            return replace(
                cls.of("quick", "fashion-mnist", "", seeds),
                name=name,
                tuning_seeds=(FIRST_TUNING_SEED + chosen[0],),
                text=LARGE_TEXT,
                sized=networks_of(name, data, fingerprint),
            )
        if data not in DATASETS:
            raise ValueError(f"--budget {name} is not for --data {data}: give {' or '.join(DATASETS)}")
        quick = name == "quick"
        digits = data == "digits"  # 1437 training images of 8×8
        training = TrainRun(
            data=data,
            fingerprint=fingerprint,
            train_size=1100 if digits else 4000,
            validation_size=300 if digits else 2000,
            image_size=8 if digits else 7,
            batch_size=50 if digits else 100,
        )
        text = NUMBERS if digits else BIBLE
        depth, length = (1, 160) if quick else (2, 360)
        members = ("weight_norm", "centered_weight_norm", "weight_standardization", "plain")
        return cls(
            name=name,
            members=members[:1] if quick else members,
            seeds=chosen,
            tuning_seeds=tuple(FIRST_TUNING_SEED + chosen[0] + k for k in range(TUNING_SEEDS)),
            training=training,
            small=replace(training, train_size=training.train_size // 2),
            replaying=ReplayRun(
                data=data,
                fingerprint=fingerprint,
                train_size=1000,
                image_size=training.image_size,
                batch_size=50,
                length=150 if quick else 300,
            ),
            text=TextRun(
                data=text,
                fingerprint=FINGERPRINTS[text],
                depth=depth,
                lr=0.01,
                length=length,
                warmup=length // 10,
            ),
        )


def seeds_from(text: str | int) -> tuple[int, ...]:
    """Return the seeds that ``--seeds`` names: their number, or the first and the last.

    Raises:
        ValueError: It is neither, there are fewer than 2 (an interval needs two), or one is so large that
            tuning seeds of other jobs would be among them.

    Example:
        >>> seeds_from(3), seeds_from("200-202")
        ((0, 1, 2), (200, 201, 202))
    """
    form = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})", str(text))
    if form is not None:
        first = int(form[1] or 0)
        last = int(form[2]) if form[1] else int(form[2]) - 1
        if last > first and last < FIRST_TUNING_SEED and last - first < MOST_SEEDS:
            return tuple(range(first, last + 1))
    raise ValueError(
        f"--seeds {text} is not possible: give their number, 2 (an interval needs two) to {MOST_SEEDS}, or "
        f"the first and the last, such as 500-504, below {FIRST_TUNING_SEED}"
    )
