"""Decay in transformers: a callback for the Trainer."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "normwise.transformers needs transformers 4.44 or later: pip install 'normwise[hf]'"
    ) from error

from normwise.decay.rules import Rule
from normwise.decay.wrappers import unwrapped
from normwise.integrations.adoption import Adoption, Options, Trained, checked_recipe, plan_for
from normwise.integrations.batches import first_batches, on_device
from normwise.integrations.groups import GroupSplit
from normwise.integrations.monitoring import LoggerTracker
from normwise.integrations.ranks import made_on_rank_0
from normwise.planning.plan import Plan

__all__ = ["DecayCallback"]


class DecayCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Decays what is scale-invariant, with nothing to tune, in a training by transformers' Trainer.

    When the training begins, the callback makes a plan from the first batches of the training data (on rank
    0; the random state stays as it is), takes weight_decay off the weights that a rule takes, and attaches
    Adaptive Weight Shrink for the Trainer's own schedule and number of steps
    (:meth:`normwise.Plan.attach`). All that it needs is in the Trainer's checkpoints:
    ``trainer.train(resume_from_checkpoint=...)`` goes on as if there had been no interruption.

    Args:
        plan: The plan, if you have one; needed where the model is sharded when the training begins.
        rule: A rule instead, such as ``nw.L2(0.1)``, for the units of the plan; or the class of a rule whose
            coefficient ``plan.attach`` shall choose.
        weight_decay: The optimizer's weight_decay for what is not scale-invariant: weights get this, gains
            and biases 0. None leaves them as they are.
        total_steps: The number of optimizer steps. None asks the Trainer.
        total_time: Σ lr over all steps, instead of the schedule.
        forward: A function (model, batch) → outputs, to make the plan with. None calls ``model(**batch)``.
        adopt: Whether to begin with a checkpoint that was made without this callback.
        extended: What to do where a resumed training has other steps than λ was made for: "keep" λ, or make
            it "anew" for the steps to come.
        lost: Only for the Trainer itself: what it would lose by building this callback anew.
        monitor: Observe every so many steps, and give what is seen to the trainer's loggers and what is wrong
            to the log; None for no monitor.
        settings: Further arguments of ``plan.attach``; with a ``rule``, of :class:`normwise.Decay`.

    Attributes:
        plan: The plan, from the beginning of the training on.
        decays: The Decay, in a list; empty if nothing is scale-invariant.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed. When the training begins: the schedule or the data cannot be
            used, or the checkpoint was made otherwise; the message says what to give.
    """

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        rule: Rule | type[Rule] | None = None,
        weight_decay: float | None = None,
        total_steps: int | None = None,
        total_time: float | None = None,
        forward: Callable[..., Any] | None = None,
        adopt: bool = False,
        extended: str = "keep",
        monitor: int | None = 50,
        lost: list[str] | None = None,
        **settings: Any,
    ) -> None:
        if lost:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True builds DecayCallback anew and would lose its "
                f"{', '.join(lost)}: leave it False; the callback restores itself"
            )
        given: dict[str, Any] = {
            "plan": plan,
            "rule": rule,
            "weight_decay": weight_decay,
            "total_steps": total_steps,
        }
        given |= {"total_time": total_time, "forward": forward, "adopt": adopt or None, **settings}
        given |= {"extended": None if extended == "keep" else extended}
        given |= {"monitor": None if monitor == 50 else str(monitor)}
        self._given = [name for name, value in given.items() if value is not None]
        self.options = Options(
            plan, rule, weight_decay, total_steps, total_time, forward, adopt, extended, monitor, settings
        )
        self._adoption: Adoption | None = None
        self._splits: list[GroupSplit] = []
        self._was_asked = False

    @property
    def plan(self) -> Plan | None:
        """The plan, from the beginning of the training on."""
        return self.options.plan if self._adoption is None else self._adoption.plan

    @property
    def decays(self) -> list[Any]:
        """The Decay, from the beginning of the training on."""
        return [] if self._adoption is None else [d for d in self._adoption.decays if d is not None]

    @property
    def monitor(self) -> Any:
        """The monitor, from the beginning of the training on; or None."""
        return None if self._adoption is None else self._adoption.monitor

    def state(self) -> dict[str, Any]:
        """Return what the Trainer puts into its checkpoint."""
        self._was_asked = True
        attributes = {} if self._adoption is None else {"recipe": _packed(self._adoption.recipe())}
        return {"args": {"lost": self._given} if self._given else {}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Attach, or attach again what the checkpoint says."""
        model, scheduler, name = parts["model"], parts["lr_scheduler"], type(self).__name__
        optimizer = unwrapped(parts["optimizer"])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"the Trainer's optimizer is a {type(optimizer).__name__}, which is no "
                "torch.optim.Optimizer: leave DecayCallback out (DeepSpeed steps its weights by itself)"
            )
        if self._adoption is not None:  # a second train()
            self._adoption.remove()
            self._adoption = None
        self._was_asked = False
        saved = state.stateful_callbacks.get(name) if state.global_step else None
        if isinstance(saved, list):
            raise ValueError(f"the Trainer has several {name}s: give one")
        packed = None if saved is None else saved.get("attributes", {}).get("recipe")
        state.stateful_callbacks.setdefault(name, {})  # the Trainer expects an entry when it saves
        trained = [Trained(optimizer, scheduler)]
        if packed is not None:
            recipe = _unpacked(packed)
            self._begin(model, trained, Plan.from_json(recipe["plan"], model))
            assert self._adoption is not None
            self._adoption.attach_again(recipe)
            self._adoption.load(recipe)
            if self._adoption.is_extended(state.max_steps) and self.options.extended == "anew":
                self._adoption.remove()
                self._adoption.attach_to_the_rest(state.max_steps, state.global_step)
        else:
            if state.global_step and not self.options.adopt:
                raise ValueError(
                    "the checkpoint was made without DecayCallback, so its weights have been decayed "
                    "otherwise: give adopt=True to begin with it now, or leave the callback out"
                )
            self._begin(model, trained, self._planned(model, parts["train_dataloader"]))
            assert self._adoption is not None
            self._adoption.attach_to_the_rest(self.options.total_steps or state.max_steps, state.global_step)
        self._adoption.watch(_trackers(args), None if packed is None else recipe["monitor"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Write what a Trainer before 4.46 does not ask for when it saves."""
        asked, self._was_asked = self._was_asked, False
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json"
        if self._adoption is not None and not asked and state.is_world_process_zero and path.exists():
            state.stateful_callbacks[type(self).__name__] = self.state()
            state.save_to_json(str(path))
            self._was_asked = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Close the monitor's trackers."""
        if self._adoption is not None:
            self._adoption.close()

    def _begin(self, model: nn.Module, trained: list[Trained], plan: Plan) -> None:
        schedulers = [t.scheduler for t in trained]
        for split in self._splits:
            if split.optimizer is trained[0].optimizer:
                split.hide_from(schedulers)  # in a second train(), with a scheduler for the split groups
        self._adoption = Adoption(model, trained, plan, self.options)
        self._adoption.take_weight_decay_off(schedulers)
        for split in self._adoption.splits:
            if split.changes:
                split.merge_in_states()  # the Trainer loads them into groups that are not split yet
                self._splits.append(split)

    def _planned(self, model: nn.Module, loader: Any) -> Plan:
        if self.options.plan is not None:
            return self.options.plan

        def make() -> str:
            batches = on_device(first_batches(loader), next(model.parameters()).device)
            return plan_for(model, batches, [("the model's outputs", self.options.forward)]).to_json()

        return Plan.from_json(made_on_rank_0(make), model)


def _trackers(args: TrainingArguments) -> list[Any]:
    """Return trackers for the loggers that the Trainer reports to, of those that take numbers from others."""
    log: list[Callable[[dict[str, float], int], Any]] = []
    if "wandb" in args.report_to:
        import wandb

        run = wandb.run
        if run is not None:
            log.append(lambda values, step: run.log({**values, "normwise/step": step}))
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(getattr(args, "logging_dir", None) or Path(args.output_dir) / "runs")
        writer = SummaryWriter(folder / "normwise")

        def write(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        log.append(write)
    return [LoggerTracker(log)]


def _packed(recipe: dict[str, Any]) -> str:
    """Return a recipe as text, as the Trainer saves JSON."""
    buffer = io.BytesIO()
    torch.save(recipe, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _unpacked(text: Any) -> dict[str, Any]:
    try:
        buffer = io.BytesIO(base64.b64decode(text, validate=True))
        saved = torch.load(buffer, weights_only=True, map_location="cpu")
    except (TypeError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"normwise's part of trainer_state.json is damaged ({error}): restore the file"
        ) from error
    return checked_recipe(saved)
