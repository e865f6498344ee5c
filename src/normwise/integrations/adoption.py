"""What all trainers share: from a model, optimizers and schedules to Decays, and back from a checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay.decay import Decay
from normwise.decay.rules import Rule, checked
from normwise.decay.wrappers import unwrapped
from normwise.integrations.decays import described, rebuilt
from normwise.integrations.groups import GroupSplit, split_groups
from normwise.monitor.monitor import Monitor
from normwise.planning.budget import has_begun
from normwise.planning.plan import Plan, plan
from normwise.planning.treatment import Cause, Treatment, Verdict
from normwise.sharding import is_sharded
from normwise.units import Unit

__all__ = ["Adoption", "Options", "Trained", "checked_recipe", "plan_for"]

_logger = logging.getLogger("normwise")
_FORMAT = 1
_EXTENDED = ("keep", "anew")


class Trained(NamedTuple):
    """An optimizer as a trainer uses it.

    Attributes:
        optimizer: The optimizer.
        scheduler: Its schedule, if it has one.
        follows: As ``scheduler_interval`` of :meth:`normwise.Plan.attach`.
    """

    optimizer: Optimizer
    scheduler: Any = None
    follows: int | Callable[[int], int] = 1


@dataclass(frozen=True)
class Options:
    """What a user may choose; :class:`normwise.lightning.DecayCallback` explains it."""

    plan: Plan | None = None
    rule: Rule | type[Rule] | None = None
    weight_decay: float | None = None
    total_steps: int | None = None
    total_time: float | Sequence[float] | None = None
    forward: Callable[..., Any] | None = None
    adopt: bool = False
    extended: str = "keep"
    monitor: int | None = 50
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments, so that a mistake shows before the training begins."""
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise TypeError(f"plan must be a normwise.Plan, not {type(self.plan).__name__}")
        is_class = isinstance(self.rule, type) and issubclass(self.rule, Rule)
        if self.rule is not None and not is_class and not isinstance(self.rule, Rule):
            raise TypeError(
                f"rule must be a Rule such as AdaptiveWeightShrink(0.01), or a class, not {self.rule!r}"
            )
        every = self.monitor
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"monitor={every!r} is not allowed: give a number of steps, or None")
        if self.weight_decay is not None:
            checked("weight_decay", self.weight_decay)
        if self.extended not in _EXTENDED:
            raise ValueError(f"extended={self.extended!r} is not known: choose from 'keep', 'anew'")

    @property
    def given_rule(self) -> Rule | None:
        """The rule, if it is given with its coefficient."""
        return self.rule if isinstance(self.rule, Rule) else None


def plan_for(
    model: nn.Module, batches: Any, forwards: Sequence[tuple[str, Callable[..., Any] | None]]
) -> Plan:
    """Return a plan, made with the first way to call the model that works.

    Args:
        model: The model.
        batches: Batches of the trainer's loader.
        forwards: For each way its name, and what :func:`normwise.plan` takes as ``forward``.

    Raises:
        ValueError: The model is sharded.
        RuntimeError: The model fails on the batches in every way.
    """
    for name, param in model.named_parameters():
        if is_sharded(param):
            raise ValueError(
                f"the model is sharded ({name!r}), and a plan is made of a whole one: give "
                "plan=nw.plan(model, batches), made before"
            )
    failures: list[tuple[str, Exception]] = []
    for name, forward in forwards:
        try:
            made = plan(model, batches, forward, progress=False)
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append((name, error))
            continue
        _logger.info("planned from %s on the first batches of the training data: %r", name, made)
        return made
    reasons = "; ".join(f"{name}: {str(error).splitlines()[0]}" for name, error in failures)
    raise RuntimeError(
        f"no plan can be made from the training data ({reasons}): give forward=, a function (model, batch) → "
        "outputs, or plan=nw.plan(model, batches)"
    ) from failures[-1][1]


