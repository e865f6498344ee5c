"""The lists of trainings of the budgets "large" and "paper". They are fixed before anything is run."""

from __future__ import annotations

from dataclasses import replace

from normwise.lab.runs.network import NetworkRun

__all__ = ["GRIDS", "TUNING_SEED", "grid"]

GRIDS = ("large", "paper")
TUNING_SEED = 1000  # never among the seeds that are compared
_MEMBERS = ("weight_norm", "centered_weight_norm", "weight_standardization")
_TUNED = (1.5e-3, 5e-3, 1.5e-2)  # around 5e-4/(1 − 0.9), the pull of the recipe at norm 1


def grid(name: str, data: str, fingerprint: str, seeds: int = 3) -> list[NetworkRun]:
    """Return the runs of a budget.

    Args:
        name: "large": ResNet-20, 10 epochs without augmentation, with weight norm, weight standardisation and
            plain weights under batch norm; three initial scales under three rules, and a quarter and four
            times the learning rate under L2 and AWS. "paper": the setting of the paper. For CIFAR three
            ResNets with the three members, with and without batch norm, 200 epochs, under no decay, the
            recipe's L2, AWS with nothing tuned and the published ε-shift, and runs that tune AWS on
            validation images. For a folder ResNet-18, -50 and -101 with weight standardisation, 100 epochs.
        data: Name of the data set.
        fingerprint: SHA-256 of its content.
        seeds: Number of seeds.

    Raises:
        ValueError: The name is not known, or the budget is not for these data.

    Example:
        >>> len(grid("large", "fashion-mnist", "")), len(grid("paper", "cifar100", ""))
        (117, 270)
    """
    if name == "large":
        runs = _large(data, fingerprint)
        tuning: list[NetworkRun] = []
    elif name == "paper" and data.startswith("imagefolder:"):
        runs, tuning = _imagenet(data, fingerprint), []
    elif name == "paper" and data in ("cifar10", "cifar100"):
        runs, tuning = _cifar(data, fingerprint)
    elif name == "paper":
        raise ValueError(
            f"--budget paper is not for --data {data}: give cifar10, cifar100 or imagefolder:DIR"
        )
    else:
        raise ValueError(f"--budget {name} is not known: choose from {', '.join(GRIDS)}")
    return [replace(run, seed=seed) for seed in range(seeds) for run in runs] + tuning


def _large(data: str, fingerprint: str) -> list[NetworkRun]:
    base = NetworkRun(data=data, fingerprint=fingerprint, epochs=10, augment=False)
    runs = []
    for member in ("weight_norm", "weight_standardization", "plain"):
        own = replace(base, member=member)
        for rule in ("none", "l2", "aws"):
            runs += [replace(own, rule=rule, init_scale=scale) for scale in (1e-3, 1.0, 1e3)]
        for rule in ("l2", "aws"):
            runs += [replace(own, rule=rule, lr=0.1 * factor) for factor in (0.25, 4.0)]
    return runs


def _cifar(data: str, fingerprint: str) -> tuple[list[NetworkRun], list[NetworkRun]]:
    base = NetworkRun(data=data, fingerprint=fingerprint)
    runs, tuning = [], []
    for network in ("resnet20", "resnet56", "resnet110"):
        for member in _MEMBERS:
            for batch_norm in (True, False):
                own = replace(base, network=network, member=member, batch_norm=batch_norm)
                runs += [replace(own, rule=rule) for rule in ("none", "l2", "aws", "epsilon")]
                tuned = replace(own, rule="aws-tuned", validation_size=5000, seed=TUNING_SEED)
                tuning += [replace(tuned, coefficient=coefficient) for coefficient in _TUNED]
    return runs, tuning


def _imagenet(data: str, fingerprint: str) -> list[NetworkRun]:
    base = NetworkRun(
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
    return [
        replace(base, network=network, rule=rule)
        for network in ("resnet18", "resnet50", "resnet101")
        for rule in ("none", "l2", "aws", "epsilon")
    ]
