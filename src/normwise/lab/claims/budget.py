"""How much computation the claims may use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from normwise.lab.data.text import BIBLE, FINGERPRINTS, NUMBERS
from normwise.lab.runs.base import ImageRun
from normwise.lab.runs.replay import ReplayRun
from normwise.lab.runs.text import TextRun
from normwise.lab.runs.train import TrainRun

__all__ = ["BUDGETS", "Budget"]

R = TypeVar("R", bound=ImageRun)

BUDGETS = ("quick", "full")
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Budget:
    """The networks, data and seeds that all claims share.

    Attributes:
        name: "quick" or "full".
        members: Members of the weight-normalisation family that are trained.
        seeds: Seeds of the runs; every arm uses the same ones, so that differences are paired.
        tuning_seeds: Seeds of the runs that choose hyper-parameters, disjoint from ``seeds``.
        training: Settings of a training run; claims set the arm and the seed.
        small: ``training`` on half of the images, for sweeps over many cells.
        replaying: Settings of a replay.
        text: Settings of a run of the language model.
    """

    name: str
    members: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    training: TrainRun
    small: TrainRun
    replaying: ReplayRun
    text: TextRun

    @property
    def many_seeds(self) -> tuple[int, ...]:
        """Enough seeds to show that two arms are equivalent: 8, in the full budget 20."""
        return self.at_least(20 if self.full else 8)

    @property
    def full(self) -> bool:
        """Whether this is the full budget."""
        return self.name == "full"

    def at_least(self, seeds: int) -> tuple[int, ...]:
        """Return ``seeds`` of the budget, extended to at least this many."""
        return tuple(range(max(seeds, len(self.seeds))))

    def images(self, run_class: type[R], **changes: Any) -> R:
        """Return a run of another class on the images and with the network of :attr:`training`."""
        shared = ("data", "fingerprint", "train_size", "image_size", "width")
        return run_class(**{name: getattr(self.training, name) for name in shared} | changes)

    def seeds_for(self, member: str) -> tuple[int, ...]:
        """Return all seeds for the first member and three for the others, for claims with long sweeps."""
        return self.seeds if member == self.members[0] else self.seeds[:3]

    @classmethod
    def of(cls, name: str, data: str, fingerprint: str, seeds: int | None = None) -> Budget:
        """Return the budget of this name for a data set.

        Args:
            name: "quick" or "full".
            data: Name of the data set.
            fingerprint: SHA-256 of the data.
            seeds: Number of seeds; None: 3 (quick) or 5 (full).

        Raises:
            ValueError: The name is not known, or ``seeds`` is below 2 (an interval needs two) or so large
                that it would include the tuning seeds.
        """
        if name not in BUDGETS:
            raise ValueError(f"--budget {name} is not known: choose from {', '.join(BUDGETS)}")
        if seeds is not None and not 2 <= seeds <= FIRST_TUNING_SEED:
            raise ValueError(
                f"--seeds {seeds} is not possible: give 2 (an interval needs two) to {FIRST_TUNING_SEED}"
            )
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
            seeds=tuple(range(seeds or (3 if quick else 5))),
            tuning_seeds=(FIRST_TUNING_SEED,),
            training=training,
            small=replace(training, train_size=training.train_size // 2),
            replaying=ReplayRun(
                data=data,
                fingerprint=fingerprint,
                train_size=1000,
                image_size=training.image_size,
                batch_size=50,
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
