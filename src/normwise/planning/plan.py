"""What to decay, how, and why: a plan for every parameter of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from normwise.invariance import Invariances, find_invariances
from normwise.planning import storage
from normwise.planning.decide import check_overrides, decide
from normwise.planning.patterns import label, starred, together
from normwise.planning.symmetries import Symmetry
from normwise.planning.text import table
from normwise.planning.treatment import BALANCE, NONE, PLAIN_L2, SHRINK, Treatment
from normwise.units import Unit

if TYPE_CHECKING:
    from normwise.decay.decay import Decay
    from normwise.planning.schedule import Scheduler

__all__ = ["Plan", "plan"]

_IN_PART = "shrink in part"
_HEADER = ("parameter", "verdict", "rule", "reason")


def plan(
    model: nn.Module,
    batches: Any = None,
    forward: Callable[..., Any] | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
    invariances: Invariances | None = None,
    tolerance: float | None = None,
    progress: bool = True,
) -> Plan:
    """Say for every parameter what decay to give it, and why.

    - ``"shrink"``: scale-invariant, alone or jointly with others. Decay only sets its effective learning
      rate, so it gets a rule (``plan.attach``), unit by unit: a row, a column or the whole tensor. The
      members of a joint group are taken one by one, each as a whole tensor (docs/planning.md says why).
    - ``"balance"``: in a symmetry that scales some weights up and others down, so that ‖w_a‖² − ‖w_b‖² is
      conserved by gradient flow. Decay balances the two sides and regularises their product.
    - ``"L2"``: in no symmetry. Plain L2 regularises.
    - ``"none"``: gains, biases and other vectors; what has no effect; what is undetermined.

    Args:
        model: Any module with a trainable parameter; it is left as it was.
        batches: As for :func:`normwise.find_invariances`.
        forward: As for :func:`normwise.find_invariances`.
        overrides: {name pattern: verdict}, with ``*``, ``?`` and ``[abc]`` as in file names; the last pattern
            that matches a name decides. "shrink" takes the whole tensor where no unit was found.
        invariances: Those of this model, if they were found already; then ``batches`` is not needed.
        tolerance: As for :func:`normwise.find_invariances`.
        progress: Whether to show a bar on a terminal after two seconds.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A pattern matches nothing, a verdict is unknown, or the invariances cannot be found.
        RuntimeError: The model fails on a batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
        >>> found = plan(net, [torch.randn(16, 3, 4, 4)])
        >>> found.verdicts["0.weight"], found.verdicts["0.bias"], found.verdicts["3.weight"]
        ('shrink', 'none', 'balance')
        >>> found.units
        [Unit((8, 3, 3, 3), dim=0)]
    """
    check_overrides(overrides)
    if invariances is None:
        if batches is None:
            raise ValueError("batches is missing: give batches for the model to run on, or invariances=")
        invariances = find_invariances(model, batches, forward, tolerance, progress=progress)
    elif not isinstance(invariances, Invariances):
        raise TypeError(f"invariances must come from find_invariances, not {type(invariances).__name__}")
    treatments, symmetries = decide(model, invariances, overrides)
    return Plan(model, treatments, symmetries)


class Plan:
    """What :func:`plan` returns: a treatment for every parameter of a model.

    Attributes:
        treatments: One :class:`~normwise.planning.treatment.Treatment` for each parameter, in the order of
            the model; shared (tied) parameters once.
        symmetries: The joint rescaling symmetries as {name: exponent}, jointly scale-invariant groups first;
            a part of a packed parameter is written as in :class:`normwise.invariance.Invariances`.
    """

    def __init__(self, model: nn.Module, treatments: list[Treatment], symmetries: list[Symmetry]) -> None:
        self.treatments = list(treatments)
        self.symmetries = list(symmetries)
        self._bound = storage.bind(self.treatments, model)

    @property
    def verdicts(self) -> dict[str, str]:
        """{parameter name: verdict}."""
        return {t.name: t.verdict for t in self.treatments}

    @property
    def units(self) -> list[Unit]:
        """The units of all parameters with the verdict "shrink", for :class:`normwise.Decay`."""
        return [Unit(self._bound[t.name][1], t.dim, t.mask) for t in self.treatments if t.verdict == SHRINK]

    def param_groups(
        self, weight_decay: float = 0.0, *, shrink_weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return groups for an optimizer: every parameter once, with its name, decayed at most once.

        - "shrink": weight_decay ``shrink_weight_decay``, 0 unless you attach no rule.
        - "balance" and "L2": ``weight_decay``. On the scale it has in the optimizer: coupled in SGD and
          Adam, decoupled in AdamW.
        - "none": 0.

        Groups without a parameter are left out. The weight_decay of each group is given, so that the default
        of an optimizer (0.01 in AdamW) acts on none.

        Args:
            weight_decay: Zero or positive.
            shrink_weight_decay: Zero or positive: the optimizer's own decay of scale-invariant weights, for
                those who do without ``attach``. It cannot tell rows apart, so a parameter of which only some
                are invariant is left out of it.

        Raises:
            TypeError: It is not a number.
            ValueError: It is negative or not finite.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.LayerNorm(4))
            >>> groups = plan(net, [torch.randn(8, 3)]).param_groups(weight_decay=0.1)
            >>> [(g["name"], g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
            [('shrink', 0.0, ['0.weight']), ('none', 0.0, ['1.weight', '1.bias'])]
            >>> optimizer = torch.optim.AdamW(groups)
        """
        from normwise.decay.rule import checked

        decayed = checked("weight_decay", weight_decay)
        shrunk = checked("shrink_weight_decay", shrink_weight_decay)
        decays = {SHRINK: shrunk, BALANCE: decayed, PLAIN_L2: decayed, NONE: 0.0, _IN_PART: 0.0}
        groups: dict[str, dict[str, Any]] = {
            name: {"name": name, "weight_decay": decay, "params": []} for name, decay in decays.items()
        }
        for t in self.treatments:
            name = _IN_PART if shrunk and t.mask is not None else t.verdict
            groups[name]["params"].append(self._bound[t.name])
        return [group for group in groups.values() if group["params"]]

    def attach(
        self,
        optimizer: Optimizer,
        total_time: float | None = None,
        *,
        scheduler: Scheduler | None = None,
        total_steps: int | None = None,
        scheduler_interval: int = 1,
        kind: str | None = None,
        strength: float = 3.0,
        announce: Callable[[str], None] | None = print,
    ) -> Decay:
        """Decay the units by Adaptive Weight Shrink, with nothing to tune; say what was chosen, and why.

        λ is that of ``AdaptiveWeightShrink.for_budget``: for optimizers whose step grows with the gradient
        (SGD), on norms, with the norm of units whose rows have norm 1 as reference; for those whose step does
        not (Adam, Lion, Muon, …), on RMS values, with √Σlr² as reference (design: λ = 3/(Σlr·√Σlr²)).
        Which of the two an optimizer is, is measured on a copy with a matrix of its own.

        Args:
            optimizer: It must hold the parameters of the units, in groups without weight_decay, as
                ``param_groups`` makes them.
            total_time: Σ lr over all steps to come. Σ lr² is then that of a constant rate (the present or
                initial one): give a schedule where it matters, under Adam.
            scheduler: The learning-rate schedule, instead. It is simulated on a copy; neither it nor the
                optimizer is touched.
            total_steps: How many steps are to come; without a ``scheduler``, at the present rate.
            scheduler_interval: How many optimizer steps there are to one ``scheduler.step()``.
            kind: "sgd" or "adam", for an optimizer that cannot be measured.
            strength: See ``for_budget``.
            announce: Called with each line of what was chosen; None for silence.

        Returns:
            The :class:`normwise.Decay`, at work from now on; ``optimizer`` keeps it alive.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The plan has no units; the optimizer lacks one of them or decays it already; the
                budget is missing, given twice or zero; the schedule depends on a metric.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
            >>> found = plan(net, [torch.randn(8, 3)])
            >>> optimizer = torch.optim.SGD(found.param_groups(), lr=0.1)
            >>> decay = found.attach(optimizer, total_steps=600, announce=None)
            >>> decay.rule
            AdaptiveWeightShrink(coefficient=0.05)
        """
        from normwise.planning.attach import attach  # the one place that knows units and decay

        return attach(
            self.treatments,
            {name: parameter for name, (_, parameter) in self._bound.items()},
            optimizer,
            total_time=total_time,
            scheduler=scheduler,
            total_steps=total_steps,
            scheduler_interval=scheduler_interval,
            kind=kind,
            strength=strength,
            announce=announce,
        )

    def explain(self, *, grouped: bool = False, width: int = 100) -> str:
        """Return a table: parameter, verdict, rule, reason.

        Args:
            grouped: Whether to take layers of one pattern and verdict together, as in ``h.{0-11}.fc.weight``.
            width: The longest line, in characters.
        """
        if not grouped:
            rows = [[_names(t), t.verdict, t.rule, t.reason] for t in self.treatments]
            return table(_HEADER, rows, width, narrow={0: width // 3, 2: 16})
        rows = []
        for members in self.grouped():
            first = members[0]
            one = len(members) == 1
            name = _names(first) if one else f"{label([t.name for t in members])} ×{len(members)}"
            rows.append([name, first.verdict, first.rule, first.reason if one else starred(first.reason)])
        return table(_HEADER, rows, width, narrow={0: width // 3, 2: 16})

    def grouped(self) -> list[list[Treatment]]:
        """Return the treatments with layers of one pattern, treated alike for like reasons, together."""
        return together((t.name, (t.verdict, t.rule, t.role, starred(t.reason)), t) for t in self.treatments)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return the plan as JSON text: names, shapes, verdicts, reasons, symmetries; no values."""
        return storage.to_json(self.treatments, self.symmetries)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Plan:
        """Read a plan that :meth:`save` wrote, for ``model``.

        The model may be another copy, wrapped (DDP, FSDP, torch.compile) or sharded: parameters are found by
        name, and their names, shapes and ties must be those of the plan.

        Raises:
            ValueError: The file is no plan, or does not fit the model; the message names the difference.
        """
        treatments, symmetries = storage.from_json(storage.read(path))
        return cls(model, treatments, symmetries)

    def apply_to(self, model: nn.Module) -> Plan:
        """Return the same plan for another copy of the model; see :meth:`load`."""
        return Plan(model, self.treatments, self.symmetries)

    def __str__(self) -> str:
        return self.explain(grouped=True)

    def __repr__(self) -> str:
        counts = Counter(t.verdict for t in self.treatments)
        return f"Plan({', '.join(f'{verdict}: {count}' for verdict, count in counts.items())})"


def _names(treatment: Treatment) -> str:
    return " = ".join((treatment.name, *treatment.aliases))
