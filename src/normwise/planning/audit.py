"""What an existing set-up of model and optimizer really decays."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.planning.decide import parameter_aliases
from normwise.planning.findings import Finding, find
from normwise.planning.patterns import label, together
from normwise.planning.plan import Plan, plan
from normwise.planning.pulls import Pull, pulls_on
from normwise.planning.roles import role_of
from normwise.planning.text import table
from normwise.planning.treatment import BALANCE, PLAIN_L2, SHRINK

__all__ = ["Audit", "Row", "audit"]

_HEADER = ("parameter", "is", "decayed by", "effect")


@dataclass(frozen=True)
class Row:
    """What happens to one parameter.

    Attributes:
        name: The first of its names.
        numel: Its number of values.
        role: "weight", "bias", "gain" or "vector".
        verdict: Of the plan: "shrink", "balance", "L2" or "none"; "" if the audit had no batches.
        pulls: What decays it.
        in_optimizer: Whether the optimizer holds it.
        trainable: Whether it requires a gradient.
        effect_kind: "no effect" for a parameter that the plan found to be without any, else "".
        against: If it is balanced: the parameters on the other side.
    """

    name: str
    numel: int
    role: str
    verdict: str
    pulls: tuple[Pull, ...]
    in_optimizer: bool
    trainable: bool
    effect_kind: str = ""
    against: tuple[str, ...] = ()

    @property
    def is_what(self) -> str:
        """The parameter in a word or two."""
        if self.effect_kind:
            return self.effect_kind
        kinds = {SHRINK: "invariant", BALANCE: "balanced", PLAIN_L2: "no symmetry"}
        return kinds.get(self.verdict, self.role) if self.role == "weight" else self.role

    @property
    def decayed_by(self) -> str:
        """What decays it, in words."""
        if not self.in_optimizer:
            return "not in the optimizer" if self.trainable else "frozen"
        return " and ".join(map(str, self.pulls)) or "–"

    @property
    def effect(self) -> str:
        """What the decay, or its absence, does."""
        if not self.in_optimizer:
            return "–"
        if self.effect_kind:
            return "changes nothing"
        if self.role != "weight":
            return "pulls its values to zero" if self.pulls else "–"
        if self.verdict == SHRINK:
            return self._effect_on_invariant()
        if not self.pulls:
            return "–"
        if self.verdict == BALANCE:
            return "balances, regularises the product"
        return {PLAIN_L2: "regularises", "": "?: give batches to find out"}.get(self.verdict, "undetermined")

    def _effect_on_invariant(self) -> str:
        if not self.pulls:
            return "only grows: effective learning rate falls"
        angles = [pull.rotation for pull in self.pulls if pull.rotation]
        settles = f": {math.degrees(angles[0]):.2g}° a step" if len(angles) == 1 else ""
        return f"effective learning rate only{settles}"


class Audit:
    """What :func:`audit` returns.

    Attributes:
        rows: A :class:`Row` for each parameter of the model, tied ones once.
        findings: What is worth saying, the serious first; each has a kind, parameters and a remedy.
        plan: The plan behind the verdicts; None if there were no batches.
    """

    def __init__(self, rows: list[Row], findings: list[Finding], plan: Plan | None) -> None:
        self.rows, self.findings, self.plan = rows, findings, plan

    def table(self, *, grouped: bool = True, width: int = 100) -> str:
        """Return a table: what each parameter is, what decays it, and what that does.

        Args:
            grouped: Whether to take layers of one pattern together.
            width: The longest line, in characters.
        """
        alike = together((r.name, (r.is_what, r.decayed_by, r.effect), r) for r in self.rows)
        if not grouped:
            alike = [[row] for row in self.rows]
        cells = []
        for members in alike:
            first = members[0]
            name = label([r.name for r in members]) + (f" ×{len(members)}" if len(members) > 1 else "")
            cells.append([name, first.is_what, first.decayed_by, first.effect])
        return table(_HEADER, cells, width, narrow={0: width * 3 // 10, 2: 21})

    def __str__(self) -> str:
        said = "\n".join(finding.text() for finding in self.findings) or "nothing to remark"
        return f"{self.table()}\n\n{said}"

    def __repr__(self) -> str:
        kinds = Counter(finding.kind for finding in self.findings)
        return f"Audit({len(self.rows)} parameters; {', '.join(kinds) or 'nothing to remark'})"


def audit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Any = None,
    forward: Callable[..., Any] | None = None,
    *,
    plan: Plan | None = None,
    progress: bool = True,
) -> Audit:
    """Say what an existing set-up decays, and what of that is regularisation at all.

    Without batches: which gains, biases and norms are decayed, what is missing, held or decayed twice, and
    coupled against decoupled (measured on an optimizer of the same kind, not looked up). With batches also
    which decay only sets an effective learning rate, and the rotation per step at which it settles
    (:func:`normwise.theory.equilibrium_rotation`, at the present or initial learning rate).

    Args:
        model: The model.
        optimizer: Its optimizer, with any :class:`normwise.Decay` that is attached.
        batches: As for :func:`normwise.plan`; None to do without verdicts.
        forward: As for :func:`normwise.plan`.
        plan: A plan for this model that was made before, instead of batches.
        progress: Whether to show a bar on a terminal after two seconds.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The plan is that of another model, or see :func:`normwise.plan`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> recipe = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> found = audit(net, recipe, [torch.randn(8, 3)])
        >>> [finding.kind for finding in found.findings]
        ['decayed vectors', 'effective learning rate only', 'no effect']
        >>> found.rows[0].effect
        'effective learning rate only: 0.42° a step'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    made = _plan(model, batches, forward, plan, progress)
    named = dict(model.named_parameters())
    verdicts = {} if made is None else {t.name: t for t in made.treatments}
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    pulls = pulls_on(optimizer)
    rows = []
    for name in parameter_aliases(model):
        parameter, treatment = named[name], verdicts.get(name)
        row = Row(
            name,
            parameter.numel(),
            role_of(model, name, parameter),
            "",
            tuple(dict.fromkeys(pulls.get(id(parameter), ()))),
            id(parameter) in held,
            parameter.requires_grad,
        )
        if treatment is not None:
            kind = "no effect" if treatment.reason.startswith("no effect") else ""
            row = dataclasses.replace(
                row, verdict=treatment.verdict, effect_kind=kind, against=treatment.against
            )
        rows.append(row)
    known = {id(p) for p in named.values()}
    strangers = [
        str(tuple(p.shape)) for group in optimizer.param_groups for p in group["params"] if id(p) not in known
    ]
    duplicates = [name for name, p in named.items() if held[id(p)] > 1]
    return Audit(rows, find(rows, duplicates, strangers, made is not None), made)


def _plan(
    model: nn.Module,
    batches: Any,
    forward: Callable[..., Any] | None,
    given: Plan | None,
    progress: bool,
) -> Plan | None:
    if given is not None:
        if not isinstance(given, Plan):
            raise TypeError(f"plan must be a normwise.Plan, not {type(given).__name__}")
        return given.apply_to(model)
    return None if batches is None else plan(model, batches, forward, progress=progress)
