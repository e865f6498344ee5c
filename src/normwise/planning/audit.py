"""What an existing set-up of model and optimizer really decays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.decay.wrappers import unwrapped
from normwise.planning.findings import Finding, find
from normwise.planning.plan import Plan, plan
from normwise.planning.pulls import AuditedParameter, audited_parameters
from normwise.planning.tables import by_pattern, label, table

__all__ = ["Audit", "audit"]

_plan = plan  # ``audit`` has an argument of that name
_HEADER = ("parameter", "is", "decayed by", "effect")


class Audit:
    """The result of :func:`audit`.

    Attributes:
        rows: An :class:`~normwise.planning.pulls.AuditedParameter` for each parameter of the model,
            tied ones once.
        findings: What is worth saying, serious findings first; each has a kind, parameters and a remedy.
        plan: The plan behind the verdicts; None if the audit had neither batches nor a plan.
    """

    def __init__(self, rows: list[AuditedParameter], findings: list[Finding], plan: Plan | None) -> None:
        self.rows, self.findings, self.plan = rows, findings, plan

    def table(self, *, grouped: bool = True, width: int = 100) -> str:
        """Return a table: what each parameter is, what decays it, and what that does.

        Args:
            grouped: Whether layers of one pattern share a line.
            width: The longest line, in characters.
        """
        groups = by_pattern((p.name, (p.is_what, p.decayed_by, p.effect), p) for p in self.rows)
        if not grouped:
            groups = [[parameter] for parameter in self.rows]
        lines = []
        for members in groups:
            first = members[0]
            name = label([p.name for p in members]) + (f" ×{len(members)}" if len(members) > 1 else "")
            lines.append([name, first.is_what, first.decayed_by, first.effect])
        return table(_HEADER, lines, width, narrow={0: width * 3 // 10, 2: 21})

    def __str__(self) -> str:
        findings = "\n".join(finding.text() for finding in self.findings) or "nothing to remark"
        return f"{self.table()}\n\n{findings}"

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
    """Say what an existing set-up decays, and which part of that regularises.

    Without batches, the audit says which gains, biases and norms are decayed, which parameters are missing
    from the optimizer, held twice or decayed twice, and whether decay is coupled or decoupled (measured on an
    optimizer of the same class). With batches or a plan, it also says which decay only sets an effective
    learning rate, and at which rotation per step that settles
    (:func:`normwise.theory.equilibrium_rotation`, at the present or initial learning rate).

    Args:
        model: The model.
        optimizer: The model's optimizer, with any :class:`normwise.Decay` that is attached to it.
        batches: As for :func:`normwise.plan`; None to audit without verdicts.
        forward: As for :func:`normwise.plan`.
        plan: A plan for this model, instead of batches.
        progress: Whether to show a bar on a terminal after two seconds.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The plan belongs to another model; and as for :func:`normwise.plan`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> recipe = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> result = audit(net, recipe, [torch.randn(8, 3)])
        >>> [finding.kind for finding in result.findings]
        ['decayed vectors', 'effective learning rate only', 'no effect']
        >>> result.rows[0].effect
        'effective learning rate only: 0.42° a step'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a normwise.Plan, not {type(plan).__name__}")
    if plan is not None:
        plan = plan.apply_to(model)
    elif batches is not None:
        plan = _plan(model, batches, forward, progress=progress)
    treatments = {} if plan is None else {t.name: t for t in plan.treatments}
    parameters = audited_parameters(model, optimizer, treatments)
    in_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    times = Counter(map(id, in_optimizer))
    named = dict(model.named_parameters())
    duplicates = [name for name, p in named.items() if times[id(p)] > 1]
    known = {id(p) for p in named.values()}
    strangers = [str(tuple(p.shape)) for p in in_optimizer if id(p) not in known]
    return Audit(parameters, find(parameters, duplicates, strangers, plan is not None), plan)
