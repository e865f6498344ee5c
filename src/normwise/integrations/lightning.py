"""Decay in Lightning: a callback for the Trainer. Fabric's wrappers can be given to ``plan.attach``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        "normwise.lightning needs Lightning 2.2 or later: pip install 'normwise[lightning]'"
    ) from error

from normwise.decay.rules import Rule
from normwise.decay.wrappers import unwrapped
from normwise.integrations.adoption import Adoption, Options, Trained, checked_recipe, plan_for
from normwise.integrations.batches import first_batches
from normwise.integrations.monitoring import LoggerTracker
from normwise.planning.plan import Plan

__all__ = ["DecayCallback"]


class DecayCallback(Callback):  # type: ignore[misc]
    """Decays what is scale-invariant, with nothing to tune, in a training by Lightning's Trainer.

    When the fit begins, the callback makes a plan from the first batches of the training data (on rank 0; the
    random state stays as it is), takes weight_decay off the weights that a rule takes, and attaches Adaptive
    Weight Shrink for the Trainer's own schedule and number of steps (:meth:`normwise.Plan.attach`). All that
    it needs is in the Trainer's checkpoint: ``trainer.fit(..., ckpt_path=...)`` goes on as if there had been
    no interruption.

    Args:
        plan: The plan, if you have one; needed where the model is sharded when the fit begins.
        rule: A rule instead, such as ``nw.L2(0.1)``, for the units of the plan; or the class of a rule whose
            coefficient ``plan.attach`` shall choose.
        weight_decay: The optimizer's weight_decay for what is not scale-invariant: weights get this, gains
            and biases 0. None leaves them as they are.
        total_steps: The number of optimizer steps. None asks the Trainer, which knows it unless the data have
            no length or the optimization is manual.
        total_time: Σ lr over all steps, instead of the schedule; for several optimizers one for each.
        forward: A function (model, batch) → outputs, to make the plan with. None calls the model as
            :func:`normwise.find_invariances` does and, if that fails, takes the loss of ``training_step``.
        adopt: Whether to begin with a checkpoint that was made without this callback.
        extended: What to do where a resumed training has other steps than λ was made for: "keep" λ, or make
            it "anew" for the steps to come.
        monitor: Observe every so many steps, and give what is seen to the trainer's loggers and what is wrong
            to the log; None for no monitor.
        settings: Further arguments of ``plan.attach``; with a ``rule``, of :class:`normwise.Decay`.

    Attributes:
        plan: The plan, from the beginning of the fit on.
        decays: The Decays, one for each optimizer that holds scale-invariant weights.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed. When the fit begins: the number of steps, the schedule or the
            data cannot be used, or the checkpoint was made otherwise; the message says what to give.
    """

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        rule: Rule | type[Rule] | None = None,
        weight_decay: float | None = None,
        total_steps: int | None = None,
        total_time: float | Sequence[float] | None = None,
        forward: Callable[..., Any] | None = None,
        adopt: bool = False,
        extended: str = "keep",
        monitor: int | None = 50,
        **settings: Any,
    ) -> None:
        self.options = Options(
            plan, rule, weight_decay, total_steps, total_time, forward, adopt, extended, monitor, settings
        )
        self._adoption: Adoption | None = None
        self._recipe: dict[str, Any] | None = None
        self._from_checkpoint = False

    @property
    def plan(self) -> Plan | None:
        """The plan, from the beginning of the fit on."""
        return self.options.plan if self._adoption is None else self._adoption.plan

    @property
    def decays(self) -> list[Any]:
        """The Decays, from the beginning of the fit on."""
        return [] if self._adoption is None else [d for d in self._adoption.decays if d is not None]

    @property
    def monitor(self) -> Any:
        """The monitor, from the beginning of the fit on; or None."""
        return None if self._adoption is None else self._adoption.monitor

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what the Trainer puts into its checkpoint."""
        return self._recipe or {} if self._adoption is None else self._adoption.recipe()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` has put into a checkpoint; the fit attaches it."""
        self._recipe = checked_recipe(state_dict)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the fit resumes a training."""
        self._from_checkpoint, self._recipe = True, None

    # -- the fit -----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, before the Trainer restores the states of its optimizers."""
        if self._adoption is not None:
            self._adoption.remove()
            self._adoption = None
        if not _restores_late(trainer):
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Attach what the options or the checkpoint say."""
        if not self._from_checkpoint:
            self._recipe = None
        elif self._recipe is None:
            if not self.options.adopt:
                raise ValueError(
                    "the checkpoint was made without DecayCallback, so its weights have been decayed "
                    "otherwise: give adopt=True to begin with it now, or leave the callback out"
                )
            return  # when the states are restored, as the saved groups are not split
        if self._recipe is not None:
            self._prepare(trainer, module, Plan.from_json(self._recipe["plan"], module))
            assert self._adoption is not None
            self._adoption.attach_again(self._recipe)
            return
        steps = self._total_steps(trainer, module)
        self._prepare(trainer, module, self._planned(trainer, module))
        assert self._adoption is not None
        self._adoption.attach(steps)
        self._watch(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the monitor's trackers."""
        if self._adoption is not None:
            self._adoption.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of the Decays; begin where a training is adopted or extended."""
        if _restores_late(trainer):
            self._begin(trainer, pl_module)
        resumed, self._from_checkpoint = self._from_checkpoint, False
        if not resumed:
            return
        if self._adoption is None:
            self._prepare(trainer, pl_module, self._planned(trainer, pl_module))
            self._attach_to_the_rest(trainer, pl_module)
            self._watch(trainer)
            return
        assert self._recipe is not None
        self._adoption.load(self._recipe)
        if self._adoption.total_steps is not None:
            extended = self._adoption.is_extended(self._total_steps(trainer, pl_module))
            if extended and self.options.extended == "anew":
                self._adoption.remove()
                self._attach_to_the_rest(trainer, pl_module)
        self._watch(trainer, self._recipe["monitor"])

    def _watch(self, trainer: Trainer, state: Any = None) -> None:
        assert self._adoption is not None
        self._adoption.watch([LoggerTracker([logger.log_metrics for logger in trainer.loggers])], state)

    def _prepare(self, trainer: Trainer, module: LightningModule, plan: Plan) -> None:
        self._adoption = Adoption(module, self._trained(trainer, module), plan, self.options)
        self._adoption.take_weight_decay_off([config.scheduler for config in trainer.lr_scheduler_configs])
        if _restores_late(trainer):
            for split in self._adoption.splits:
                split.merge_in_states()

    def _attach_to_the_rest(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._adoption is not None
        steps, done = self._total_steps(trainer, module), trainer.global_step
        self._adoption.attach_to_the_rest(steps, done)

    def _planned(self, trainer: Trainer, module: LightningModule) -> Plan:
        """Return the plan: that of the user, or one made on rank 0."""
        if self.options.plan is not None:
            return self.options.plan
        trainer.fit_loop.setup_data()  # does nothing if it is done
        text: str | None = None
        problem: Exception | None = None
        if trainer.global_rank == 0:
            try:
                text = self._new_plan(trainer, module).to_json()
            except Exception as error:  # the other ranks wait for it
                problem = error
        text, reason = trainer.strategy.broadcast((text, problem and str(problem)), src=0)
        if text is None:
            raise problem if problem is not None else RuntimeError(f"on rank 0: {reason}")
        return Plan.from_json(text, module)

    def _new_plan(self, trainer: Trainer, module: LightningModule) -> Plan:
        batches = [trainer.strategy.batch_to_device(batch) for batch in _batches(trainer.train_dataloader)]
        ways: list[tuple[str, Callable[..., Any] | None]] = []
        if self.options.forward is not None:
            ways.append(("forward=", self.options.forward))
        else:
            if is_overridden("forward", module, LightningModule):
                ways.append(("the outputs of forward", None))
            if module.automatic_optimization:
                ways.append(("the loss of training_step", _loss_of_training_step))
        if not ways:
            raise ValueError(
                "the module has no forward, and its optimization is manual: give forward=, a function "
                "(model, batch) → outputs, or plan=nw.plan(model, batches)"
            )
        with _without_logging(module):
            return plan_for(module, batches, ways)

    # -- what the Trainer knows --------------------------------------------------------------------------

    def _total_steps(self, trainer: Trainer, module: LightningModule) -> int | None:
        options = self.options
        if options.total_steps is not None:
            return options.total_steps
        if options.total_time is not None or options.given_rule is not None:
            return None
        if not module.automatic_optimization:
            raise ValueError(
                "with manual optimization the Trainer does not know the number of steps: give total_steps=, "
                "for a constant rate, or total_time=, the sum of the learning rates over all steps"
            )
        try:
            steps = trainer.estimated_stepping_batches
        except MisconfigurationException as error:
            raise ValueError(
                f"the Trainer does not know the number of steps ({error}): give total_steps="
            ) from error
        if not math.isfinite(steps) or steps < 1:
            raise ValueError(
                "the number of steps is unknown, as the data have no length or the training no end: give "
                "Trainer(max_steps=...), or total_steps= of this callback"
            )
        return int(steps)

    def _trained(self, trainer: Trainer, module: LightningModule) -> list[Trained]:
        needs_schedule = self.options.total_time is None and self.options.given_rule is None
        trained = []
        for k, optimizer in enumerate(map(unwrapped, trainer.optimizers)):
            configs = [
                c for c in trainer.lr_scheduler_configs if unwrapped(c.scheduler.optimizer) is optimizer
            ]
            follows: int | Callable[[int], int] = 1
            if configs and needs_schedule:
                if len(configs) > 1 or not module.automatic_optimization:
                    why = "several schedules" if len(configs) > 1 else "a schedule that training_step steps"
                    raise ValueError(
                        f"optimizer {k} has {why}, so its learning rates are unknown: give total_time=, "
                        "their sum over all steps"
                    )
                follows = _follows(trainer, configs[0])
            scheduler = configs[0].scheduler if configs else None
            trained.append(Trained(optimizer, scheduler, follows))
        return trained


def _restores_late(trainer: Trainer) -> bool:
    """Return whether the Trainer restores everything together, after ``on_fit_start``: sharded models."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def _follows(trainer: Trainer, config: Any) -> Callable[[int], int]:
    """Return the function that says whether the Trainer steps a schedule after so many optimizer steps."""
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    if math.isinf(batches):
        if config.interval == "epoch":
            raise ValueError(
                "the schedule steps once per epoch, and the data have no length: give total_time=, the sum "
                'of the learning rates over all steps, or let the schedule step with "interval": "step"'
            )
        return lambda step: int(step * accumulated % config.frequency == 0)
    per_epoch = math.ceil(batches / accumulated)

    def follows(step: int) -> int:
        epoch, place = divmod(step - 1, per_epoch)
        if config.interval == "step":
            batch = min((place + 1) * accumulated, batches)
            return int(batch % config.frequency == 0)
        return int(place + 1 == per_epoch and (epoch + 1) % config.frequency == 0)

    return follows


def _batches(loaders: Any) -> list[Any]:
    """Return first batches, in the structure of loaders that the Trainer combines."""
    if isinstance(loaders, Mapping):
        several = {name: _batches(loader) for name, loader in loaders.items()}
        return [dict(zip(several, batch, strict=True)) for batch in zip(*several.values(), strict=False)]
    if isinstance(loaders, (list, tuple)):
        return [list(batch) for batch in zip(*map(_batches, loaders), strict=False)]
    return first_batches(loaders)


def _loss_of_training_step(model: nn.Module, batch: Any) -> Tensor:
    loss = model.training_step(batch, 0)  # type: ignore[operator]
    found = loss["loss"] if isinstance(loss, Mapping) else loss
    if not isinstance(found, Tensor):
        raise TypeError(f"training_step returned {type(found).__name__}, and no loss")
    return found


@contextmanager
def _without_logging(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing: no loop is there yet that it could log to."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    names = ("log", "log_dict")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, nothing))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the module's own code, which will say them again
            yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)
