"""What a plan does with one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["BALANCE", "NONE", "PLAIN_L2", "SHRINK", "VERDICTS", "Treatment"]

SHRINK, BALANCE, PLAIN_L2, NONE = "shrink", "balance", "L2", "none"
VERDICTS = (SHRINK, BALANCE, PLAIN_L2, NONE)


@dataclass(frozen=True)
class Treatment:
    """What a plan does with one parameter, and why.

    Attributes:
        name: The parameter, by the first of its names.
        shape: Its shape.
        verdict: "shrink" (scale-invariant: by a rule, which only sets the effective learning rate),
            "balance" (against other parameters), "L2" (plain, which regularises) or "none".
        reason: Why, in words.
        role: "weight", "bias", "gain" or "vector".
        dim: With "shrink": what a unit is: 0 a row, 1 a column, None the whole tensor.
        mask: With "shrink": which rows or columns, if not all.
        together: The other members of its group or pair.
        against: With "balance": those on the other side, in any symmetry.
        aliases: Its other names, if it is shared (tied).
    """

    name: str
    shape: tuple[int, ...]
    verdict: str
    reason: str
    role: str = "weight"
    dim: int | None = None
    mask: tuple[bool, ...] | None = None
    together: tuple[str, ...] = field(default=())
    against: tuple[str, ...] = field(default=())
    aliases: tuple[str, ...] = field(default=())

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def rule(self) -> str:
        """What acts on it, in a few words.

        Example:
            >>> Treatment("fc.weight", (5, 8), "shrink", "", dim=0).rule
            'rule, by row'
        """
        if self.verdict == SHRINK:
            unit = {None: "whole tensor", 0: "by row", 1: "by column"}.get(self.dim, f"by dim {self.dim}")
            some = "" if self.mask is None else f", {sum(self.mask)} of {len(self.mask)}"
            return f"rule, {unit}{some}"
        return {BALANCE: "weight_decay", PLAIN_L2: "weight_decay"}.get(self.verdict, "–")
