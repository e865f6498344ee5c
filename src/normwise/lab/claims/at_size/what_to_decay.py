"""Claim, on a GPT of six blocks: decay belongs on scale-invariant weights."""

from __future__ import annotations

from normwise.lab.claims.what_to_decay import WhatToDecay

__all__ = ["CLAIM"]


class WhatToDecayAtSize(WhatToDecay):
    """The class attributes are the pre-registration."""

    budgets = ("large",)
    centre = 0.003
    arms = (
        "A GPT of characters with 6 blocks of width 256 (pre-norm, QK-norm) on the King James Bible, whose 4 "
        "million characters the batches are drawn from; 300 steps of 1024 characters, AdamW, warm-up and a "
        "cosine from 0.003, at which a pilot with seed 5000 and without decay trained. Decayed are: nothing; "
        "all matrices; or what nw.plan says is to be shrunk. Rules: L2 and AWS by their flows, on the RMS of "
        "each tensor, with the pull 3/Σlr at √Σlr² (for_budget) times 0.3, 1 or 3, chosen for each rule and "
        "object by the validation loss of one other seed. Then, with the same coefficients, queries and "
        "keys, or embeddings and writers, start 10,000 times as large. Reported and not judged: AWS with "
        "nothing tuned, started in equilibrium (plan.attach). What was cut, to take hours and not days: one "
        "learning rate, one tuning seed instead of three, the frozen control, and steps: the text is not "
        "read through once."
    )
    statistic = (
        "Test loss in nats a character, paired by seed (3 seeds), with 95 % intervals by Student's t, which "
        "leave out the choice by a single tuning seed; a run that does not finish scores what guessing among "
        "the letters scores: nothing minus invariant and matrices minus invariant, for each rule; and, at "
        "the scale of 10,000, the loss under the tuned AWS on the invariant weights minus that at scale 1, "
        "and that of L2 on the same weights, and of no decay, minus that of AWS."
    )

    @property
    def _rates(self) -> tuple[float, ...]:
        return (self.centre,)

    @property
    def _multiples(self) -> tuple[float, ...]:
        return (0.3, 1.0, 3.0)


CLAIM = WhatToDecayAtSize
