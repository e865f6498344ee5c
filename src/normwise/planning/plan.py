"""What to decay, how, and why: a plan for every parameter of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normwise.decay.decay import Decay
from normwise.decay.rules import AdaptiveWeightShrink, Rule, checked
from normwise.decay.start import running_statistics
from normwise.decay.wrappers import unwrapped
from normwise.invariance import Invariances, find_invariances
from normwise.planning import storage
from normwise.planning.attach import Settings, attach_weights, few, say
from normwise.planning.decisions import check_overrides, decide
from normwise.planning.periods import head_counts
from normwise.planning.shares import link, share_out
from normwise.planning.stepping import Stepping
from normwise.planning.tables import by_pattern, label, starred, table
from normwise.planning.treatment import Symmetry, Treatment, Verdict
from normwise.planning.widening import widen
from normwise.units import Unit

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

    - ``"shrink"``: scale-invariant, alone or jointly with others. Decay only sets the effective learning
      rate, so ``plan.attach`` gives the parameter a rule, unit by unit: a row, a column or the whole tensor.
      Each member of a joint group is a whole-tensor unit of its own (docs/planning.md says why).
    - ``"balance"``: in a symmetry that scales some weights up and others down, so that gradient flow
      conserves ‖w_a‖² − ‖w_b‖². Decay balances the two sides and regularises their product.
    - ``"L2"``: in no symmetry. Plain L2 regularises.
    - ``"none"``: gains, biases and other vectors; parameters that are frozen, have no effect, are
      undetermined or do not hold real numbers.

    A symmetry with a frozen parameter does not count, as decay cannot scale that parameter. So freeze first,
    and plan anew after you freeze or unfreeze parameters.

    Args:
        model: Any module with a trainable parameter; it is not changed.
        batches: As for :func:`normwise.find_invariances`.
        forward: As for :func:`normwise.find_invariances`.
        overrides: {name pattern: verdict}, with ``*``, ``?`` and ``[abc]`` as in file names; the last pattern
            that matches a name decides. "shrink" takes the whole tensor where no unit is known.
        invariances: The model's invariances, if they are known; then ``batches`` is not needed.
        tolerance: As for :func:`normwise.find_invariances`.
        progress: Whether to show a bar on a terminal after two seconds.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A pattern matches nothing, a verdict is unknown, or the invariances cannot be found.
        RuntimeError: The model fails on a batch.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
        >>> result = plan(net, [torch.randn(16, 3, 4, 4)])
        >>> result.verdicts["0.weight"], result.verdicts["0.bias"], result.verdicts["3.weight"]
        ('shrink', 'none', 'balance')
        >>> result.units
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
    """The result of :func:`plan`: a treatment for every parameter of a model.

    Attributes:
        treatments: One :class:`~normwise.planning.treatment.Treatment` for each parameter, in the order of
            the model; shared (tied) parameters once.
        symmetries: The joint rescaling symmetries as {name: exponent}, jointly scale-invariant groups first;
            a part of a packed parameter is written as in :class:`normwise.Invariances`.
    """

    def __init__(
        self, model: nn.Module, treatments: Sequence[Treatment], symmetries: Sequence[Symmetry]
    ) -> None:
        self.treatments = list(treatments)
        self.symmetries = list(symmetries)
        self._named = storage.bind(self.treatments, model)
        self._statistics = running_statistics(model)
        self._heads = head_counts(model)

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict of each parameter, as ``{name: verdict}``."""
        return {t.name: t.verdict.value for t in self.treatments}

    @property
    def units(self) -> list[Unit]:
        """The units of all parameters with the verdict "shrink", for :class:`normwise.Decay`."""
        return [
            Unit(self._named[t.name][1], t.dim, t.mask)
            for t in self.treatments
            if t.verdict == Verdict.SHRINK
        ]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the model that the plan is bound to, as ``{name: parameter}``."""
        return {t.name: self._named[t.name][1] for t in self.treatments}

    def param_groups(
        self, weight_decay: float | Literal["auto"] = "auto", *, shrink_weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return groups for an optimizer: every parameter once, with its name, decayed at most once.

        - "shrink": weight_decay ``shrink_weight_decay``; leave it at 0 if you attach a rule.
        - "balance" and "L2": ``weight_decay``, on the scale that it has in the optimizer: coupled in SGD and
          Adam, decoupled in AdamW.
        - "none": 0.

        Groups without a parameter are left out. Every group names its weight_decay, so the default of the
        optimizer (0.01 in AdamW) acts on no group.

        Args:
            weight_decay: Zero or positive. "auto" is 0: beside ``attach`` the usual 5e-4 (SGD) or 0.1 (AdamW)
                changed little or nothing, and the rate S/Σlr, which suits scale-invariant
                weights, did harm in 15 of 15 settings (benchmarks/results/start_variants.md).
            shrink_weight_decay: Zero or positive: the optimizer's own decay of scale-invariant weights, for
                use without ``attach``. It cannot tell rows apart, so it is 0 for parameters of which only
                some rows or columns are invariant.

        Raises:
            TypeError: An argument is not a number, nor "auto".
            ValueError: An argument is negative or not finite.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.LayerNorm(4))
            >>> groups = plan(net, [torch.randn(8, 3)]).param_groups(weight_decay=0.1)
            >>> [(g["name"], g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
            [('shrink', 0.0, ['0.weight']), ('none', 0.0, ['1.weight', '1.bias'])]
            >>> optimizer = torch.optim.AdamW(groups)
        """
        decayed = 0.0 if weight_decay == "auto" else checked("weight_decay", weight_decay)
        shrunk = checked("shrink_weight_decay", shrink_weight_decay)
        decays = {"shrink": shrunk, "balance": decayed, "L2": decayed, "none": 0.0, _IN_PART: 0.0}
        groups: dict[str, dict[str, Any]] = {
            name: {"name": name, "weight_decay": decay, "params": []} for name, decay in decays.items()
        }
        for t in self.treatments:
            name = _IN_PART if shrunk and t.mask is not None else t.verdict.value
            groups[name]["params"].append(self._named[t.name])
        return [group for group in groups.values() if group["params"]]

    @overload
    def attach(
        self,
        optimizer: Optimizer,
        total_time: float | None = None,
        *,
        scheduler: LRScheduler | None = None,
        total_steps: int | None = None,
        scheduler_interval: int | Callable[[int], int] = 1,
        kind: str | None = None,
        strength: float = 3.0,
        start: str = "equilibrium",
        rule: type[Rule] = AdaptiveWeightShrink,
        every: int = 1,
        announce: Callable[[str], None] | None = None,
    ) -> Decay: ...

    @overload
    def attach(
        self,
        optimizer: Sequence[Optimizer],
        total_time: float | None = None,
        *,
        scheduler: Sequence[LRScheduler] | None = None,
        total_steps: int | None = None,
        scheduler_interval: int | Callable[[int], int] = 1,
        kind: str | None = None,
        strength: float = 3.0,
        start: str = "equilibrium",
        rule: type[Rule] = AdaptiveWeightShrink,
        every: int = 1,
        announce: Callable[[str], None] | None = None,
    ) -> list[Decay]: ...

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        total_time: float | None = None,
        *,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        total_steps: int | None = None,
        scheduler_interval: int | Callable[[int], int] = 1,
        kind: str | None = None,
        strength: float = 3.0,
        start: str = "equilibrium",
        rule: type[Rule] = AdaptiveWeightShrink,
        every: int = 1,
        announce: Callable[[str], None] | None = None,
    ) -> Decay | list[Decay]:
        r"""Decay the units by Adaptive Weight Shrink, with nothing to tune, from the norms that suit it.

        The rule has the rate S/T at the start, with the strength S and the time T = Σ lr. With S = 3, decay
        forgets what is older than about a third of the training, at any learning rate and initial scale. The
        norm of a
        scale-invariant weight is free, so at the first steps each unit is scaled to the norm n₀ at which
        this rate takes away what the optimizer's steps add (docs/theory.md, "Starting in equilibrium"):

            n₀⁴ = η·D·γ²·T/(2S)   where steps grow with the gradient (SGD),
            n₀² = η·D·T/(2S)      where they do not (Adam, Lion, Muon, …),

        η is the largest learning rate, γ = ‖w‖·‖∇L‖ is measured in the first 32 steps, and the diffusivity D,
        the growth of ‖w‖² per step and lr² under random gradients, is measured on a second optimizer of the
        same class and settings. A jointly scale-invariant group is scaled by powers of one factor. Outputs
        stay as they are, and each step is exactly the step that the rescaled model would have taken. Only the
        norms differ: a checkpoint from before the first step and one from after it are of different scale.
        The running statistics of batch norms, which evaluation mode uses, begin anew.

        Use ``start="as is"`` to keep the norms, and with them the effective learning rate that a model was
        trained with, when you fine-tune for a short time. Then λ is that of
        ``AdaptiveWeightShrink.for_budget``, with the reference norm 1 for rows under SGD, and otherwise the
        RMS that an undecayed weight reaches from zero.

        The choices and the reasons go to the logger "normwise" at level INFO, and ``decay.explain()`` repeats
        them.

        Args:
            optimizer: It must hold the parameters of the units, in groups without weight_decay, as
                ``param_groups`` makes them. Several optimizers: each takes its own units, and joint
                groups across them move together. Frozen parameters that are in no optimizer and groups whose
                learning rates sum to 0 are left out. What Lightning, Fabric or Accelerate has wrapped around
                an optimizer or a scheduler is taken off.
            total_time: Σ lr over all steps to come; η is then the present or initial rate.
            scheduler: The learning-rate schedule, instead; for several optimizers, one for each. A copy is
                simulated; neither the scheduler nor the optimizer changes.
            total_steps: The number of steps to come; without a ``scheduler``, at the present rate.
            scheduler_interval: The number of optimizer steps per ``scheduler.step()``; or a function of the
                number of optimizer steps taken, which says how often ``scheduler.step()`` follows.
            kind: "sgd" for an optimizer whose steps grow with the gradient, "adam" for others. Only an
                optimizer that cannot be measured needs it; D is then that of plain SGD or Adam.
            strength: S. Less keeps more of the early steps, more turns the weights faster.
            start: "equilibrium" or "as is".
            rule: The class ``AdaptiveWeightShrink``, which corrects itself where γ changes, or ``L2``, which
                makes all layers turn equally fast.
            every: As for :class:`normwise.Decay`: 8 makes decay several times cheaper, and changes the
                accuracies of the experiments by less than they vary (benchmarks/results/start_variants.md).
            announce: Called with each line that is logged.

        Returns:
            The :class:`normwise.Decay`, at work from now on; ``optimizer`` keeps it alive. For several
            optimizers a list, one for each that holds units.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The plan has no units; an optimizer lacks one of them or decays it already; it has
                stepped already; its steps have no balance with decay, or cannot be measured; the budget is
                missing, given twice or zero; the schedule depends on a metric.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
            >>> result = plan(net, [torch.randn(8, 3)])
            >>> optimizer = torch.optim.SGD(result.param_groups(), lr=0.1)
            >>> decay = result.attach(optimizer, total_steps=600)
            >>> decay.rule
            AdaptiveWeightShrink(coefficient=0.05)
        """
        several = not isinstance(optimizer, Optimizer)
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        optimizers = [unwrapped(one) for one in optimizers]
        for one in optimizers:
            if not isinstance(one, Optimizer):
                raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(one).__name__}")
        schedulers: list[LRScheduler | None] = [None] * len(optimizers)
        if scheduler is not None:
            schedulers = list(scheduler) if isinstance(scheduler, Sequence) else [scheduler]
        if len(schedulers) != len(optimizers):
            raise ValueError(
                f"scheduler has {len(schedulers)} schedules for {len(optimizers)} optimizers: give one each"
            )
        storage.check_frozen(self.treatments, {name: p for name, (_, p) in self._named.items()})
        shares, spanning = share_out(self.treatments, self.symmetries, self._named, optimizers)
        decays: list[Decay] = []
        measured: dict[str, Stepping] = {}
        for one, schedule, (weights, groups) in zip(optimizers, schedulers, shares, strict=True):
            if weights:
                settings = Settings(
                    total_time,
                    schedule,
                    total_steps,
                    scheduler_interval,
                    kind,
                    strength,
                    start,
                    rule,
                    every,
                    announce,
                )
                decays.append(attach_weights(weights, groups, one, settings, measured, self._statistics))
        unmoved = link(spanning, self._named, decays)
        if unmoved:
            say(
                f"started as they are: {few(unmoved)}, whose group has weights in several optimizers, one of "
                "which has steps that grow with the gradient",
                decays,
                announce,
            )
        return decays if several else decays[0]

    def explain(self, *, grouped: bool = False, width: int = 100) -> str:
        """Return a table: parameter, verdict, rule, reason.

        Args:
            grouped: Whether layers of one pattern and verdict share a line, as ``h.{0-11}.fc.weight``.
            width: The longest line, in characters.
        """
        lines = []
        for members in self.grouped() if grouped else [[t] for t in self.treatments]:
            first, reason = members[0], members[0].reason
            name = " = ".join((first.name, *first.aliases))
            if len(members) > 1:
                name, reason = f"{label([t.name for t in members])} ×{len(members)}", starred(reason)
            lines.append([name, first.verdict, first.rule, reason])
        return table(_HEADER, lines, width, narrow={0: width // 3, 2: 16})

    def grouped(self) -> list[list[Treatment]]:
        """Return the treatments, layers of one pattern together where they are treated alike and why."""
        return by_pattern(
            (t.name, (t.verdict, t.rule, t.role, starred(t.reason)), t) for t in self.treatments
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return the plan as JSON: names, shapes, verdicts, reasons and symmetries, but no weights."""
        return storage.to_json(self.treatments, self.symmetries)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Plan:
        """Read a plan that :meth:`save` wrote, for ``model``.

        The model may be another copy, wrapped (DDP, FSDP, torch.compile) or sharded. Parameters are matched
        by name, and their names, shapes and ties must equal those of the plan.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: The file is no plan, or does not fit the model; the message names the difference.
        """
        return cls.from_json(storage.read(path), model)

    @classmethod
    def from_json(cls, text: str, model: nn.Module) -> Plan:
        """Return the plan that :meth:`to_json` wrote, for ``model``; as :meth:`load` does from a file."""
        return cls(model, *storage.from_json(text, model))

    def apply_to(self, model: nn.Module, widened: bool = False) -> Plan:
        """Return the same plan for another copy of the model, whose names, shapes and ties must be equal.

        Args:
            model: The copy; it may be wrapped or sharded, as in :meth:`load`.
            widened: Whether the model may be wider than the one that was planned. Symmetries do not depend on
                widths, so a large model can be planned by a narrow copy: the same configuration with fewer
                heads (two at least), channels, experts in a stack and words, all layers, and the same ratios
                between parts of packed parameters. Units keep their dimension, and parts their share of it,
                or of each period where they recur in each head.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: The plan does not fit or carry over; the message names the first difference.

        Example:
            >>> import torch
            >>> def net(width):
            ...     return torch.nn.Sequential(
            ...         torch.nn.Linear(3, width, bias=False), torch.nn.BatchNorm1d(width)
            ...     )
            >>> plan(net(4), [torch.randn(8, 3)]).apply_to(net(512), widened=True).units
            [Unit((512, 3), dim=0)]
        """
        if widened:
            return Plan(model, *widen(self.treatments, self.symmetries, self._heads, model))
        return Plan(model, self.treatments, self.symmetries)

    def __str__(self) -> str:
        return self.explain(grouped=True)

    def __repr__(self) -> str:
        counts = Counter(t.verdict.value for t in self.treatments)
        return f"Plan({', '.join(f'{verdict}: {count}' for verdict, count in counts.items())})"
