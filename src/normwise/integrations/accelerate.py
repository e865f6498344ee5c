"""Decay with Accelerate, in one call. Its wrappers can also be given to ``plan.attach``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "normwise.accelerate needs Accelerate 0.34 or later: pip install 'normwise[hf]'"
    ) from error

from normwise.decay.decay import Decay
from normwise.decay.rules import Rule
from normwise.integrations.adoption import Adoption, Options, Trained, plan_for
from normwise.integrations.batches import first_batches, on_device
from normwise.integrations.ranks import made_on_rank_0
from normwise.planning.plan import Plan

__all__ = ["attach"]


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any = None,
    *,
    scheduler: Any = None,
    total_steps: int | None = None,
    total_time: float | None = None,
    plan: Plan | None = None,
    rule: Rule | type[Rule] | None = None,
    weight_decay: float | None = None,
    forward: Callable[..., Any] | None = None,
    **settings: Any,
) -> Decay | None:
    """Decay what is scale-invariant, with nothing to tune, in a training with Accelerate.

    Makes a plan from the first batches of the loader (on rank 0; the random state stays as it is), takes
    weight_decay off the weights that a rule takes, attaches Adaptive Weight Shrink
    (:meth:`normwise.Plan.attach`), and registers it for ``accelerator.save_state`` and ``load_state``. Call
    it after ``accelerator.prepare`` and before ``load_state``.

    Args:
        accelerator: The Accelerator.
        model: The prepared model.
        optimizer: The prepared optimizer.
        loader: The prepared loader, to make the plan from; not needed with ``plan``.
        scheduler: The learning-rate schedule, prepared or not; needed with ``total_steps``, and where it is
            not prepared.
        total_steps: The number of optimizer steps to come.
        total_time: Σ lr over these steps, instead of both.
        plan: The plan, if you have one; needed where ``prepare`` has sharded the model.
        rule: A rule instead, such as ``nw.L2(0.1)``, for the units of the plan; or the class of a rule whose
            coefficient ``plan.attach`` shall choose.
        weight_decay: The optimizer's weight_decay for what is not scale-invariant: weights get this, gains
            and biases 0. None leaves them as they are.
        forward: A function (model, batch) → outputs, to make the plan with.
        settings: Further arguments of ``plan.attach``; with a ``rule``, of :class:`normwise.Decay`.

    Returns:
        The Decay; None, and a line in the log, if nothing is scale-invariant.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The schedule or the data cannot be used; the message says what to give.
    """
    options = Options(plan, rule, weight_decay, total_steps, total_time, forward, settings=settings)
    inner = accelerator.unwrap_model(model)
    if plan is None:
        if loader is None:
            raise ValueError("loader is missing: give the prepared loader, or plan=")

        def make() -> str:
            batches = on_device(first_batches(loader), next(inner.parameters()).device)
            return plan_for(inner, batches, [("the model's outputs", forward)]).to_json()

        plan = Plan.from_json(made_on_rank_0(make), inner)
    adoption = Adoption(inner, [Trained(optimizer, scheduler)], plan, options)
    prepared = list(accelerator._schedulers)
    adoption.take_weight_decay_off(prepared if scheduler is None else [scheduler, *prepared])
    adoption.attach(total_steps)
    (decay,) = adoption.decays
    if decay is not None:
        accelerator.register_for_checkpointing(decay)
    return decay
