"""What weight decay really does in known architectures: writes docs/architectures.md and its figure.

    python -m benchmarks.architectures [NAME ...]     # default: all; with names it only prints

Needs the extras `hf` and `lab`. The verdicts are those of a small model of each architecture (two layers or
so, random weights); the shares are of the values of the full-size model, which is built without memory
(device "meta") and matched by the names of parameters, numbers as stars.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.planning.tables import pattern
from normwise.planning.treatment import Treatment, is_group

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
EFFECTS = {
    "shrink": "effective learning rate only",
    "balance": "balanced against weights",
    "gain": "balanced against gains",
    "L2": "regularised",
    "none": "gains, biases, no effect",
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Architecture:
    """One row: a class and a configuration of transformers, small and full, and the usual recipe."""

    title: str
    model: str
    config: str
    small: dict[str, Any]
    recipe: str
    full: dict[str, Any] = field(default_factory=dict)
    image: int = 0
    seq2seq: bool = False


ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT-2 (124M, tied)",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 61},
        "matrices",
    ),
    "llama": Architecture("Llama (7B)", "LlamaForCausalLM", "LlamaConfig", GROUPED, "matrices"),
    "qwen3": Architecture("Qwen3 (QK-norm)", "Qwen3ForCausalLM", "Qwen3Config", GROUPED, "matrices"),
    "olmo2": Architecture(
        "OLMo 2 (QK-norm, norms after)", "Olmo2ForCausalLM", "Olmo2Config", GROUPED, "matrices"
    ),
    "mixtral": Architecture(
        "Mixtral (8 experts)",
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "matrices",
    ),
    "bert": Architecture("BERT (base, norms after)", "BertForMaskedLM", "BertConfig", TEXT, "names"),
    "t5": Architecture(
        "T5 (small, encoder and decoder)",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61},
        "names",
        seq2seq=True,
    ),
    "vit": Architecture(
        "ViT (base)",
        "ViTForImageClassification",
        "ViTConfig",
        TEXT | {"image_size": 32, "patch_size": 8},
        "matrices",
        image=32,
    ),
    "swin": Architecture(
        "Swin (tiny)",
        "SwinForImageClassification",
        "SwinConfig",
        {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 2,
        },
        "matrices",
        image=32,
    ),
    "convnext": Architecture(
        "ConvNeXt (tiny)",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [12, 16, 20, 24], "depths": [1, 1, 2, 1]},
        "matrices",
        image=64,
    ),
    "resnet": Architecture(
        "ResNet-50",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [2, 2, 2, 2]},
        "everything",
        {"depths": [3, 4, 6, 3]},
        image=64,
    ),
    "mobilenet": Architecture(
        "MobileNetV2",
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25},
        "everything",
        image=64,
    ),
}
RECIPES: dict[str, tuple[str, Callable[[str, torch.Tensor], bool]]] = {
    "matrices": ("what has two dimensions or more", lambda name, p: p.ndim >= 2),
    "names": (
        "all but biases and norms, by name",
        lambda name, p: not any(part in name.lower() for part in ("bias", "norm")),
    ),
    "everything": ("everything", lambda name, p: True),
}


def built(architecture: Architecture, settings: dict[str, Any]) -> Any:
    import transformers

    config = getattr(transformers, architecture.config)(**settings)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return getattr(transformers, architecture.model)(config)


def logits(model: nn.Module, batch: dict[str, Any]) -> Any:
    return model(**batch).logits


def batches(architecture: Architecture, vocabulary: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(2):
        if architecture.image:
            found.append({"pixel_values": torch.randn(6, 3, architecture.image, architecture.image)})
            continue
        batch = {"input_ids": torch.randint(2, vocabulary, (3, 12))}
        if architecture.seq2seq:
            batch["decoder_input_ids"] = torch.randint(2, vocabulary, (3, 10))
        found.append(batch)
    return found


@dataclass(frozen=True)
class Result:
    """What was found for one architecture."""

    architecture: Architecture
    plan: nw.Plan
    alone: int
    jointly: int
    pairs: int
    decayed: dict[str, float]
    values: float
    seconds: float


def examine(architecture: Architecture) -> Result:
    torch.manual_seed(0)
    start = time.monotonic()
    small = built(architecture, architecture.small)
    inputs = batches(architecture, architecture.small.get("vocab_size", 0))
    inv = nw.find_invariances(small, inputs, logits, progress=False)
    plan = nw.plan(small, invariances=inv)
    shares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for t in plan.treatments:
        part = 1.0 if t.mask is None else sum(t.mask) / len(t.mask)  # of a packed tensor, only these rows
        kept = "balance" if t.mask is not None else effect(t, plan)
        shares[pattern(t.name)][effect(t, plan)] += part
        shares[pattern(t.name)][kept] += 1 - part
    with torch.device("meta"):
        full = built(architecture, ({"num_labels": 1000} if architecture.image else {}) | architecture.full)
    decays = RECIPES[architecture.recipe][1]
    amounts: dict[str, float] = defaultdict(float)
    values = 0
    for name, parameter in full.named_parameters():
        values += parameter.numel()
        if not decays(name, parameter):
            continue
        of = shares[pattern(name)]
        if not of:
            raise ValueError(f"{architecture.title}: {name} has no counterpart in the small model")
        for verdict, count in of.items():
            amounts[verdict] += parameter.numel() * count / sum(of.values())
    total = sum(amounts.values())
    shrunk = [t for t in plan.treatments if t.verdict == "shrink"]
    alone = sum(t.name in inv.scale_invariant or t.name in inv.partial for t in shrunk)
    return Result(
        architecture,
        plan,
        alone,
        len(shrunk) - alone,
        sum(not is_group(s) for s in plan.symmetries),
        {verdict: amounts[verdict] / total for verdict in EFFECTS},
        values,
        time.monotonic() - start,
    )


def effect(treatment: Treatment, plan: nw.Plan) -> str:
    """Return the verdict; "gain" for what is balanced against gains, biases and vectors alone."""
    if treatment.verdict != "balance":
        return treatment.verdict
    weights = {t.name for t in plan.treatments if t.role == "weight"}
    return "balance" if weights & set(treatment.against) else "gain"


def described(result: Result, verdict: str) -> str:
    leaves = Counter(
        ".".join(part for part in t.name.split(".")[-3:-1] if not part.isdigit()) or t.name
        for t in result.plan.treatments
        if t.verdict == verdict
    )
    return ", ".join(f"`{leaf}`" for leaf in leaves) or "–"


def table(results: list[Result]) -> str:
    header = ["architecture", "invariant alone", "jointly", "+1/−1 symmetries", "usual recipe decays"]
    header += [f"% {words}" for words in EFFECTS.values()]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for r in results:
        cells = [r.architecture.title, str(r.alone), str(r.jointly), str(r.pairs)]
        cells += [RECIPES[r.architecture.recipe][0], *(percent(r.decayed[key]) for key in EFFECTS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return "–" if not share else "<0.1" if share < 0.001 else f"{100 * share:.1f}"


def details(results: list[Result]) -> str:
    lines = ["| architecture | scale-invariant | balanced | in no symmetry |", "|---|---|---|---|"]
    for r in results:
        words = [described(r, verdict) for verdict in ("shrink", "balance", "L2")]
        lines.append(f"| {r.architecture.title} | {' | '.join(words)} |")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "normwise"
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.38 * len(results) + 1.2))
    left = [0.0] * len(results)
    colors = dict(zip(EFFECTS, ("#0072b2", "#d55e00", "#f0b27a", "#009e73", "#707070"), strict=True))
    titles = [r.architecture.title for r in results]
    for verdict, words in EFFECTS.items():
        widths = [r.decayed[verdict] * 100 for r in results]
        axes.barh(titles, widths, left=left, label=words, color=colors[verdict])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the values that the usual recipe decays")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


TEXT_OF_PAGE = """# What weight decay really does in known architectures

