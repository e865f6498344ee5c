"""Training of one of the paper's networks on images, on any device, with checkpoints inside the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normwise as nw
from normwise.lab.data.catalog import load_images
from normwise.lab.engine.run import Log, Metrics, Run
from normwise.lab.engine.store import CHECKPOINT, naming_errors
from normwise.lab.models.networks import build_network, filters, scale_filters
from normwise.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from normwise.lab.runs.devices import (
    DEFAULT,
    Execution,
    available_memory,
    device_named,
    fabric_for,
    is_out_of_memory,
)
from normwise.lab.runs.feeds import Batch, Feed, feed, generator_of
from normwise.lab.runs.memory import Footprint, footprint
from normwise.norms import slice_norms

__all__ = ["OPTIMIZERS", "OWN", "PRECISIONS", "RULES", "SCHEDULES", "Footing", "NetworkRun", "Seen"]

RULES = ("none", "l2", "l2-filters", "aws", "aws-tuned", "epsilon")
OWN = ("l2-filters", "aws", "aws-tuned", "epsilon")  # rules that act on the filters alone
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "steps")
PRECISIONS = ("float32", "bf16")
Seen = Callable[[int, int, Metrics], None]
"""Called after each step with the steps done, all steps, and the last line of metrics ({}: none yet)."""


@dataclass(frozen=True, kw_only=True)
class NetworkRun(Run):
    """Train a network of ``normwise.lab.models.networks`` as the paper does, and evaluate it.

    Attributes:
        data: Name of the data set (``normwise.lab.data.catalog.CATALOG``).
        fingerprint: SHA-256 of its content.
        network: Name of the network.
        member: How the convolutions are normalised (``normwise.lab.models.convnet.MEMBERS``).
        batch_norm: Whether a batch norm follows each convolution.
        width: Channels of the first stage; 0: as published.
        rule: The decay. "none": none at all. "l2": the usual recipe, ``coefficient`` on every parameter
            through the optimizer's ``weight_decay``. "l2-filters": L2 on the filters alone, by its flow, with
            ``coefficient``. "aws": Adaptive Weight Shrink on every filter with nothing tuned, from
            equilibrium (``normwise.attach``). "aws-tuned": the same rule with
            ``coefficient``, from the norms as they are. "epsilon": the ε-shifted L2 of arXiv 1911.05920 with
            ``coefficient`` and ``epsilon``, added to the gradient.
        coefficient: See ``rule``.
        epsilon: See ``rule``.
        weight_decay: L2 on the matrices that are not scale-invariant, under the rules that act on filters.
        optimizer: "sgd" or "adamw" (β₂ = 0.999).
        lr: Peak learning rate.
        momentum: Momentum of SGD, or β₁ of AdamW.
        schedule: "cosine", from ``lr`` towards zero, or "steps", times 0.1 at the epochs ``drops``.
        drops: See ``schedule``.
        epochs: Passes over the training images.
        batch_size: Images per step. An incomplete last batch of an epoch is dropped.
        augment: Whether training images are cropped and flipped at random.
        image_size: Height and width of pictures from a folder; other images keep their own.
        train_size: Number of training images; 0: all.
        validation_size: Training images that are held out, to choose hyper-parameters.
        init_scale: Factor on the initial weights of convolutions, which changes no output.
        evaluate_every: Epochs from one evaluation on the held-out images to the next. The last epoch has one.
        precision: "float32" or "bf16" (autocast).
        seed: Seed of the initial weights, the split, the order and the augmentation.
    """

    data: str
    fingerprint: str
    network: str = "resnet20"
    member: str = "weight_norm"
    batch_norm: bool = True
    width: int = 0
    rule: str = "aws"
    coefficient: float = 5e-4
    epsilon: float = 1e-3
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    schedule: str = "cosine"
    drops: tuple[int, ...] = ()
    epochs: int = 200
    batch_size: int = 128
    augment: bool = True
    image_size: int = 224
    train_size: int = 0
    validation_size: int = 0
    init_scale: float = 1.0
    evaluate_every: int = 1
    precision: str = "float32"

    def check(self) -> None:
        """Raise a ValueError that names the first setting that is not possible."""
        for option, value, known in (
            ("rule", self.rule, RULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"--{option} {value} is not known: choose from {', '.join(known)}")
        counts = (
            ("epochs", self.epochs),
            ("batch", self.batch_size),
            ("evaluate-every", self.evaluate_every),
        )
        for option, number in counts:
            if number < 1:
                raise ValueError(f"--{option} {number} is not possible: give 1 or more")
        for option, real in (("lr", self.lr), ("init-scale", self.init_scale)):
            if not 0 < real < math.inf:
                raise ValueError(f"--{option} {real} is not possible: give a positive number")
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"--coefficient {self.coefficient} is not possible: give 0 or more")
        plain = self.member == "plain" and not self.batch_norm
        if plain and (self.rule in OWN or self.init_scale != 1):
            raise ValueError(
                f"--rule {self.rule} is not possible for --member plain without batch norm, where no weight "
                "is scale-invariant: give none or l2, and --init-scale 1"
            )
        if self.schedule == "steps" and not self.drops:
            raise ValueError("--schedule steps needs the epochs at which the rate falls: give --drops")

    @property
    def cost(self) -> float:
        """Rough number of seconds on one core, by a ResNet-20 at 28×28: 0.35 to 0.7 s for 128 images."""
        return 0.5 / 128 * self.epochs * (self.train_size or 60_000)

    def steps(self, train_size: int) -> int:
        """Return the number of optimizer steps for so many training images."""
        return self.epochs * (train_size // self.batch_size)

    @property
    def total_time(self) -> float:
        """Σ lr over all steps.

        Raises:
            ValueError: ``train_size`` is 0, so that the number of steps is not known before the data are.
        """
        if not self.train_size:
            raise ValueError("train_size=0 does not say how many steps there are: give the number of images")
        steps = self.steps(self.train_size)
        return sum(self.lr_at(step, steps) for step in range(steps))

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step.

        Example:
            >>> run = NetworkRun(data="", fingerprint="", schedule="steps", drops=(30, 60), epochs=90)
            >>> [round(run.lr_at(step, 900), 6) for step in (0, 299, 300, 600)]
            [0.1, 0.1, 0.01, 0.001]
        """
        if self.schedule == "steps":
            epoch = step * self.epochs // steps
            return self.lr * 0.1 ** sum(epoch >= drop for drop in self.drops)
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / steps))

    def build(self, classes: int, channels: int, member: str | None = None) -> nn.Module:
        """Return the initial network. Its function is the same for every rule and ``init_scale``."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(generator_of(self.seed).get_state())
            network = build_network(
                self.network,
                classes=classes,
                channels=channels,
                member=member or self.member,
                batch_norm=self.batch_norm,
                **({"width": self.width} if self.width else {}),
            )
        if self.init_scale != 1:
            scale_filters(network, self.init_scale)
        return network

    def make_optimizer(self, network: nn.Module, total_time: float) -> Optimizer:
        """Return the optimizer with the decay attached.

        Args:
            network: The network, on its device.
            total_time: Σ lr over all steps.
        """
        decayed = {id(weight): weight for weight in filters(network).values()}
        others = [p for p in network.parameters() if id(p) not in decayed]
        matrices = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
        which = {id(weight) for weight in matrices}
        recipe = self.coefficient if self.rule == "l2" else 0.0
        rest = self.weight_decay if self.rule in OWN else recipe
        groups = [
            {"params": list(decayed.values()), "weight_decay": recipe},
            {"params": matrices, "weight_decay": rest},
            {"params": [p for p in others if id(p) not in which], "weight_decay": recipe},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer: Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, self.lr, self.momentum, fused=True)
        else:
            optimizer = torch.optim.AdamW(groups, self.lr, (self.momentum, 0.999), fused=True)
        measure = "norm" if self.optimizer == "sgd" else "rms"
        if self.rule == "aws":
            nw.attach(optimizer, decayed.values(), total_time)
        elif self.rule == "l2-filters":
            nw.Decay(optimizer, nw.L2(self.coefficient), decayed.values())
        elif self.rule == "aws-tuned":
            nw.Decay(optimizer, nw.AdaptiveWeightShrink(self.coefficient), decayed.values(), measure=measure)
        elif self.rule == "epsilon":
            shifted = nw.EpsilonShiftedL2(self.coefficient, self.epsilon)
            nw.Decay(optimizer, shifted, decayed.values(), mode="coupled")
        return optimizer

    def run(self, log: Log) -> Metrics:
        """Train on the CPU without checkpoints; see :meth:`train`."""
        return self.run_in(None, None, log)

    def run_in(self, folder: Path | None, execution: Any, log: Log) -> Metrics:
        """Train with a checkpoint in ``folder``. ``execution``: an :class:`Execution`; None: the CPU."""
        checkpoint = None
        if folder is not None:
            checkpoint = folder / CHECKPOINT
            with naming_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        return self.train(execution or Execution(device="cpu"), checkpoint=checkpoint, log=log)

    def train(
        self,
        execution: Execution = DEFAULT,
        *,
        checkpoint: Path | None = None,
        log: Log = lambda line: None,
        seen: Seen = lambda step, steps, line: None,
    ) -> Metrics:
        """Train and evaluate, going on from the checkpoint if there is one.

        The data set must be on this machine already. On one device a training that was interrupted ends with
        the same bits as one that was not, wherever the interruption was.

        Args:
            execution: The device, and how.
            checkpoint: Where to keep checkpoints; deleted at the end. None: nowhere.
            log: Called once an epoch with epoch, step, train_loss (mean over the epoch), lr, the median norm
                of filters, and where there was an evaluation loss and accuracy on the held-out images
                ("validation", otherwise "test").
                The lines of a resumed training begin with those of before.
            seen: Called after each step.

        Returns:
            The summary. ``status`` is "finished" or "not finite" (then ``reason`` says what), ``step`` is the
            last step. A finished run has test_loss, test_accuracy (fractions), the same of the validation
            images if there are any, train_accuracy (of at most 10,000 training images, as they are), the last
            train_loss, parameters, and training_seconds.

        Raises:
            ValueError: A setting is not possible, the data are missing or have changed, there is no such
                device, the checkpoint does not fit, or the memory does not suffice.
        """
        self.check()
        with Footing(self, execution) as footing:
            return _trained(self, footing, execution, checkpoint, log, seen)


class Footing:
    """The device, the feed and the network of a run; a context that turns lack of memory into one line.

    Args:
        run: The settings.
        execution: How to carry them out.
        supply: Called with device, room, rank and world for another feed than that of the run's data.
    """

    def __init__(
        self, run: NetworkRun, execution: Execution, supply: Callable[..., Feed] | None = None
    ) -> None:
        self.run = run
        self.device = device_named(execution.device)
        self.fabric = fabric_for(self.device, execution.device, run.precision)
        self.fabric.launch()
        self.device = torch.device(self.fabric.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # an interrupted run must end with the same bits
        room = available_memory(self.device) / 2
        made = _feed(run, execution) if supply is None else supply
        self.feed = made(
            device=self.device, room=room, rank=self.fabric.global_rank, world=self.fabric.world_size
        )
        of = ("network", "batch_norm", "width", "optimizer", "precision")
        kind = NetworkRun(data="", fingerprint="", **{name: getattr(run, name) for name in of})
        plain, self.footprint = _footprint(kind, self.feed.classes, self.feed.shape)
        self._check_layout(plain, execution)
        self._check_memory(self.device)

    def __enter__(self) -> Footing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and is_out_of_memory(error):
            raise ValueError(self._too_much()) from error

    def _check_layout(self, network: nn.Module, execution: Execution) -> None:
        """Refuse what crashes the CPU backend of torch 2.13: strided 1×1 convolutions of few channels."""
        narrow = any(
            isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 8
            for m in network.modules()
        )
        if narrow and execution.channels_last and self.device.type == "cpu":
            raise ValueError(
                f"--width {self.run.width} is not possible for {self.run.network} on a CPU, where torch "
                "crashes with so few channels in this layout: give 8 or more, or --no-channels-last"
            )

    def _check_memory(self, device: torch.device) -> None:
        self._room = available_memory(device)
        if self.footprint.bytes_for(self.run.batch_size // self.fabric.world_size) > self._room:
            raise ValueError(self._too_much())

    def _too_much(self) -> str:
        asked, world = self.run.batch_size, self.fabric.world_size
        needed = self.footprint.bytes_for(asked // world)
        fits = self.footprint.largest_batch(asked // world // 2, 0.9 * self._room)
        remedy = "give a smaller network, or a --device with more memory"
        if fits:
            remedy = (
                f"{fits * world} images would fit: give normwise train --batch {fits * world}, and a claim, "
                "which keeps its batches, a --device with more memory"
            )
        return (
            f"a batch of {asked} images is too large for {self.device}: a step of {self.run.network} takes "
            f"about {_size(needed)}, and {_size(self._room)} were free; {remedy}"
        )

    def prepared(self, execution: Execution, total_time: float) -> tuple[nn.Module, Optimizer]:
        """Return the network on its device and the optimizer."""
        network = self.run.build(self.feed.classes, self.feed.shape[0]).to(self.device)
        if execution.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network, self.run.make_optimizer(network, total_time)

    def wrapped(self, network: nn.Module, optimizer: Optimizer, execution: Execution) -> tuple[Any, Any]:
        """Return what Fabric steps: the network, compiled if asked for, and the optimizer."""
        forward = torch.compile(network) if execution.compiled else network
        first, second = self.fabric.setup(forward, optimizer, move_to_device=False)
        return first, second


@lru_cache
def _footprint(kind: NetworkRun, classes: int, shape: tuple[int, int, int]) -> tuple[nn.Module, Footprint]:
    """Return the plain network without data, and the memory of a step.

    It is cached, as successive runs train the same network.
    """
    with torch.device("meta"):
        plain = kind.build(classes, shape[0], "plain")
    buffers = 1 if kind.optimizer == "sgd" else 2
    return plain, footprint(plain, shape, buffers=buffers, precision=kind.precision)


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _feed(run: NetworkRun, execution: Execution) -> Callable[..., Feed]:
    data = load_images(run.data, offline=True)
    if data.fingerprint != run.fingerprint:
        raise ValueError(
            f"{run.data} has changed since the job began: its SHA-256 is {data.fingerprint[:12]}…, not "
            f"{run.fingerprint[:12]}…: start the job again"
        )

    def made(**arguments: Any) -> Feed:
        return feed(
            data,
            batch_size=run.batch_size,
            seed=run.seed,
            augment=run.augment,
            train_size=run.train_size,
            validation_size=run.validation_size,
            image_size=run.image_size,
            workers=execution.workers,
            **arguments,
        )

    return made


def _trained(
    run: NetworkRun,
    footing: Footing,
    execution: Execution,
    path: Path | None,
    log: Log,
    seen: Seen,
) -> Metrics:
    images, fabric = footing.feed, footing.fabric
    per_epoch = images.train_size // run.batch_size
    steps = run.epochs * per_epoch
    network, optimizer = footing.prepared(execution, sum(run.lr_at(step, steps) for step in range(steps)))
    settings = run.as_dict() | {"execution": execution.as_dict(footing.device, fabric.world_size)}
    state = None if path is None else load_checkpoint(path, settings)
    done, total, lines, before = 0, torch.zeros((), device=footing.device), list[Metrics](), 0.0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        done, lines, before = state["step"], state["lines"], state["seconds"]
        total = state["total"].to(footing.device)
    for line in lines:
        log(line)
    forward, stepper = footing.wrapped(network, optimizer, execution)
    drops_out = any(isinstance(module, nn.Dropout) for module in network.modules())
    begin = saved = time.monotonic()
    network.train()

    def save() -> None:
        if path is not None and fabric.is_global_zero:
            state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "total": total.cpu(),
                "lines": lines,
                "seconds": before + time.monotonic() - begin,
            }
            save_checkpoint(path, settings, state)

    for epoch in range(done // per_epoch, run.epochs):
        for x, y in images.training(epoch, done - epoch * per_epoch):
            lr = run.lr_at(done, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if drops_out:  # what is dropped depends on seed, step and process alone
                torch.manual_seed(generator_of(run.seed, done, fabric.global_rank).initial_seed())
            if execution.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            stepper.zero_grad()
            loss = cross_entropy(forward(x), y)
            fabric.backward(loss)
            stepper.step()
            total += loss.detach()
            done += 1
            if done % per_epoch:
                due = execution.checkpoint_steps and done % execution.checkpoint_steps == 0
                if due or time.monotonic() - saved > execution.checkpoint_seconds:
                    save()
                    saved = time.monotonic()
                seen(done, steps, lines[-1] if lines else {})
        mean = float(fabric.all_reduce(total, reduce_op="mean")) / per_epoch
        total = torch.zeros_like(total)
        if not math.isfinite(mean):
            return {"status": "not finite", "step": done, "reason": f"the training loss was {mean}"}
        part = "validation" if run.validation_size else "test"
        measured: Metrics = {}
        if (epoch + 1) % run.evaluate_every == 0 or epoch + 1 == run.epochs:
            measured = _part_evaluated(fabric, network, images, part)
        norms = torch.cat([slice_norms(weight).flatten() for weight in filters(network).values()])
        lines.append(
            {
                "epoch": epoch + 1,
                "step": done,
                "train_loss": mean,
                "lr": run.lr_at(done - 1, steps),
                **measured,
                "median_norm": float(norms.median()),
            }
        )
        log(lines[-1])
        save()
        saved = time.monotonic()
        seen(done, steps, lines[-1])
    summary: Metrics = {"status": "finished", "step": done}
    for part in ("validation", "test") if run.validation_size else ("test",):
        measured = {key: value for key, value in lines[-1].items() if key.startswith(part)}
        summary |= measured or _part_evaluated(fabric, network, images, part)
        if not math.isfinite(summary[f"{part}_loss"]):
            reason = f"the {part} loss was {summary[f'{part}_loss']}"
            return {"status": "not finite", "step": done, "reason": reason}
    return summary | {
        "train_accuracy": _evaluated(fabric, network, images.evaluation("train"))[1],
        "train_loss": lines[-1]["train_loss"],
        "median_norm": lines[-1]["median_norm"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_seconds": round(before + time.monotonic() - begin, 1),
    }


def _part_evaluated(fabric: Any, network: nn.Module, images: Feed, part: str) -> Metrics:
    loss, accuracy = _evaluated(fabric, network, images.evaluation(part))
    return {f"{part}_loss": loss, f"{part}_accuracy": accuracy}


@torch.no_grad()
def _evaluated(fabric: Any, network: nn.Module, batches: Iterator[Batch]) -> tuple[float, float]:
    """Return mean loss and accuracy over all processes, with the running statistics of batch norm."""
    network.eval()
    counts: Tensor | None = None
    for x, y in batches:
        with fabric.autocast():
            logits = network(x)
        loss = cross_entropy(logits.float(), y, reduction="sum")
        new = torch.stack([loss, (logits.argmax(1) == y).sum().float(), y.new_tensor(len(y)).float()])
        counts = new if counts is None else counts + new
    network.train()
    if counts is None:  # fewer images than processes
        counts = torch.zeros(3, device=fabric.device)
    loss_sum, hits, number = fabric.all_reduce(counts, reduce_op="sum").tolist()
    return loss_sum / number, hits / number
