"""One training run of the language model: from settings to the summary of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.data.text import Text, load_text
from normwise.lab.models.gpt import GPT, GROUPS, group_of, matrices, part, planned
from normwise.lab.runs.settings import rule_from
from normwise.lab.runs.text_settings import DECAYED, PARTS, TextSettings

__all__ = ["build", "optimizer_for", "train", "units"]

Metrics = dict[str, Any]

LINES = 40  # of metrics in a run
GLANCE = 32  # sequences of the validation part that are looked at along the way


def train(settings: TextSettings, log: Callable[[Metrics], None]) -> Metrics:
    """Carry out a run.

    Args:
        settings: What to do.
        log: Is called some 40 times with the metrics since the time before: mean training loss, learning
            rate, validation loss (on a few sequences), and for each group of matrices
            (``normwise.lab.models.gpt.GROUPS``) its mean norm (that is, RMS), effective learning rate lr/RMS
            and turn (radians).

    Returns:
        The summary, with losses in nats a character. ``status`` is "finished", "refused" (the rule refused to
        go on: ``reason`` says why) or "not finite" (the loss was not a finite number); ``step`` is where it
        ended. A finished run has train_loss (the mean over the last tenth of the steps), validation_loss,
        test_loss and the norms (RMS) by group.
    """
    text = _text(settings.data, settings.fingerprint)
    model = build(settings, len(text.characters))
    optimizer = optimizer_for(settings, model)
    glance = _sequences(text.validation, settings.context, min(GLANCE, settings.measured))
    before = _directions(model)
    losses: list[Tensor] = []
    noted = 0
    every = max(1, settings.steps // LINES)
    for step, batch in enumerate(_batches(settings, text)):
        lr = settings.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = _loss(model, batch)
        losses.append(loss.detach())
        loss.backward()
        try:
            optimizer.step()
        except ValueError as error:  # mode "explicit" refuses a coefficient that would flip the weight
            return {"status": "refused", "step": step, "reason": str(error)}
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            mean_loss = float(torch.stack(losses[noted:]).mean())
            if not math.isfinite(mean_loss):
                return _not_finite(step, f"the training loss was {mean_loss}")
            now = _directions(model)
            line = {"step": step + 1, "train_loss": mean_loss, "lr": lr}
            log(
                line
                | {"validation_loss": _measured(model, glance), "layers": _layers(model, lr, before, now)}
            )
            before, noted = now, len(losses)
    last = losses[-max(1, settings.steps // 10) :]
    found = {"train_loss": float(torch.stack(last).mean())}
    for name in ("validation", "test"):
        sequences = _sequences(getattr(text, name), settings.context, settings.measured)
        found[f"{name}_loss"] = _measured(model, sequences)
    if not all(math.isfinite(value) for value in found.values()):
        return _not_finite(settings.steps, "the final loss is not finite")
    norms = {group: _mean([_rms(w) for w in weights.values()]) for group, weights in _groups(model).items()}
    return {"status": "finished", "step": settings.steps, **found, "norms": norms}


def build(settings: TextSettings, characters: int) -> GPT:
    """Return the network at the start: the same function for all rules, rates and scales.

    Raises:
        ValueError: The settings name no known part of the network.
    """
    for field in ("scaled", "frozen"):
        if getattr(settings, field) not in PARTS:
            raise ValueError(f"{field}={getattr(settings, field)!r} is not known: choose from {PARTS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(characters, *_architecture(settings))
    with torch.no_grad():
        for weight in part(model, settings.scaled):
            weight.mul_(settings.init_scale)
    for weight in part(model, settings.frozen):
        weight.requires_grad_(False)
    return model


def optimizer_for(settings: TextSettings, model: GPT) -> Optimizer:
    """Return AdamW without a decay of its own, and the rule at work beside it on what is to be decayed."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    betas = (0.9, settings.beta2)
    optimizer = torch.optim.AdamW(trained, settings.lr, betas, weight_decay=0.0, fused=True)
    rule = rule_from(settings.rule)
    decayed = [unit for unit in units(settings, model) if all(p.requires_grad for p in unit.params)]
    if rule is not None and decayed:
        nw.Decay(optimizer, rule, decayed, mode=settings.mode, measure="rms")
    return optimizer


def units(settings: TextSettings, model: GPT) -> list[nw.Unit]:
    """Return what the rule acts on.

    Raises:
        ValueError: ``settings.decayed`` is not known.
    """
    if settings.decayed == "nothing":
        return []
    if settings.decayed == "matrices":
        return [nw.Unit(weight, dim=None) for weight in matrices(model).values()]
    if settings.decayed == "invariant":
        return planned(model.token.num_embeddings, *_architecture(settings)).apply_to(model).units
    raise ValueError(f"decayed={settings.decayed!r} is not known: choose from {', '.join(DECAYED)}")


def _architecture(settings: TextSettings) -> tuple[int, int, int, int]:
    return settings.width, settings.heads, settings.depth, settings.context


def _not_finite(step: int, reason: str) -> Metrics:
    return {"status": "not finite", "step": step, "reason": reason}


@lru_cache(maxsize=1)
def _text(name: str, fingerprint: str) -> Text:
    """Return the text, which must be on this machine already; kept, as the next run wants the same."""
    text = load_text(name, offline=True, announce=lambda line: None)
    if text.fingerprint != fingerprint:
        raise ValueError(
            f"{name} is not the text of these settings: its SHA-256 is {text.fingerprint[:12]}…, "
            f"not {fingerprint[:12]}…"
        )
    return text


def _batches(settings: TextSettings, text: Text) -> Iterator[Tensor]:
    """Yield sequences of context + 1 characters from random places, in an order of the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    reach = torch.arange(settings.context + 1)
    for _ in range(settings.steps):
        starts = torch.randint(
            len(text.train) - settings.context, (settings.batch_size,), generator=generator
        )
        yield text.train[starts[:, None] + reach]


def _sequences(ids: Tensor, context: int, count: int) -> Tensor:
    """Return ``count`` sequences of context + 1 characters, evenly spread over the part."""
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    return ids[starts[:, None] + torch.arange(context + 1)]


def _loss(model: GPT, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1])
    return cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def _measured(model: GPT, sequences: Tensor) -> float:
    losses = [_loss(model, some) * len(some) for some in sequences.split(64)]
    return float(torch.stack(losses).sum()) / len(sequences)


def _groups(model: GPT) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for name, weight in matrices(model).items():
        found[group_of(name)][name] = weight.detach()
    return found


def _rms(weight: Tensor) -> float:
    return float(nw.Unit(weight, dim=None).norms()) / math.sqrt(weight.numel())


def _directions(model: GPT) -> dict[str, Tensor]:
    return {
        name: nw.functional.weight_norm(weight.detach(), dim=None) for name, weight in matrices(model).items()
    }


def _layers(model: GPT, lr: float, before: dict[str, Tensor], now: dict[str, Tensor]) -> Metrics:
    """Mean RMS, mean effective learning rate and mean turn (radians, since the line before) by group."""
    layers = {}
    for group, weights in _groups(model).items():
        sizes = [_rms(weight) for weight in weights.values()]
        alive = [size for size in sizes if 0 < size < math.inf]  # others have no effective rate
        halves = [float((now[name] - before[name]).norm()) / 2 for name in weights]
        layers[group] = {
            "norm": _mean(alive) if alive else None,
            "effective_lr": _mean([float(nw.theory.effective_lr(lr, s, degree=1)) for s in alive])
            if alive
            else None,
            "turn": _mean([2 * math.asin(min(1.0, half)) for half in halves]),
        }
    return layers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
