"""What is worth saying about a set-up: findings, each with a remedy."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normwise.planning.patterns import label, pattern, together
from normwise.planning.treatment import BALANCE, PLAIN_L2, SHRINK

if TYPE_CHECKING:
    from normwise.planning.audit import Row

__all__ = ["Finding", "find", "listed"]


@dataclass(frozen=True)
class Finding:
    """One thing about a set-up.

    Attributes:
        kind: "missing", "duplicate", "stranger", "decayed twice", "decayed vectors", "undecayed weights",
            "effective learning rate only", "falling learning rate", "no effect", "divided decay",
            "one side of a pair", "unknown coupling".
        serious: Whether something does not do what its author most likely meant; else it is good to know.
        parameters: Their names.
        message: What is so.
        remedy: What to do about it.
    """

    kind: str
    serious: bool
    parameters: tuple[str, ...]
    message: str
    remedy: str

    def text(self, width: int = 100) -> str:
        """Return the finding and its remedy in lines of at most ``width`` characters; "!" if serious."""
        options: Any = {"width": width, "break_long_words": False, "break_on_hyphens": False}
        mark = "! " if self.serious else "· "
        said = textwrap.fill(self.message, initial_indent=mark, subsequent_indent="  ", **options)
        done = textwrap.fill(self.remedy, initial_indent="  → ", subsequent_indent="    ", **options)
        return f"{said}\n{done}"

    def __str__(self) -> str:
        return self.text()


def find(
    rows: Sequence[Row], duplicates: Sequence[str], strangers: Sequence[str], planned: bool
) -> list[Finding]:
    """Return the findings, the serious ones first.

    Args:
        rows: One for each parameter of the model.
        duplicates: Names of parameters that the optimizer holds twice.
        strangers: Shapes of tensors that the optimizer holds and the model does not.
        planned: Whether the rows have verdicts of a plan.
    """
    found = [*_membership(rows, duplicates, strangers), *_amounts(rows)]
    found += _of_verdicts(rows) if planned else _of_roles(rows)
    return sorted(found, key=lambda finding: not finding.serious)


def _membership(
    rows: Sequence[Row], duplicates: Sequence[str], strangers: Sequence[str]
) -> Iterable[Finding]:
    missing = tuple(row.name for row in rows if not row.in_optimizer and row.trainable)
    if missing:
        yield Finding(
            "missing",
            True,
            missing,
            f"not in the optimizer, so never trained: {listed(missing)}",
            "construct the optimizer after the model is complete, from plan.param_groups()",
        )
    if duplicates:
        yield Finding(
            "duplicate",
            True,
            tuple(duplicates),
            f"in the optimizer twice, so stepped and decayed twice: {listed(duplicates)}",
            "give each parameter once; model.parameters() gives a tied one once",
        )
    if strangers:
        yield Finding(
            "stranger",
            True,
            (),
            f"the optimizer holds {len(strangers)} tensor(s) that are not parameters of the model, of shapes "
            f"{', '.join(strangers[:3])}",
            "construct the optimizer after wrapping or converting the model, which replaces parameters",
        )


def _amounts(rows: Sequence[Row]) -> Iterable[Finding]:
    twice = tuple(row.name for row in rows if len(row.pulls) > 1)
    if twice:
        by = " and ".join(map(str, next(row for row in rows if len(row.pulls) > 1).pulls))
        yield Finding(
            "decayed twice",
            True,
            twice,
            f"decayed twice, by {by}: {listed(twice)}",
            "set weight_decay=0 for what a rule decays, as plan.param_groups() does",
        )
    divided = tuple(row.name for row in rows if any(pull.divided for pull in row.pulls))
    if divided:
        yield Finding(
            "divided decay",
            True,
            divided,
            "weight_decay goes through the gradient and is divided by its size, so weights with large "
            f"gradients are decayed less: {listed(divided)}",
            "use the decoupled form (AdamW), or nw.Decay",
        )
    unknown = tuple(row.name for row in rows if any(pull.coupling == "unknown" for pull in row.pulls))
    if unknown:
        yield Finding(
            "unknown coupling",
            False,
            unknown,
            f"how this optimizer applies weight_decay could not be measured: {listed(unknown)}",
            "see its documentation; nw.Decay decays the same way beside any optimizer",
        )


def _of_roles(rows: Sequence[Row]) -> Iterable[Finding]:
    yield from _decayed_vectors(rows)
    bare = tuple(r.name for r in rows if r.role == "weight" and r.in_optimizer and not r.pulls)
    if bare:
        yield Finding(
            "undecayed weights",
            False,
            bare,
            f"weights that nothing decays: {listed(bare)}",
            "give batches to nw.audit, to see which of them only have a direction",
        )


def _decayed_vectors(rows: Sequence[Row]) -> Iterable[Finding]:
    vectors = [r for r in rows if r.role != "weight" and r.pulls and r.effect_kind != "no effect"]
    if vectors:
        names = tuple(r.name for r in vectors)
        yield Finding(
            "decayed vectors",
            True,
            names,
            f"gains, biases or other vectors are pulled to zero: {listed(names)}",
            "put them into a group with weight_decay=0, as plan.param_groups() does",
        )


def _of_verdicts(rows: Sequence[Row]) -> Iterable[Finding]:
    yield from _decayed_vectors(rows)
    decayed = [r for r in rows if r.pulls]
    # what a rule decays was meant for that: only the optimizer's own decay is worth a word
    only_rate = [
        r for r in decayed if r.verdict == SHRINK and any(p.coefficient is not None for p in r.pulls)
    ]
    if only_rate:
        names = tuple(r.name for r in only_rate)
        share = sum(r.numel for r in only_rate) / max(1, sum(r.numel for r in decayed))
        yield Finding(
            "effective learning rate only",
            False,
            names,
            f"decay of scale-invariant weights, {share:.0%} of all decayed values, does not regularise; it "
            f"sets an effective learning rate{_settled(only_rate)}: {listed(names)}",
            "choose it as a learning rate, or leave it to plan.attach(optimizer, ...)",
        )
    growing = tuple(r.name for r in rows if r.verdict == SHRINK and r.in_optimizer and not r.pulls)
    if growing:
        yield Finding(
            "falling learning rate",
            True,
            growing,
            "scale-invariant and not decayed: every step lengthens them, so their effective learning rate "
            f"falls: {listed(growing)}",
            "plan.attach(optimizer, ...) decays them with nothing to tune",
        )
    bare = tuple(r.name for r in rows if r.verdict in (BALANCE, PLAIN_L2) and r.in_optimizer and not r.pulls)
    if bare:
        yield Finding(
            "undecayed weights",
            False,
            bare,
            f"weights whose decay would regularise are not decayed: {listed(bare)}",
            "plan.param_groups(weight_decay=...) decays them, if regularisation is wanted",
        )
    idle = tuple(r.name for r in decayed if r.effect_kind == "no effect")
    if idle:
        yield Finding(
            "no effect",
            False,
            idle,
            f"decay of parameters without any effect on the outputs: {listed(idle)}",
            "construct the layer with bias=False, or leave them",
        )
    yield from _sides(rows)


def _sides(rows: Sequence[Row]) -> Iterable[Finding]:
    by_name = {row.name: row for row in rows}
    lonely = tuple(
        r.name
        for r in rows
        if r.verdict == BALANCE and r.pulls and not any(by_name[other].pulls for other in r.against)
    )
    if lonely:
        yield Finding(
            "one side of a pair",
            False,
            lonely,
            "decayed while the other side of the +1/−1 pair is not, so size moves over to the other side "
            f"rather than out of the product: {listed(lonely)}",
            "know it; where the other side is a gain, that is the usual choice",
        )


def _settled(rows: Sequence[Row]) -> str:
    angles = [(p.rotation, p.settling) for r in rows for p in r.pulls if p.rotation and p.settling]
    if not angles:
        return ""
    low, high = (math.degrees(f(angle for angle, _ in angles)) for f in (min, max))
    steps = max(step for _, step in angles)
    spread = f"{low:.2g}°" if high < 1.05 * low else f"{low:.2g}° to {high:.2g}°"
    return f" (they settle at turning {spread} a step, after some {steps:.2g} steps)"


def listed(names: Sequence[str], most: int = 4) -> str:
    """List names, layers of one pattern together.

    Example:
        >>> listed(["h.0.ln.weight", "h.1.ln.weight", "ln.weight"])
        'h.{0-1}.ln.weight (2), ln.weight'
    """
    groups = together((name, pattern(name), name) for name in names)
    parts = [label(group) + (f" ({len(group)})" if len(group) > 1 else "") for group in groups[:most]]
    left = len(names) - sum(map(len, groups[:most]))
    return ", ".join(parts) + (f" and {left} more" if left else "")