class Adoption:
    """Decay in one training.

    Args:
        model: The model whose parameters the optimizers hold.
        trained: The optimizers.
        plan: The plan for the model.
        options: What the user chose.

    Attributes:
        decays: For each optimizer its Decay, or None if it has no scale-invariant weights.
        splits: How the groups of the optimizers were split.
        total_steps: The number of steps that λ was made for; None if it was not made of steps.
        monitor: The monitor, or None.

    Raises:
        ValueError: A scale-invariant weight is trainable and in no optimizer.
    """

    def __init__(self, model: nn.Module, trained: Sequence[Trained], plan: Plan, options: Options) -> None:
        self.model = model
        self.plan = plan.apply_to(model)
        self.trained = [t._replace(optimizer=unwrapped(t.optimizer)) for t in trained]
        self.options = options
        self.decays: list[Decay | None] = []
        self.splits: list[GroupSplit] = []
        self.total_steps: int | None = None
        self.monitor: Monitor | None = None
        shrunk = [
            (treatment, parameter)
            for treatment, parameter in zip(self.plan.treatments, self.plan.parameters.values(), strict=True)
            if treatment.verdict == Verdict.SHRINK
        ]
        self._held = [
            {id(p) for group in t.optimizer.param_groups for p in group["params"]} for t in self.trained
        ]
        self._weights = [[(x, p) for x, p in shrunk if id(p) in held] for held in self._held]
        for treatment, parameter in shrunk:
            if not any(id(parameter) in held for held in self._held):
                raise ValueError(
                    f"{treatment.name!r} is trainable and in no optimizer: freeze it "
                    "(requires_grad_(False)), or give it to the optimizer"
                )
        if not shrunk:
            _logger.warning(
                "nothing in this model is scale-invariant and trainable, so there is nothing for a rule to "
                "take: the training goes on as it would without normwise"
            )

    def take_weight_decay_off(self, schedulers: Sequence[Any]) -> None:
        """Take weight_decay off what a rule takes, and give it to others as the options say.

        Args:
            schedulers: All that step the learning rates of the optimizers.
        """
        wish = self.options.weight_decay
        treatments = dict(zip(map(id, self.plan.parameters.values()), self.plan.treatments, strict=True))

        def wanted(param: Tensor, present: float) -> float:
            treatment = treatments.get(id(param))
            if treatment is not None and treatment.verdict == Verdict.SHRINK:
                return 0.0
            if treatment is None or wish is None:
                return present
            return float(wish) if treatment.verdict in (Verdict.BALANCE, Verdict.PLAIN_L2) else 0.0

        names = {key: treatment.name for key, treatment in treatments.items()}
        for t, weights in zip(self.trained, self._weights, strict=True):
            if not weights and wish is None:
                continue
            split = split_groups(t.optimizer, wanted, names)
            split.hide_from([s for s in schedulers if _optimizer_of(s) is t.optimizer])
            self.splits.append(split)
            for line in split.changes:
                _logger.info("%s of %s", line, type(t.optimizer).__name__)

    def attach(self, total_steps: int | None) -> None:
        """Attach what the options say, for a training of so many optimizer steps from now on."""
        times = self._times()
        if self.options.given_rule is None and None in times:
            self.total_steps = total_steps
        follows = {t.follows for t in self.trained}
        if self.options.given_rule is not None or len(set(times)) > 1 or len(follows) > 1:
            self.decays = [
                self._attached(k, time, total_steps) if self._weights[k] else None
                for k, time in enumerate(times)
            ]
        elif any(self._weights):
            made = self._attached_together(times[0], total_steps)
            by_optimizer = {id(decay.optimizer): decay for decay in made}
            self.decays = [by_optimizer.get(id(t.optimizer)) for t in self.trained]
        else:
            self.decays = [None] * len(self.trained)
        self._check_that_one_rank_can_save()

    def attach_to_the_rest(self, total_steps: int | None, done: int) -> None:
        """Attach to a training of which so many steps are done, for the steps to come."""
        self.trained = [t._replace(follows=_after(t.follows, done)) for t in self.trained]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the optimizer has stepped|the scheduler is at")
            self.attach(None if total_steps is None else total_steps - done)
        if self.total_steps is not None:
            self.total_steps = total_steps

    def watch(self, trackers: Sequence[Any], state: Any = None) -> None:
        """Add the monitor, whose rows and findings go to these trackers, and load its state."""
        every = self.options.monitor
        optimizers = [t.optimizer for t, decay in zip(self.trained, self.decays, strict=True) if decay]
        if every is None or not optimizers:
            return
        settings: dict[str, Any] = {"plan": self.plan, "total_steps": self.total_steps}
        first = self.trained[0]
        if len(self.trained) == 1 and first.follows == 1 and self.total_steps is not None:
            settings["scheduler"] = first.scheduler
        self.monitor = Monitor(optimizers, every=every, trackers=list(trackers), **settings)
        if state is not None:
            self.monitor.load_state_dict(state)

    def _check_that_one_rank_can_save(self) -> None:
        """Refuse states that lie on several ranks: all trainers save a Decay on one."""
        compensated = [decay for decay in self.decays if decay is not None and decay.compensated]
        if any(is_sharded(p) for decay in compensated for unit in decay.units for p in unit.params):
            raise ValueError(
                "weights in half precision that are sharded cannot be resumed by a trainer, which saves the "
                "decay on one rank: keep weights in float32 and compute in bfloat16 (mixed precision)"
            )

    def _settings(self) -> dict[str, Any]:
        settings = dict(self.options.settings)
        if self.options.rule is not None:
            settings["rule"] = self.options.rule
        if any(has_begun(t.optimizer) for t in self.trained):  # momentum belongs to the present norms
            settings.setdefault("start", "as is")
        return settings

    def _attached_together(self, time: float | None, total_steps: int | None) -> list[Decay]:
        """Attach to all optimizers at once, so that groups across them start in equilibrium together."""
        optimizers = [t.optimizer for t in self.trained]
        if time is not None:
            return self.plan.attach(optimizers, time, **self._settings())
        schedulers = [t.scheduler for t in self.trained]
        return self.plan.attach(
            optimizers,
            scheduler=schedulers if any(s is not None for s in schedulers) else None,
            total_steps=total_steps,
            scheduler_interval=self.trained[0].follows,
            **self._settings(),
        )

    def _attached(self, k: int, time: float | None, total_steps: int | None) -> Decay:
        """Attach to one optimizer, leaving the norms of its weights as they are if there are others."""
        t, rule = self.trained[k], self.options.given_rule
        if rule is not None:
            units = [Unit(parameter, x.dim, x.mask) for x, parameter in self._weights[k]]
            return Decay(t.optimizer, rule, units, **self.options.settings)
        settings = {**self._settings(), "start": "as is"}
        if time is not None:
            return self._plan_of(k).attach(t.optimizer, time, **settings)
        return self._plan_of(k).attach(
            t.optimizer,
            scheduler=t.scheduler,
            total_steps=total_steps,
            scheduler_interval=t.follows,
            **settings,
        )

    def _plan_of(self, k: int) -> Plan:
        """Return the plan for the weights of one optimizer: it leaves the others alone."""

        def kept(treatment: Treatment, parameter: Tensor) -> Treatment:
            if id(parameter) in self._held[k] or treatment.verdict != Verdict.SHRINK:
                return treatment
            return replace(treatment, verdict=Verdict.NONE, cause=Cause.OVERRIDDEN, overridden=treatment)

        pairs = zip(self.plan.treatments, self.plan.parameters.values(), strict=True)
        return Plan(self.model, [kept(*pair) for pair in pairs], self.plan.symmetries)

    def _times(self) -> list[float | None]:
        given = self.options.total_time
        if given is None or isinstance(given, (int, float)):
            return [given] * len(self.trained)
        if len(given) != len(self.trained):
            raise ValueError(
                f"total_time has {len(given)} entries, and there are {len(self.trained)} optimizers: give "
                "one for each, in the trainer's order"
            )
        return list(given)

    # -- checkpoints -------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as plain values and tensors."""
        return {
            "format": _FORMAT,
            "plan": self.plan.to_json(),
            "total_steps": self.total_steps,
            "decays": [decay and described(decay, self.model) for decay in self.decays],
            "states": [decay and decay.state_dict() for decay in self.decays],
            "monitor": self.monitor and self.monitor.state_dict(),
        }

    def attach_again(self, recipe: Mapping[str, Any]) -> None:
        """Attach what the training that saved ``recipe`` had attached. The states are loaded later."""
        if len(recipe["decays"]) != len(self.trained):
            raise ValueError(
                f"the checkpoint was made with {len(recipe['decays'])} optimizers, and there are "
                f"{len(self.trained)}: build them as they were"
            )
        self.total_steps = recipe["total_steps"]
        self.decays = [
            saved and rebuilt(saved, t.optimizer, self.model, self.options.given_rule)
            for saved, t in zip(recipe["decays"], self.trained, strict=True)
        ]

    def load(self, recipe: Mapping[str, Any]) -> None:
        """Continue from the saved states of the Decays: all, or none if one does not fit."""
        pairs = list(zip(self.decays, recipe["states"], strict=True))
        for decay, state in pairs:
            if decay is not None:
                decay.check_state_dict(state)
        for decay, state in pairs:
            if decay is not None:
                decay.load_state_dict(state)

    def is_extended(self, total_steps: int | None) -> bool:
        """Return whether the training now has other steps than λ was made for, and say so if λ is kept."""
        if None in (self.total_steps, total_steps) or self.total_steps == total_steps:
            return False
        if self.options.extended == "keep":
            _logger.warning(
                "λ was made for %d steps, and the training now has %d: λ is kept. extended='anew' makes one "
                "for the steps to come",
                self.total_steps,
                total_steps,
            )
        return True

    def remove(self) -> None:
        """Detach the Decays and the monitor."""
        self.close()
        for decay in self.decays:
            if decay is not None:
                decay.remove()
        self.decays = []

    def close(self) -> None:
        """Detach the monitor and close its trackers; it still has its findings and its state."""
        if self.monitor is not None:
            self.monitor.remove()


def _after(follows: int | Callable[[int], int], done: int) -> Callable[[int], int]:
    if isinstance(follows, int):
        return lambda step: int((done + step) % follows == 0)
    return lambda step: follows(done + step)


def _optimizer_of(scheduler: Any) -> Any:
    inner = getattr(scheduler, "scheduler", scheduler)
    return unwrapped(getattr(inner, "optimizer", None))


def checked_recipe(saved: Any) -> dict[str, Any]:
    """Return what :meth:`Adoption.recipe` returned, from a checkpoint.

    Raises:
        ValueError: It is something else.
    """
    keys = {"format", "plan", "total_steps", "decays", "states", "monitor"}
    if not isinstance(saved, dict) or set(saved) != keys or saved["format"] != _FORMAT:
        raise ValueError(
            "normwise's part of the checkpoint is damaged or of another version: resume with the version "
            "that wrote it"
        )
    return saved
