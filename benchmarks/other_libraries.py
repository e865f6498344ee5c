"""What other libraries do where normwise does something else; every row is found out by running it.

    python -m benchmarks.other_libraries

docs/other-libraries.md has the table; a test compares the two. The rows of transformers need the extra "hf".
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normwise as nw

WRAPS = (parametrizations.weight_norm, nw.weight_norm)
Row = tuple[str, str, str]


def row(what: str, found: Iterable[str]) -> Row:
    """Return a row: what is done, what the other library does, what normwise does."""
    there, here = found
    return what, there, here


def originals(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return gain and direction of the only weight norm of a module."""
    gain, direction = (p for name, p in module.named_parameters() if "original" in name)
    return gain, direction


def weights_at_the_ends(kind: str, scale: float) -> Row:
    """The norm of a normalised filter whose 16 elements are all ``scale``; it should be 1 (0 for 0)."""
    found = []
    for wrap in WRAPS:
        layer = wrap(nn.Linear(16, 2, bias=False))
        with torch.no_grad():
            gain, direction = originals(layer)
            gain.fill_(1.0)
            direction[0] = scale
            norm = layer.weight[0].double().norm().item()
        found.append(f"{norm:.3g}")
    return row(f"norm of the weight, from {kind} (torch)", found)


def penalty_on_gradients() -> Row:
    """The gradient of ‖∂L/∂v‖², in float64, beside that of the formula g·v/‖v‖ written out."""
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    found = []
    for wrap in WRAPS:
        layer = wrap(nn.Linear(5, 4, bias=False).double())
        g, v = originals(layer)

        def second(weight: Tensor, v: Tensor = v) -> Tensor:
            (first,) = torch.autograd.grad(torch.tanh(x @ weight.T).sum(), v, create_graph=True)
            return torch.autograd.grad(first.square().sum(), v)[0]

        expected = second(g * v / v.norm(dim=1, keepdim=True))
        error = ((second(layer.weight) - expected).norm() / expected.norm()).item()
        found.append("right" if error < 1e-9 else "wrong")
    return row("gradient penalty through weight norm, on the CPU (torch)", found)


def initialisation() -> Row:
    """`nn.init` on a weight that is computed."""
    found = []
    for wrap in WRAPS:
        layer = wrap(nn.Linear(4, 3))
        nn.init.zeros_(layer.weight)
        try:
            lost = bool(layer.weight.any())
        except RuntimeError:
            found.append("an error at the next use")
        else:
            found.append("lost without a word" if lost else "kept")
    return row("`nn.init` on a normalised weight (torch)", found)


def built_before() -> Row:
    """Parameters that the optimizer does not hold where the model was wrapped after it was built."""
    theirs, ours = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, ours)]
    parametrizations.weight_norm(theirs[0])
    nw.convert(ours, "weight_norm", optimizer=optimizers[1])
    found = []
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left = sum(id(p) not in held for p in model.parameters())
        found.append(f"{left} parameters are not trained" if left else "the optimizer takes them over")
    return row("wrapped after the optimizer was built (torch)", found)


def saved_module() -> Row:
    """`torch.save` of a layer whose weight norm was removed."""
    theirs, ours = (wrap(nn.Linear(4, 3)) for wrap in WRAPS)
    parametrize.remove_parametrizations(theirs, "weight")
    nw.fold(ours)
    return row("`torch.save(module)` after removal (torch)", (_saved(theirs), _saved(ours)))


def _saved(module: nn.Module) -> str:
    try:
        torch.save(module, io.BytesIO())
    except (AttributeError, pickle.PicklingError):
        return "fails"
    return "works"


