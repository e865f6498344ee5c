"""What is worth saying about a set-up: findings, each with a remedy."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.planning.pulls import AuditedParameter
from normwise.planning.tables import listed
from normwise.planning.treatment import Verdict

__all__ = ["Finding", "find"]


@dataclass(frozen=True)
class Finding:
    """One thing about a set-up.

    Attributes:
        kind: "missing", "duplicate", "stranger", "decayed twice", "decayed vectors", "undecayed weights",
            "effective learning rate only", "falling learning rate", "no effect", "divided decay",
            "one side of a pair", "unknown coupling".
        serious: Whether the set-up most likely does not do what its author intended.
        parameters: The names of the parameters.
        message: What the set-up does.
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
        message = textwrap.fill(self.message, initial_indent=mark, subsequent_indent="  ", **options)
        remedy = textwrap.fill(self.remedy, initial_indent="  → ", subsequent_indent="    ", **options)
        return f"{message}\n{remedy}"

    def __str__(self) -> str:
        return self.text()


def find(
    parameters: Sequence[AuditedParameter], duplicates: Sequence[str], strangers: Sequence[str], planned: bool
) -> list[Finding]:
    """Return the findings, the serious ones first.

    Args:
        parameters: Those of the model.
        duplicates: Names of parameters that the optimizer holds twice.
        strangers: Shapes of tensors that the optimizer holds and the model does not.
        planned: Whether the parameters have treatments of a plan.
    """
    findings = [*_about_membership(parameters, duplicates, strangers), *_about_pulls(parameters)]
    findings += _about_effects(parameters) if planned else _about_undecayed(parameters)
    return sorted(findings, key=lambda finding: not finding.serious)


def _finding(
    kind: str, names: Iterable[str], message: str, remedy: str, *, serious: bool = False
) -> Iterable[Finding]:
    """Yield a finding about these parameters, if there are any."""
    if names := tuple(names):
        yield Finding(kind, serious, names, f"{message}: {listed(names)}", remedy)


def _names(
    parameters: Iterable[AuditedParameter], which: Callable[[AuditedParameter], object]
) -> tuple[str, ...]:
    return tuple(p.name for p in parameters if which(p))


def _about_membership(
    parameters: Sequence[AuditedParameter], duplicates: Sequence[str], strangers: Sequence[str]
) -> Iterable[Finding]:
    yield from _finding(
        "missing",
        _names(parameters, lambda p: p.trainable and not p.in_optimizer),
        "not in the optimizer, so never trained",
        "construct the optimizer after the model is complete, from plan.param_groups()",
        serious=True,
    )
    yield from _finding(
        "duplicate",
        duplicates,
        "in the optimizer twice, so stepped and decayed twice",
        "give each parameter once; model.parameters() gives a tied one once",
        serious=True,
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


def _about_pulls(parameters: Sequence[AuditedParameter]) -> Iterable[Finding]:
    twice = [p for p in parameters if len(p.pulls) > 1]
    yield from _finding(
        "decayed twice",
        (p.name for p in twice),
        f"decayed twice, by {' and '.join(str(pull) for p in twice[:1] for pull in p.pulls)}",
        "set weight_decay=0 for the parameters that a rule decays, as plan.param_groups() does",
        serious=True,
    )
    yield from _finding(
        "divided decay",
        _names(parameters, lambda p: any(pull.divided for pull in p.pulls)),
        "weight_decay goes through the gradient and is divided by its size, so weights with large gradients "
        "are decayed less",
        "use the decoupled form (AdamW), or nw.Decay",
        serious=True,
    )
    yield from _finding(
        "unknown coupling",
        _names(parameters, lambda p: any(pull.coupling == "unknown" for pull in p.pulls)),
        "how this optimizer applies weight_decay could not be measured",
        "see its documentation; nw.Decay decays the same way beside any optimizer",
    )
    yield from _finding(
        "decayed vectors",
        _names(parameters, lambda p: p.role != "weight" and p.pulls and not p.without_effect),
        "gains, biases or other vectors are pulled to zero",
        "put them into a group with weight_decay=0, as plan.param_groups() does",
        serious=True,
    )


def _about_undecayed(parameters: Sequence[AuditedParameter]) -> Iterable[Finding]:
    yield from _finding(
        "undecayed weights",
        _names(parameters, lambda p: p.role == "weight" and p.stepped and not p.pulls),
        "weights that nothing decays",
        "give batches to nw.audit, to see which of them only have a direction",
    )


def _about_effects(parameters: Sequence[AuditedParameter]) -> Iterable[Finding]:
    decayed = [p for p in parameters if p.pulls]
    undecayed = [p for p in parameters if p.stepped and not p.pulls]
    # Whoever attaches a rule wants the effective learning rate: only the optimizer's decay is a finding.
    only_rate = [
        p
        for p in decayed
        if p.verdict == Verdict.SHRINK and any(pull.coefficient is not None for pull in p.pulls)
    ]
    share = sum(p.numel for p in only_rate) / max(1, sum(p.numel for p in decayed))
    yield from _finding(
        "effective learning rate only",
        (p.name for p in only_rate),
        f"decay of scale-invariant weights, {share:.0%} of all decayed values, does not regularise; it sets "
        f"an effective learning rate{_rotations(only_rate)}",
        "choose it as a learning rate, or leave it to plan.attach(optimizer, ...)",
    )
    yield from _finding(
        "falling learning rate",
        _names(undecayed, lambda p: p.verdict == Verdict.SHRINK),
        "scale-invariant and not decayed: every step lengthens them, so their effective learning rate falls",
        "plan.attach(optimizer, ...) decays them with nothing to tune",
        serious=True,
    )
    yield from _finding(
        "undecayed weights",
        _names(undecayed, lambda p: p.verdict in (Verdict.BALANCE, Verdict.PLAIN_L2)),
        "weights whose decay would regularise are not decayed",
        "plan.param_groups(weight_decay=...) decays them, if regularisation is wanted",
    )
    yield from _finding(
        "no effect",
        _names(decayed, lambda p: p.without_effect),
        "decay of parameters without any effect on the outputs",
        "construct the layer with bias=False, or leave them",
    )
    with_pull = {p.name for p in decayed}
    yield from _finding(
        "one side of a pair",
        _names(decayed, lambda p: p.verdict == Verdict.BALANCE and not with_pull & {*p.against}),
        "decayed while the other side of the +1/−1 pair is not, so size moves to the other side and the "
        "product keeps it",
        "no change needed where the other side is a gain: that is the usual choice",
    )


def _rotations(parameters: Sequence[AuditedParameter]) -> str:
    settled = [(q.rotation, q.settling) for p in parameters for q in p.pulls if q.rotation and q.settling]
    if not settled:
        return ""
    angles = [math.degrees(angle) for angle, _ in settled]
    low, high = min(angles), max(angles)
    spread = f"{low:.2g}°" if high < 1.05 * low else f"{low:.2g}° to {high:.2g}°"
    steps = max(steps for _, steps in settled)
    return f" (they settle at turning {spread} a step, after some {steps:.2g} steps)"