Made by `python -m benchmarks.architectures`; do not edit. For each architecture: how many weights (matrices,
convolutions, embeddings) of a small model of it only have a direction, alone or jointly, and how many
symmetries scale some weights up and others down; then, for the full-size model, how the values that its usual
recipe decays are shared out by what decay does to them.

![Shares of decayed values by what decay does to them](figures/architectures.svg)

{table}

- *Effective learning rate only*: scale-invariant weights. Decay changes how fast they turn, and nothing else.
- *Balanced against weights*: in a symmetry of exponents +1 and −1. Decay balances the two sides and
  regularises their product.
- *Balanced against gains*: the same, but the other side is made of gains, biases or other vectors only, which
  most recipes do not decay. Then size moves over to them, and the product is regularised in passing.
- *Regularised*: weights in no symmetry. This is what weight decay is usually thought to do.
- The recipes, by rule: two dimensions or more (language models, timm), by name (fine-tuning with
  transformers), everything (torchvision's references).

Which weights these are, by the last parts of their names (the same name may be in two columns: first and last
layers differ):

{details}

Limits. The verdicts hold in training mode, for any values of the weights and at an eps of zero in norm
layers; dropout is off. A packed tensor (GPT-2's q, k, v) has one verdict, unless some of its rows or columns
are invariant alone. Recipes are given by their rule of grouping, not by their coefficient.
"""


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:] or list(ARCHITECTURES)
    results = []
    for name in wanted:
        result = examine(ARCHITECTURES[name])
        print(f"{name}: {result.plan!r}, {result.values:.3g} values, {result.seconds:.0f} s", flush=True)
        results.append(result)
    print(table(results))
    if len(wanted) == len(ARCHITECTURES):
        PAGE.write_text(TEXT_OF_PAGE.format(table=table(results), details=details(results)), encoding="utf-8")
        draw(results, PAGE.parent / "figures" / "architectures.svg")


if __name__ == "__main__":
    main()