def checkpoints() -> Iterator[Row]:
    """State dicts of one form of weight norm in a model of another form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older form is deprecated, and in every vocoder
        forms: dict[str, Callable[[], nn.Module]] = {
            "plain": lambda: nn.Linear(4, 3),
            "`weight_g`": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
            "`original0`": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        }
        for source, to in (("`original0`", "`weight_g`"), ("plain", "`original0`")):
            state = forms[source]().state_dict()
            ours, _ = nw.upgrade_state_dict(state, forms[to]())
            loaded = (_loaded(forms[to](), given) for given in (state, ours))
            yield row(f"a checkpoint of the form {source} in a model of the form {to} (torch)", loaded)


def _loaded(model: nn.Module, state: dict[str, Any]) -> str:
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError):
        return "refused"
    return "loads"


def standardisation() -> Row:
    """Weight standardisation of weights of a standard deviation of 1e-5, as PytorchInsight writes it."""
    torch.manual_seed(0)
    w = 1e-5 * torch.randn(1, 4096)
    centered = w - w.mean()
    theirs = (centered / (w.std() + 1e-5)).std().item()
    ours = nw.functional.weight_standardization(w).std(correction=0).item()
    what = "std of a standardised weight, from a weight of std 1e-5 (PytorchInsight's formula)"
    return row(what, (f"{theirs:.2g}", f"{ours:.2g}"))


def default_decay() -> Row:
    """What an optimizer that nobody told to decay decays."""
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8))
    plan = nw.plan(net, [torch.randn(8, 4)])
    theirs = torch.optim.AdamW(net.parameters())
    ours = torch.optim.AdamW(plan.param_groups())
    found = [{group["weight_decay"] for group in o.param_groups} for o in (theirs, ours)]
    what = "weight decay of `AdamW` where nobody asks for any (torch)"
    return row(what, (f"{max(values):g}" for values in found))


def dimensions() -> Row:
    """Gains that a rule of two dimensions or more decays."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 8, 3)))
    plan = nw.plan(net, [torch.randn(2, 4, 9)])
    theirs = [p for p in net.parameters() if p.ndim >= 2]
    groups = plan.param_groups(weight_decay=0.1, shrink_weight_decay=0.1)
    ours = [p for group in groups if group["weight_decay"] for _, p in group["params"]]
    gain, _ = originals(net)
    found = ["decayed" if any(p is gain for p in held) else "not decayed" for held in (theirs, ours)]
    return row('gains of a weight norm, under the rule "two dimensions or more"', found)


def groupings() -> Iterator[Row]:
    """What two common rules of grouping decay and a plan does not, or the other way round."""
    import transformers as hf

    image, small = torch.randn(2, 3, 32, 32), {"hidden_sizes": [8, 16], "depths": [1, 1]}
    networks = {
        "ResNet": (
            hf.ResNetForImageClassification,
            hf.ResNetConfig(embedding_size=8, layer_type="basic", **small),
        ),
        "ConvNeXt": (hf.ConvNextForImageClassification, hf.ConvNextConfig(num_stages=2, **small)),
        "ViT": (
            hf.ViTForImageClassification,
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
            ),
        ),
    }
    for name, (kind, config) in networks.items():
        model = kind(config)
        plan = nw.plan(model, [{"pixel_values": image}], forward=lambda m, batch: m(**batch).logits)
        rules = {
            "by name (transformers' Trainer)": hf.Trainer.get_decay_parameter_names(None, model),
            "two dimensions or more": [n for n, p in model.named_parameters() if p.ndim >= 2],
        }
        for rule, decayed in rules.items():
            vectors = [n for n in decayed if plan.verdicts[n] == "none"]
            if vectors:
                what = f"gains and other vectors that are decayed in a {name}, {rule}"
                last = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in vectors})
                yield row(what, (", ".join(f"`{part}`" for part in last), "none"))
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    words = {"input_ids": torch.randint(32, (2, 8)), "decoder_input_ids": torch.randint(32, (2, 8))}
    plan = nw.plan(t5, [words], forward=lambda m, batch: m(**batch).logits)
    ours = {n for n, verdict in plan.verdicts.items() if "relative" in n and verdict == "L2"}
    theirs = {n for n in hf.Trainer.get_decay_parameter_names(None, t5) if "relative" in n}
    found = (f"{'' if names else 'not '}decayed" for names in (theirs, ours))
    yield row("T5's tables of relative positions, by name (transformers' Trainer)", found)


def rows() -> list[Row]:
    """Return all rows."""
    found = [
        weights_at_the_ends("a zero filter", 0.0),
        weights_at_the_ends("a filter of norm 4e20", 1e20),
        weights_at_the_ends("a filter of norm 4e-30", 1e-30),
        penalty_on_gradients(),
        initialisation(),
        built_before(),
        saved_module(),
        *checkpoints(),
        standardisation(),
        default_decay(),
        dimensions(),
    ]
    try:
        return [*found, *groupings()]
    except ImportError:
        print("transformers is not installed: its rows are left out", file=sys.stderr)
        return found


def table(found: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join(
        [
            "| what | the other library | normwise |",
            "|---|---|---|",
            *(f"| {' | '.join(cells)} |" for cells in found),
        ]
    )


if __name__ == "__main__":
    print(table(rows()))
