r"""The undecayed run that turns every unit exactly as a decayed run did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.decay.rules import Rule
from normwise.theory._arguments import check_degree, check_mode, check_momentum, check_rule, wide

__all__ = ["UndecayedSteps", "without_decay"]


class UndecayedSteps(NamedTuple):
    """The steps of the undecayed run; see :func:`without_decay`. All tensors are float64.

    Attributes:
        lr: (T, units). The step sizes.
        momentum: (T, units). The factor of the buffer before the gradient is added.
        scale: (T + 1, units). a_t: the ratio of decayed to undecayed weights before step t; a_0 = 1.
        ratio: (T, units). a_t/a_{t−1}, and 1 in the first step. It multiplies β₁, and its square β₂.
    """

    lr: Tensor
    momentum: Tensor
    scale: Tensor
    ratio: Tensor


def without_decay(
    lrs: Tensor | Sequence[float],
    rule: Rule,
    norms: Tensor,
    momentum: float = 0.0,
    mode: str = "flow",
    degree: int = 2,
    times: Tensor | Sequence[float] | None = None,
) -> UndecayedSteps:
    r"""Return the undecayed steps that turn every unit exactly as a decayed run did.

    A rule moves a unit along its ray only, and a scale-invariant loss does not change along a ray. So the
    weights of a decayed run are w_t = a_t·v_t. Here a_t > 0 is one number per unit, and v_t are the weights
    of a run without decay that starts from v_0 = w_0 and takes the step sizes and momenta that this function
    returns. (Li & Arora, arXiv 1910.07454, for coupled L2 with a constant learning rate; here any rule and
    schedule.)

    With f_t the factor by which the rule shrank the unit in step t, a_0 = 1 and a_{t+1} = f_t·a_t:

    - "flow": step lr_t/a_t², momentum μ·a_t/a_{t−1};
    - "explicit": step lr_t/(a_t·a_{t+1}), momentum μ·a_t/a_{t−1};
    - "coupled": step lr_t/(a_t·a_{t+1}), momentum μ. Here the scale itself takes SGD steps, with a buffer
      that starts at 0: d_t = μ·d_{t−1} + c(n_t)·a_t, a_{t+1} = a_t − lr_t·d_t. (For lr_t > 0 this equals
      a_{t+1} = (1 + m_t − lr_t·c(n_t))·a_t − m_t·a_{t−1} with m_t = μ·lr_t/lr_{t−1}.)

    Replay SGD (heavy ball: no Nesterov, no dampening) per unit, from ``buffer = 0``::

        buffer = steps.momentum[t] * buffer + gradient(v)
        v = v - steps.lr[t] * buffer

    With ``degree=1`` the step is lr_t/a_t ("flow") or lr_t/a_{t+1} ("explicit"). Replay Adam with the β₁ and
    β₂ of the decayed run (with ``momentum=β₁``, ``steps.momentum`` is β₁·ratio)::

        first = beta1 * steps.ratio[t] * first + (1 - beta1) * gradient(v)
        second = beta2 * steps.ratio[t] ** 2 * second + (1 - beta2) * gradient(v) ** 2
        denominator = (second / (1 - beta2 ** (t + 1))).sqrt() + eps * steps.scale[t]
        v = v - steps.lr[t] * first / (1 - beta1 ** (t + 1)) / denominator

    Replay an update that depends only on the direction of a buffer (sign, Muon) as SGD, with ``degree=1`` and
    the function applied to the buffer.

    The replay is exact except for rounding. In each decayed parameter all units must be scale-invariant;
    undecayed parameters keep their steps. Where training is chaotic, rounding errors grow as any other
    perturbation does: compare with a run perturbed by one unit in the last place. The weights of the replay
    grow as 1/a_t, so it ends where 1/a_t² overflows (float64: λ·Σlr ≈ 350 for L2).

    Args:
        lrs: Learning rate of each step, zero or positive, shape (T,).
        rule: The rule, with a constant or a scheduled coefficient (then step t uses ``rule.at(t)``).
        norms: The norms to which the rule was applied in each step of the decayed run, positive, shape
            (T, units), or (T,) for one unit. "flow": the norms after the gradient step, before the shrink;
            "explicit" and "coupled": the norms at the start of the step. With ``measure="rms"``: the RMS.
        momentum: μ of SGD, or β₁.
        mode: "flow", "explicit" or "coupled", as in Decay. "coupled" only with ``degree=2``.
        degree: 2 for SGD, 1 for Adam-like optimizers.
        times: The time of each step, shape (T,), if the clock is not "lr".

    Returns:
        An :class:`UndecayedSteps` of float64 tensors, with the dimensions of ``norms``.

    Raises:
        TypeError: ``rule`` is not a rule, or another argument is not a number.
        ValueError: A number is out of range or a shape does not fit; the mode cannot apply the rule; or at
            some step the scale is no longer positive (the decay flips the weight, which no undecayed run
            does) or the step size overflows.

    Example:
        >>> from normwise import L2
        >>> steps = without_decay([0.1, 0.1], L2(5.0), torch.ones(2, 1), mode="explicit")
        >>> steps.lr.flatten()  # lr·(1 − lr·λ)^−(2t+1)
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    mode, degree, momentum = check_mode(mode), check_degree(degree), check_momentum(momentum)
    rule = check_rule(rule, mode, degree)
    if not rule.function_of_norm:
        raise ValueError(
            f"rule={rule} scales the updates too, so the norms do not determine its steps: give another rule"
        )
    norms = wide("norms", norms)
    if norms.ndim == 0:
        raise ValueError("norms has no dimension for the steps: give a tensor of shape (T, units) or (T,)")
    if times is not None and mode == "coupled":
        raise ValueError('times was given, but mode="coupled" has no clock: leave it out')
    lr = _per_step("lrs", lrs, norms)
    time = lr if times is None else _per_step("times", times, norms)

    scales = [torch.ones_like(norms[0])] if len(norms) else [norms.new_ones(norms.shape[1:])]
    pull = torch.zeros_like(scales[0])  # the radial part of the momentum buffer, in units of v
    for step, norm in enumerate(norms):
        now = rule.at(step)
        if mode == "coupled":
            pull = momentum * pull + now.rate(norm) * scales[-1]
            scale = scales[-1] - lr[step] * pull
        else:
            kept = now.flow(norm, time[step]) / norm if mode == "flow" else 1 - time[step] * now.rate(norm)
            scale = scales[-1] * kept
        if not bool((scale > 0).all()):
            raise ValueError(
                f"norms: at step {step} the decay of a unit of norm {norm[~(scale > 0)][0].item():g} leaves "
                f"a scale of {scale.min().item():g}, and no undecayed run flips a weight: replay fewer "
                "steps, or decay less"
            )
        scales.append(scale)
    scale = torch.stack(scales)
    ratio = torch.cat([torch.ones_like(scale[:1]), scale[1:-1] / scale[:-2]])[: len(norms)]
    # "flow" shrinks after the gradient step, the other modes before or in it.
    step_size = lr / (scale[:-1] if mode == "flow" else scale[1:]) / (scale[:-1] if degree == 2 else 1)
    if not bool(torch.isfinite(step_size).all()):
        step = int((~torch.isfinite(step_size)).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"norms: at step {step} the undecayed step size overflows, as the scale is down to "
            f"{scale[step].min().item():g}: replay fewer steps"
        )
    kept_buffer = torch.ones_like(ratio) if mode == "coupled" else ratio
    return UndecayedSteps(step_size, momentum * kept_buffer, scale, ratio)


def _per_step(name: str, values: Tensor | Sequence[float], norms: Tensor) -> Tensor:
    """Return one value per step, with dimensions that broadcast against ``norms``."""
    tensor = wide(name, values, zero=True).to(norms.device)
    if tensor.shape != norms.shape[:1]:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)} and norms {tuple(norms.shape)}: "
            f"give a value for each of the {len(norms)} steps in norms"
        )
    return tensor.view(-1, *[1] * (norms.ndim - 1))
