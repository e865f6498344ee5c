"""The trainings of the budgets "large" and "paper", and the decay rules that they compare.

The claims of :mod:`normwise.lab.claims.at_size` make their lists of runs from these, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import normwise as nw
from normwise.lab.data.catalog import CATALOG
from normwise.lab.data.text import BIBLE, FINGERPRINTS
from normwise.lab.runs.arms import AWS, EPSILON, L2, NONE, STARTED
from normwise.lab.runs.network import NetworkRun
from normwise.lab.runs.text import TextRun

__all__ = [
    "LARGE_TEXT",
    "SIZED",
    "Networks",
    "matched",
    "networks_of",
    "recipe",
    "sized_experiments",
    "tuned_aws",
]

SIZED = ("large", "paper")
_MEMBERS = {
    "weight norm": "weight_norm",
    "centered weight norm": "centered_weight_norm",
    "weight standardisation": "weight_standardization",
}
# Training images: all of them; those of the sweeps; those that are held out of the rest to tune.
_SIZES = {
    "fashion-mnist": (60_000, 4000, 2000),
    "cifar10": (50_000, 4000, 2000),
    "cifar100": (50_000, 4000, 2000),
    "digits": (1437, 1000, 300),
}

LARGE_TEXT = TextRun(
    data=BIBLE,
    fingerprint=FINGERPRINTS[BIBLE],
    width=256,
    heads=8,
    depth=6,
    context=64,
    batch_size=16,
    lr=0.003,
    length=300,
    warmup=30,
)
"""The language model of both budgets."""


@dataclass(frozen=True)
class Networks:
    """The image networks of a budget, without a rule.

    Attributes:
        whole: The network on all training images; in "paper" the first network.
        sweep: The same network on a part of the images, with images held out, for cells and for tuning.
        others: Further networks by name: in "large" on the images of the sweep, in "paper" all networks.
    """

    whole: NetworkRun
    sweep: NetworkRun
    others: Mapping[str, NetworkRun]

    def with_precision(self, precision: str) -> Networks:
        """Return the same networks in "float32" or "bf16"."""

        def changed(run: NetworkRun) -> NetworkRun:
            found = replace(run, precision=precision)
            found.check()
            return found

        others = {name: changed(run) for name, run in self.others.items()}
        return Networks(changed(self.whole), changed(self.sweep), others)


def networks_of(name: str, data: str, fingerprint: str) -> Networks:
    """Return the networks of a budget.

    Args:
        name: "large" or "paper".
        data: Name of the data set.
        fingerprint: SHA-256 of its content.

    Raises:
        ValueError: The budget is not for these data.

    Example:
        >>> [len(networks_of(*names, "").others) for names in (("large", "digits"), ("paper", "cifar100"))]
        [2, 18]
    """
    if name == "large" and data in _SIZES:
        return _large(data, fingerprint)
    if name == "paper" and data in ("cifar10", "cifar100"):
        return _cifar(data, fingerprint)
    if name == "paper" and data.startswith("imagefolder:"):
        return _imagenet(data, fingerprint)
    fitting = tuple(_SIZES) if name == "large" else ("cifar10", "cifar100", CATALOG[-1])
    raise ValueError(
        f"--budget {name} is not for --data {data}: give {', '.join(fitting[:-1])} or {fitting[-1]}"
    )


def matched(run: NetworkRun, arm: str, multiple: float = 1.0) -> NetworkRun:
    """Return the run under an arm as :func:`normwise.lab.runs.arms.with_arm` does: nothing is tuned.

    The coefficient of AWS is 3/Σlr, and L2 has the same pull at norm 1. Both act on the filters alone, and
    nothing else is decayed.

    Args:
        run: The run.
        arm: ``NONE``, ``L2``, ``AWS`` or ``STARTED``.
        multiple: Factor on the coefficient.

    Example:
        >>> run = NetworkRun(data="", fingerprint="", train_size=12800, epochs=10)
        >>> round(matched(run, "L2").coefficient * run.total_time, 6)
        3.0
    """
    rule = {NONE: "none", L2: "l2-filters", AWS: "aws-tuned", STARTED: "aws"}[arm]
    found = replace(run, rule=rule, coefficient=0.0, weight_decay=0.0)
    if arm in (L2, AWS):
        pull = nw.AdaptiveWeightShrink.for_budget(run.total_time).strength
        found = replace(found, coefficient=pull * multiple)
    return found


def recipe(run: NetworkRun, arm: str) -> NetworkRun:
    """Return the run under an arm as its authors train: the coefficients are those of the run.

    Args:
        run: The run.
        arm: ``NONE``; ``L2``, on all parameters; ``EPSILON``; ``STARTED``, AWS with nothing tuned.
    """
    return replace(run, rule={NONE: "none", L2: "l2", EPSILON: "epsilon", STARTED: "aws"}[arm])


def tuned_aws(run: NetworkRun, validation_size: int) -> list[NetworkRun]:
    """Return AWS with the coefficients that are tried, around the pull of the recipe's L2 at norm 1.

    None are tried where no images are held out, as in a folder.
    """
    if not validation_size:
        return []
    pull = run.coefficient / (1 - run.momentum)
    return [
        replace(run, rule="aws-tuned", coefficient=pull * multiple, validation_size=validation_size)
        for multiple in (0.3, 1.0, 3.0)
    ]


def sized_experiments(name: str, networks: Networks, text: TextRun) -> str:
    """Return what is trained, in a sentence."""
    whole, sweep = networks.whole, networks.sweep
    if name == "paper":
        names = ", ".join(dict.fromkeys(run.network for run in networks.others.values()))
        return (
            f"Trained are {len(networks.others)} networks ({names}, with members of the family) for "
            f"{whole.epochs} epochs on {whole.data}."
        )
    return (
        f"Trained are ResNet-20 for {whole.epochs} epochs on all {whole.train_size} images of {whole.data} "
        f"(sweeps and tuning: {sweep.train_size}) at full size, and a GPT of {text.depth} blocks of width "
        f"{text.width} for {text.length} steps on the King James Bible."
    )


def _large(data: str, fingerprint: str) -> Networks:
    size, part, held_out = _SIZES[data]
    whole = NetworkRun(
        data=data, fingerprint=fingerprint, epochs=10, augment=False, train_size=size, evaluate_every=5
    )
    sweep = replace(whole, train_size=part, validation_size=held_out, evaluate_every=10)
    others = {
        "weight standardisation": replace(sweep, member="weight_standardization"),
        "batch norm only": replace(sweep, member="plain"),
    }
    return Networks(whole, sweep, others)


def _cifar(data: str, fingerprint: str) -> Networks:
    whole = NetworkRun(data=data, fingerprint=fingerprint, evaluate_every=10)
    others = {
        f"{network}, {words}, {'with' if batch_norm else 'without'} batch norm": replace(
            whole, network=network, member=member, batch_norm=batch_norm
        )
        for network in ("resnet20", "resnet56", "resnet110")
        for words, member in _MEMBERS.items()
        for batch_norm in (True, False)
    }
    return Networks(whole, replace(whole, validation_size=5000), others)


def _imagenet(data: str, fingerprint: str) -> Networks:
    whole = NetworkRun(
        data=data,
        fingerprint=fingerprint,
        member="weight_standardization",
        epochs=100,
        batch_size=256,
        schedule="steps",
        drops=(30, 60, 90),
        coefficient=1e-4,
        weight_decay=1e-4,
    )
    others = {
        f"{network}, weight standardisation": replace(whole, network=network)
        for network in ("resnet18", "resnet50", "resnet101")
    }
    return Networks(others["resnet50, weight standardisation"], whole, others)
